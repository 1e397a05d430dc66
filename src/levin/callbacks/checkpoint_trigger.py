"""Where validation stands, as far as a ModelCheckpoint has to know."""

from __future__ import annotations

from levin.protocols import Trainer


def validates(trainer: Trainer) -> bool:
    """Return whether this fit validates at all."""
    num_batches = trainer.num_val_batches
    is_known_empty = bool(num_batches) and sum(num_batches) == 0
    return trainer.enable_validation and not is_known_empty


def validates_once_per_epoch(trainer: Trainer) -> bool:
    """Return whether validation, if there is any, runs exactly once in each epoch, at its end."""
    if trainer.settings.val_check_seconds is not None:
        return False
    return trainer.check_val_every_n_epoch == 1 and trainer.val_check_interval == 1.0


def validates_after_last_batch(trainer: Trainer) -> bool:
    """Return whether the present batch is the last of its epoch and a validation follows it for sure."""
    if trainer.settings.val_check_seconds is not None:
        return False
    every_n = trainer.check_val_every_n_epoch
    is_due = every_n is None or (trainer.current_epoch + 1) % every_n == 0
    return bool(trainer.is_last_batch) and is_due and validates(trainer)
