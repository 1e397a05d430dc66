"""The base of all callbacks that save checkpoints."""

from __future__ import annotations

from levin.hooks import Callback


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
