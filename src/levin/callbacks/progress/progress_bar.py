"""What every progress bar knows: the lengths of the loops, their names, and the values to show."""

from __future__ import annotations

import builtins
import math
from typing import Any

from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.rank_zero import rank_zero_warn

Metrics = dict[str, Any]


class ProgressBar(Callback):
    """Base of the progress bars. Override the hooks of the batches to draw one of your own.

    Only the process of global rank 0 shows it: on the others, :meth:`setup` calls :meth:`disable`.

    Example:
        >>> class Percent(ProgressBar):
        ...     def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ...         print(f"{100 * (batch_idx + 1) / self.total_train_batches:.0f} %")
        ...
        ...     def disable(self):
        ...         self.on_train_batch_end = lambda *args: None
    """

    _enabled: bool = True
    _refresh_rate: int = 1
    # Labels of the bar: before the first training epoch, and during the other stages. A subclass may have properties.
    sanity_check_description: str = "Sanity Checking"
    train_description: str = "Training"
    validation_description: str = "Validation"
    test_description: str = "Testing"
    predict_description: str = "Predicting"

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._current_eval_dataloader_idx: int | None = None

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs the bar.

        Raises:
            TypeError: No run has begun.
        """
        if self._trainer is None:
            raise TypeError(
                f"The `{self.__class__.__name__}._trainer` reference has not been set yet. Read it after `setup`."
            )
        return self._trainer

    @property
    def is_enabled(self) -> bool:
        """Whether the bar is shown in this process."""
        return self._enabled and self._refresh_rate > 0

    @is_enabled.setter
    def is_enabled(self, value: bool) -> None:
        self._enabled = value

    @property
    def is_disabled(self) -> bool:
        """The opposite of ``is_enabled``."""
        return not self.is_enabled

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches in this training epoch; ``float("inf")`` if nothing says where it ends.

        Where ``max_steps`` alone ends the run, these are at most the batches that are left until then.
        """
        trainer = self.trainer
        total = trainer.num_training_batches
        if trainer.max_epochs != -1 or trainer.max_steps < 0:
            return total
        return min(total, (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)

    @property
    def total_val_batches(self) -> int | float:
        """Number of validation batches of all loaders, 0 when this epoch of fit has no validation."""
        trainer = self.trainer
        every = trainer.check_val_every_n_epoch
        if trainer.training and not trainer.enable_validation:
            return 0
        if trainer.training and every is not None and (trainer.current_epoch + 1) % every != 0:
            return 0
        return sum(trainer.num_val_batches)

    @property
    def total_val_batches_current_dataloader(self) -> int | float:
        """Number of batches of the loader that is being validated, or checked; may be ``float("inf")``."""
        trainer = self.trainer
        numbers = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        return self._of_current_dataloader(numbers)

    @property
    def total_test_batches_current_dataloader(self) -> int | float:
        """Number of batches of the loader that is being tested; may be ``float("inf")``."""
        return self._of_current_dataloader(self.trainer.num_test_batches)

    @property
    def total_predict_batches_current_dataloader(self) -> int | float:
        """Number of batches of the loader that is being predicted; may be ``float("inf")``."""
        return self._of_current_dataloader(self.trainer.num_predict_batches)

    def _of_current_dataloader(self, numbers: list[int | float]) -> int | float:
        return numbers[self._current_eval_dataloader_idx or 0]

    def has_dataloader_changed(self, dataloader_idx: int) -> bool:
        """Return whether ``dataloader_idx`` differs from that of the call before, and remember it."""
        previous, self._current_eval_dataloader_idx = self._current_eval_dataloader_idx, dataloader_idx
        return previous != dataloader_idx

    def reset_dataloader_idx_tracker(self) -> None:
        """Forget the loader that :meth:`has_dataloader_changed` was called with."""
        self._current_eval_dataloader_idx = None

    def disable(self) -> None:
        """Show nothing in this process. A bar must implement it, since only rank 0 shows one."""
        raise NotImplementedError(f"{type(self).__name__} must implement `disable` to be silent on ranks other than 0.")

    def enable(self) -> None:
        """Show the bar again after :meth:`disable`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `enable` to be shown after `disable`.")

    def print(self, *args: object, **kwargs: Any) -> None:
        """Print without disturbing the bar."""
        builtins.print(*args, **kwargs)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if not trainer.is_global_zero:
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> Metrics:
        """Return the values to show, the logger's version (``v_num``) before those logged with ``prog_bar=True``.

        It is called only when the bar is drawn. Between the batches of an epoch it does not wait for a CUDA device, which
        may be behind: then the values are those of an earlier drawing. Override it to show other values.

        Example:
            >>> class WithoutVersion(ProgressBar):
            ...     def get_metrics(self, trainer, pl_module):
            ...         metrics = super().get_metrics(trainer, pl_module)
            ...         metrics.pop("v_num", None)
            ...         return metrics
        """
        standard = get_standard_metrics(trainer)
        logged = {} if trainer.run is None else trainer.run.shown_metrics()
        duplicates = sorted(standard.keys() & logged.keys())
        if duplicates:
            names = ", ".join(duplicates)
            rank_zero_warn(
                f"The progress bar already tracks a metric with the name(s) '{names}' and"
                f" `self.log('{names}', ..., prog_bar=True)` will overwrite this value. "
                " If this is undesired, change the name or override `get_metrics()` in the progress bar callback."
            )
        return {**standard, **logged}


def get_standard_metrics(trainer: Trainer) -> dict[str, int | str]:
    """Return what a bar shows without being asked: ``v_num``, the version of the first logger, if it has one.

    Only the last four characters of a version that is a string are shown.
    """
    version = trainer.loggers[0].version if trainer.loggers else None
    if version is None or version == "":
        return {}
    return {"v_num": version[-4:] if isinstance(version, str) else version}


def convert_inf(x: int | float | None) -> int | float | None:
    """Return ``x``, or None if it is infinite or not a number, as bars write a missing total."""
    return x if x is not None and math.isfinite(x) else None
