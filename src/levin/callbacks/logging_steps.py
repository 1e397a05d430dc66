"""What callbacks need that log by themselves: when it is time, and where the values go."""

from __future__ import annotations

from collections.abc import Mapping

from levin.hooks import Callback
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException


def require_logger(trainer: Trainer, callback: Callback) -> None:
    """Raise if ``callback`` would log into the void.

    Raises:
        MisconfigurationException: The Trainer has no logger.
    """
    if not trainer.loggers:
        raise MisconfigurationException(
            f"Cannot use `{type(callback).__name__}` callback with `Trainer` that has no logger. "
            "Give the Trainer a logger, or leave the callback out."
        )


def is_logging_step(trainer: Trainer) -> bool:
    """Return whether values are logged with the present batch; in evaluations batches are counted per loader."""
    every = trainer.log_every_n_steps
    if every == 0 or trainer.sanity_checking:
        return False
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    if trainer.evaluating:
        loops = {"fit": trainer.fit_loop.epoch_loop.val_loop, "validate": trainer.validate_loop}
        step = loops.get(str(trainer.state.fn), trainer.test_loop).batch_progress.current.ready - 1
    return (step + 1) % every == 0 or bool(trainer.fast_dev_run) or trainer.should_stop


def log_values(trainer: Trainer, values: Mapping[str, float], step: int | None = None) -> None:
    """Send ``values`` to all loggers.

    Args:
        trainer: Owner of the loggers.
        values: Numbers by name.
        step: Value on the x-axis, by default the number of training batches that stepped.
    """
    if step is None:
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
    trainer.run.unsent.add(trainer.run.loggers, values, step, saves=False)
