"""When learning-rate schedulers are stepped."""

from __future__ import annotations

from levin.loops.run import Run
from levin.module import LightningModule
from levin.ranks.agreement import agreed_value
from levin.resume.optimizer_groups import schedule_new_groups
from levin.utilities.exceptions import MisconfigurationException, did_you_mean
from levin.utilities.overrides import has_own
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import LRSchedulerConfig


def due_schedulers(run: Run, interval: str, plateau: bool) -> list[LRSchedulerConfig]:
    """Return the schedulers that are stepped at the present batch or epoch; arguments as in :func:`step_schedulers`."""
    index = run.loops.fit.epoch_loop.batch_idx if interval == "step" else run.current_epoch
    return [
        config
        for config in run.schedulers
        if config.interval == interval and config.reduce_on_plateau == plateau and not (index + 1) % config.frequency
    ]


def step_schedulers(run: Run, interval: str, plateau: bool) -> None:
    """Step the schedulers that are due.

    Args:
        interval: ``"step"`` or ``"epoch"``.
        plateau: True for those that need a monitored value, False for the others.

    Raises:
        MisconfigurationException: The monitored value is missing and the scheduler is strict.
    """
    epoch_loop = run.loops.fit.epoch_loop
    own = run.is_profiled or has_own("lr_scheduler_step", run.module, LightningModule)
    for config in due_schedulers(run, interval, plateau):
        value: object = None
        if config.reduce_on_plateau:
            metrics = run.read_metrics().callback
            value = agreed_value(run, str(config.monitor), metrics.get(str(config.monitor)))
            if value is None:
                text = (
                    f"ReduceLROnPlateau watches {config.monitor!r}, which was not logged. Logged are {sorted(metrics)}."
                    f"{did_you_mean(config.monitor, metrics)} Log it with self.log, or set 'strict': False in the scheduler dict."
                )
                if config.strict:
                    raise MisconfigurationException(text)
                rank_zero_warn(text, category=RuntimeWarning)
                continue
        schedule_new_groups(config.scheduler)
        epoch_loop.scheduler_progress.increment_ready()
        if own:
            run.call_own("lr_scheduler_step", run.module.lr_scheduler_step, config.scheduler, value)
        elif value is None:
            config.scheduler.step()
        else:
            config.scheduler.step(value)
        epoch_loop.scheduler_progress.increment_completed()
