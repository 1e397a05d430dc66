"""Timer: measures the time of each stage and stops training when it is up."""

from __future__ import annotations

import time
from datetime import timedelta

from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.ranks.clock import AgreedClock
from levin.settings import parse_duration
from levin.utilities.exceptions import require_choice
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.states import RunningStage
from levin.utilities.types import STEP_OUTPUT, Batch, StateDict


def _seconds(duration: str | timedelta | dict[str, int] | None) -> float | None:
    parsed = parse_duration(duration, "duration")
    if parsed is None and duration is not None:
        raise TypeError(f"duration must be a string 'DD:HH:MM:SS', a timedelta or a dict, received {duration!r}.")
    return None if parsed is None else parsed.total_seconds()


class _Stopwatch:
    """When a stage began and ended, in seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.started_s: float | None = None
        self.ended_s: float | None = None

    def start(self) -> None:
        self.started_s, self.ended_s = time.monotonic(), None

    def stop(self) -> None:
        self.ended_s = time.monotonic()

    def elapsed_s(self) -> float:
        if self.started_s is None:
            return 0.0
        return (time.monotonic() if self.ended_s is None else self.ended_s) - self.started_s


class Timer(Callback):
    """Measures how long training, validation and test take, and stops training when its time is up.

    Args:
        duration: Time for training, as ``"DD:HH:MM:SS"``, timedelta or dict of its arguments. Time spent before a
            resume counts. None only measures.
        interval: ``"step"`` looks at the clock after each batch, ``"epoch"`` after each epoch.
        verbose: Whether to log a line when the time is up.

    Raises:
        MisconfigurationException: A duration of another form, or an unknown interval.

    Example:
        >>> timer = Timer(duration="00:12:00:00")
        >>> timer.time_remaining()
        43200.0
    """

    def __init__(
        self,
        duration: str | timedelta | dict[str, int] | None = None,
        interval: str = "step",
        verbose: bool = True,
    ) -> None:
        super().__init__()
        require_choice("interval", interval, ("step", "epoch"))
        self._duration: float | None = _seconds(duration)
        self._interval: str = str(interval)
        self._verbose: bool = verbose
        self._stopwatches: dict[str, _Stopwatch] = {stage.value: _Stopwatch() for stage in RunningStage}
        # Training time of the runs before this one.
        self._offset: float = 0.0
        self._clock: AgreedClock | None = None

    def start_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return when ``stage`` began, in seconds of the monotonic clock; None if it has not."""
        return self._stopwatch(stage).started_s

    def end_time(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return when ``stage`` ended, in seconds of the monotonic clock; None if it has not."""
        return self._stopwatch(stage).ended_s

    def time_elapsed(self, stage: str = RunningStage.TRAINING) -> float:
        """Return the seconds that ``stage`` has taken; for training those before a resume count too.

        Args:
            stage: ``"train"``, ``"validate"``, ``"sanity_check"``, ``"test"`` or ``"predict"``.
        """
        elapsed = self._stopwatch(stage).elapsed_s()
        return elapsed + self._offset if RunningStage(stage) is RunningStage.TRAINING else elapsed

    def time_remaining(self, stage: str = RunningStage.TRAINING) -> float | None:
        """Return the seconds until the duration is over; None if there is none."""
        return None if self._duration is None else self._duration - self.time_elapsed(stage)

    def _stopwatch(self, stage: str) -> _Stopwatch:
        return self._stopwatches[RunningStage(stage).value]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._duration is not None:
            self._check_time_remaining(trainer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stopwatch = self._stopwatch(RunningStage.TRAINING)
        self._offset += stopwatch.elapsed_s()
        stopwatch.start()
        if self._duration is not None:
            self._clock = AgreedClock(self._duration - self._offset, trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        if self._interval == "step" and self._duration is not None:
            self._check_time_remaining(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._interval == "epoch" and self._duration is not None:
            self._check_time_remaining(trainer)

    def _check_time_remaining(self, trainer: Trainer) -> None:
        """Let the fit stop if the time is over; called on all ranks, and what subclasses override who do more then."""
        if not self._is_over(trainer):
            return
        if not trainer.should_stop and self._verbose:
            elapsed = timedelta(seconds=int(self.time_elapsed()))
            rank_zero_info(f"Time limit reached. Elapsed time is {elapsed}. Signaling Trainer to stop.")
        trainer.should_stop = True

    def _is_over(self, trainer: Trainer) -> bool:
        if self._clock is not None:
            return self._clock.is_due(trainer)
        remaining = self.time_remaining()
        return remaining is not None and remaining <= 0

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stopwatch(RunningStage.TRAINING).stop()
        self._clock = None

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation(trainer).start()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation(trainer).stop()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def _evaluation(self, trainer: Trainer) -> _Stopwatch:
        return self._stopwatch(RunningStage.VALIDATING if trainer.state.fn == "fit" else str(trainer.state.fn))

    @override
    def state_dict(self) -> StateDict:
        return {"time_elapsed": {stage.value: self.time_elapsed(stage) for stage in RunningStage}}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self._offset = state_dict.get("time_elapsed", {}).get(RunningStage.TRAINING.value, 0.0)
