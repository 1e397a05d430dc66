"""All counters of a Trainer, and the objects under ``trainer.fit_loop`` and its siblings that hold them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Optional

from levin.utilities.properties import reads
from levin.utilities.types import StateDict

FIELDS = ("ready", "started", "processed", "completed")


class Counter:
    """How many times something was about to start, started, did its work and was completed."""

    __slots__ = FIELDS

    def __init__(self) -> None:
        self.ready: int = 0
        self.started: int = 0
        self.processed: int = 0
        self.completed: int = 0

    def set_all(self, value: int) -> None:
        """Set the four counts to ``value``."""
        self.ready = self.started = self.processed = self.completed = value


class Progress:
    """A counter of the whole training and one of the present epoch or run.

    Args:
        fields: Which of the four counts are kept in a checkpoint.
        has_last: Whether ``is_last_batch`` is kept too.
    """

    __slots__ = ("_fields", "_has_last", "current", "is_last_batch", "total")

    def __init__(self, fields: tuple[str, ...] = FIELDS, has_last: bool = False) -> None:
        self.total = Counter()
        self.current = Counter()
        self.is_last_batch: bool = False
        self._fields = fields
        self._has_last = has_last

    def increment_ready(self) -> None:
        """About to start."""
        self.total.ready += 1
        self.current.ready += 1

    def increment_started(self) -> None:
        """Started."""
        self.total.started += 1
        self.current.started += 1

    def increment_processed(self) -> None:
        """The work is done, the end hooks are not."""
        self.total.processed += 1
        self.current.processed += 1

    def increment_completed(self) -> None:
        """All done."""
        self.total.completed += 1
        self.current.completed += 1

    def increment_all(self) -> None:
        """Done at once: about to start, started, processed and completed."""
        for counter in (self.total, self.current):
            counter.ready += 1
            counter.started += 1
            counter.processed += 1
            counter.completed += 1

    def reset(self) -> None:
        """Start the present epoch or run from zero."""
        self.current.set_all(0)
        self.is_last_batch = False

    def complete_processed(self) -> None:
        """Count as completed what did its work, though something at its end failed."""
        for counter in (self.current, self.total):
            counter.completed = max(counter.completed, counter.processed)

    def state_dict(self) -> StateDict:
        """Return the counts in the layout of the checkpoint format."""
        state: dict[str, object] = {
            "total": {name: getattr(self.total, name) for name in self._fields},
            "current": {name: getattr(self.current, name) for name in self._fields},
        }
        if self._has_last:
            state["is_last_batch"] = self.is_last_batch
        return state

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`; what is missing stays as it is."""
        for part, counter in (("total", self.total), ("current", self.current)):
            for name, value in state.get(part, {}).items():
                setattr(counter, name, value)
        self.is_last_batch = state.get("is_last_batch", False)


class Loop:
    """What all loops show while a call of the Trainer runs: the Trainer."""

    _shown: tuple[str, ...] = ("trainer",)

    def __init__(self) -> None:
        self.trainer: Any = None

    def __getstate__(self) -> dict[str, object]:
        """Leave what is shown where it is."""
        return {**self.__dict__, **dict.fromkeys(self._shown)}


class DataLoop(Loop):
    """A loop that shows the data that it runs over, too."""

    _shown = ("trainer", "_data_source", "_combined_loader", "_load")

    def __init__(self) -> None:
        super().__init__()
        # The loaders of the stage, and these once they are loaded: extensions ask here whether there are any, and how long.
        self._data_source: object = None
        self._combined_loader: Any = None
        self._load: Optional[Callable[[], None]] = None

    def setup_data(self) -> None:
        """Load the data, if there are any, before they are due: a module may need their number to make its optimizers."""
        if self._load is not None:
            self._load()


class EvaluationLoop(DataLoop):
    """The state of a validation or test loop."""

    def __init__(self, has_last: bool = True) -> None:
        super().__init__()
        self.batch_progress = Progress(has_last=has_last)
        self.max_batches: list[int | float] = []
        # What ``predict`` kept: one list of outputs, or a list of lists with several loaders.
        self.predictions: list[Any] = []
        self.epoch_batch_indices: list[list[list[int]]] = []
        self.current_batch_indices: list[int] = []
        self.restarting: bool = False
        self.verbose: bool = False

    @property
    def num_dataloaders(self) -> int:
        """Number of loaders, once they are loaded."""
        return 0 if self._combined_loader is None else len(self._combined_loader.flattened)

    def state_dict(self) -> StateDict:
        """Return the loop's part of a checkpoint."""
        return {"state_dict": {}, "batch_progress": self.batch_progress.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        self.batch_progress.load_state_dict(state.get("batch_progress", {}))


class OptimizerProgress:
    """Steps of the optimizers and zeroings of gradients."""

    def __init__(self) -> None:
        self.step = Progress(("ready", "completed"))
        self.zero_grad = Progress(("ready", "started", "completed"))

    def reset(self) -> None:
        """Start the present epoch from zero."""
        self.step.reset()
        self.zero_grad.reset()


class EpochLoop(Loop):
    """The state of the loop over the batches of one training epoch."""

    def __init__(self, min_steps: Optional[int], max_steps: int) -> None:
        super().__init__()
        self.min_steps: Optional[int] = min_steps
        self.max_steps: int = max_steps
        self.batch_progress = Progress(has_last=True)
        self.scheduler_progress = Progress(("ready", "completed"))
        self.optim_progress = OptimizerProgress()
        self.manual_step_progress = Progress(("ready", "completed"))
        self.val_loop = EvaluationLoop()
        self._batches_that_stepped: int = 0

    @property
    def batch_idx(self) -> int:
        """Index of the present batch in the epoch; -1 before the first."""
        return self.batch_progress.current.ready - 1

    @property
    def total_batch_idx(self) -> int:
        """Index of the present batch in the whole training; -1 before the first."""
        return self.batch_progress.total.ready - 1

    @property
    def global_step(self) -> int:
        """Optimizer steps taken, by automatic and by manual optimization."""
        return self.optim_progress.step.total.completed + self.manual_step_progress.total.completed

    @property
    def manual_optimization(self) -> object:
        """Holds ``optim_step_progress``: pina-mathlab counts there the steps of optimizers that it calls itself."""
        return SimpleNamespace(optim_step_progress=self.manual_step_progress)

    @property
    def automatic_optimization(self) -> object:
        """Holds ``optim_progress.optimizer``: packages read there how many steps were taken."""
        return SimpleNamespace(optim_progress=SimpleNamespace(optimizer=self.optim_progress))

    def _should_accumulate(self) -> bool:
        """Whether the accumulation window is still open after the present batch: cellarium-ml asks when it saves."""
        progress = self.batch_progress
        is_full = progress.is_last_batch or progress.current.ready % self.trainer.accumulate_grad_batches == 0
        return not (is_full or self.trainer.strategy.handles_gradient_accumulation)

    def state_dict(self) -> StateDict:
        """Return the loop's part of a checkpoint, flattened as the format has it."""
        step, zero_grad = self.optim_progress.step.state_dict(), self.optim_progress.zero_grad.state_dict()
        return {
            "epoch_loop.state_dict": {"_batches_that_stepped": self._batches_that_stepped},
            "epoch_loop.batch_progress": self.batch_progress.state_dict(),
            "epoch_loop.scheduler_progress": self.scheduler_progress.state_dict(),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": step, "zero_grad": zero_grad}},
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": self.manual_step_progress.state_dict(),
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": self.val_loop.batch_progress.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        own = state.get("epoch_loop.state_dict", {})
        self._batches_that_stepped = own.get("_batches_that_stepped", self._batches_that_stepped)
        optimizer = state.get("epoch_loop.automatic_optimization.optim_progress", {}).get("optimizer", {})
        self.batch_progress.load_state_dict(state.get("epoch_loop.batch_progress", {}))
        self.scheduler_progress.load_state_dict(state.get("epoch_loop.scheduler_progress", {}))
        self.optim_progress.step.load_state_dict(optimizer.get("step", {}))
        self.optim_progress.zero_grad.load_state_dict(optimizer.get("zero_grad", {}))
        self.manual_step_progress.load_state_dict(state.get("epoch_loop.manual_optimization.optim_step_progress", {}))
        self.val_loop.batch_progress.load_state_dict(state.get("epoch_loop.val_loop.batch_progress", {}))


class FitLoop(DataLoop):
    """The state of the loop over epochs: limits and counters.

    Args:
        min_epochs, max_epochs, min_steps, max_steps: As in the Trainer.
    """

    def __init__(
        self, min_epochs: Optional[int], max_epochs: Optional[int], min_steps: Optional[int], max_steps: int
    ) -> None:
        super().__init__()
        self.min_epochs: Optional[int] = min_epochs
        self.max_epochs: Optional[int] = max_epochs
        self.epoch_progress = Progress()
        self.epoch_loop = EpochLoop(min_steps, max_steps)
        # Known once the loaders are: batches of an epoch, of the sanity check per loader, and between validations.
        self.max_batches: int | float = float("inf")
        self.num_sanity_val_batches: list[int | float] = []
        self.val_check_batch: Optional[int | float] = None
        self.restarting: bool = False
        self.restarted_mid_epoch: bool = False

    min_steps: Optional[int] = reads("epoch_loop.min_steps", "The least number of optimizer steps.")
    max_steps: int = reads("epoch_loop.max_steps", "The greatest number of optimizer steps; -1 for no limit.")
    batch_idx: int = reads("epoch_loop.batch_idx", "Index of the present batch in the epoch; -1 before the first.")
    total_batch_idx: int = reads(
        "epoch_loop.total_batch_idx", "Index of the present batch in the whole training; -1 before the first."
    )
    _should_accumulate: Callable[[], bool] = reads(
        "epoch_loop._should_accumulate", "As there; of callbacks that average."
    )

    def state_dict(self) -> StateDict:
        """Return the loop's part of a checkpoint."""
        return {
            "state_dict": {},
            "epoch_loop.state_dict": {},
            **self.epoch_loop.state_dict(),
            "epoch_progress": self.epoch_progress.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        self.epoch_loop.load_state_dict(state)
        self.epoch_progress.load_state_dict(state.get("epoch_progress", {}))
        self.restarting = True


@dataclass
class Loops:
    """The limits and counters of all loops, which go on from one call of a Trainer to the next."""

    fit: FitLoop
    validate: EvaluationLoop = field(default_factory=EvaluationLoop)
    test: EvaluationLoop = field(default_factory=EvaluationLoop)
    predict: EvaluationLoop = field(default_factory=lambda: EvaluationLoop(has_last=False))

    def of_stage(self, stage: str) -> tuple[FitLoop | EvaluationLoop, ...]:
        """Return the loops over the data of ``"train"``, ``"val"``, ``"test"`` or ``"predict"``."""
        if stage == "val":
            return self.validate, self.fit.epoch_loop.val_loop
        return (self.fit,) if stage == "train" else (self.test,) if stage == "test" else (self.predict,)
