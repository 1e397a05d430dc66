"""The base of all callbacks that save checkpoints."""

from __future__ import annotations

from levin.hooks import Callback
from levin.utilities.types import StateDict


class Checkpoint(Callback):
    """A callback that saves checkpoints. The Trainer runs it after all others, so that it saves what they left.

    Derive from it, rather than from :class:`Callback`, to write a checkpoint callback of your own.

    Example:
        >>> class SaveAtTheEnd(Checkpoint):
        ...     def on_train_end(self, trainer, pl_module):
        ...         trainer.save_checkpoint("end.ckpt")
    """

    runs_last = True
    is_monitor = True
    saves_checkpoints = True

    def run_state(self) -> StateDict:
        """Return what this callback knows of the present run only, and needs to go on in the middle of it.

        It is kept beside :meth:`state_dict`, whose content other programs read.
        """
        return {}

    def load_run_state(self, state: StateDict) -> None:
        """Take up :meth:`run_state`, after ``on_train_start``."""
