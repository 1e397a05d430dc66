"""When a ModelCheckpoint saves: checking its triggers and asking the Trainer where it stands."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from levin.utilities.exceptions import MisconfigurationException, value_error

if TYPE_CHECKING:
    from levin.protocols import Trainer


def check_triggers(
    every_n_train_steps: int | None, every_n_epochs: int | None, train_time_interval: timedelta | None
) -> None:
    """Raise if the triggers are out of range or exclude each other.

    Raises:
        MisconfigurationException: A negative number, or more than one trigger.
        TypeError: ``train_time_interval`` is no timedelta.
    """
    for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
        if value is not None and value < 0:
            raise value_error(name, value, "must be >= 0", "Use 0 to switch the trigger off.")
    if train_time_interval is not None and not isinstance(train_time_interval, timedelta):
        raise TypeError(
            f"train_time_interval must be a datetime.timedelta, received {train_time_interval!r}. "
            "Use for example timedelta(minutes=30)."
        )
    chosen = [bool(every_n_train_steps), bool(every_n_epochs), train_time_interval is not None]
    if sum(chosen) > 1:
        raise MisconfigurationException(
            f"every_n_train_steps, every_n_epochs and train_time_interval exclude each other, received "
            f"{every_n_train_steps}, {every_n_epochs} and {train_time_interval}. Use one ModelCheckpoint for each."
        )


def validates(trainer: Trainer) -> bool:
    """Return whether this fit validates at all."""
    num_batches = trainer.num_val_batches
    is_known_empty = bool(num_batches) and sum(num_batches) == 0
    return trainer.enable_validation and not is_known_empty


def validates_once_per_epoch(trainer: Trainer) -> bool:
    """Return whether validation, if there is any, runs exactly once in each epoch, at its end."""
    return trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0


def validates_after_last_batch(trainer: Trainer) -> bool:
    """Return whether the present batch is the last of its epoch and a validation follows it."""
    every_n = trainer.check_val_every_n_epoch
    is_due = every_n is None or (trainer.current_epoch + 1) % every_n == 0
    return bool(trainer.is_last_batch) and is_due and validates(trainer)
