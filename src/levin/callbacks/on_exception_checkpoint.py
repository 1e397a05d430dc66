"""OnExceptionCheckpoint: saves the run when it fails."""

from __future__ import annotations

import os

from levin.callbacks.checkpoint import Checkpoint
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import value_error
from levin.utilities.rank_zero import rank_zero_info


class OnExceptionCheckpoint(Checkpoint):
    """Saves a checkpoint when anything raises during fit; the next ``fit`` with this callback goes on from it.

    A file that is there already is replaced. It is deleted when a fit ends well.

    Args:
        dirpath: Folder or URL for the file.
        filename: Its name without extension.

    Raises:
        MisconfigurationException: ``filename`` is empty.

    Example:
        >>> OnExceptionCheckpoint("runs").ckpt_path
        'runs/on_exception.ckpt'
    """

    FILE_EXTENSION = ".ckpt"
    resumes_by_itself = True

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        super().__init__()
        if not filename:
            raise value_error("filename", filename, "must not be empty")
        self.dirpath: str = os.fspath(dirpath)
        self.filename: str = filename

    @property
    def ckpt_path(self) -> str:
        """Path of the checkpoint."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save."""
        # A call that failed before its run began has nothing to save.
        has_begun = trainer.strategy.lightning_module is not None
        if trainer.state.fn == "fit" and has_begun and not trainer.fast_dev_run:
            trainer.save_checkpoint(self.ckpt_path)
            rank_zero_info(f"{type(exception).__name__} was raised; saved a checkpoint to {self.ckpt_path}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Delete the checkpoint of an earlier failure: this run has overcome it."""
        if stage == "fit" and not trainer.fast_dev_run:
            trainer.strategy.remove_checkpoint(self.ckpt_path)
