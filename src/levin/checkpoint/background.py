"""Saving checkpoints while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from levin.checkpoint.io import CheckpointIO, Save, TorchCheckpointIO, reject_storage_options
from levin.checkpoint.staging import Snapshot, Stager
from levin.checkpoint.worker import Worker
from levin.utilities.filesystem import set_modified
from levin.utilities.types import PathLike, StateDict


class AsyncCheckpointIO(CheckpointIO):
    """Copies the tensors of a checkpoint, and writes the copy in the background.

    A save holds up training for as long as it takes to copy the tensors into host memory. That memory is kept for the
    next save, which waits until this one is done. Files appear under their names when they are complete and synced to
    the disk, as those of :class:`~levin.checkpoint.io.TorchCheckpointIO` do.

    An error while writing is logged at once and raised by the next call of :meth:`check` (which the trainer makes
    once per step), of :meth:`save_checkpoint` or of :meth:`teardown`. Removals of older checkpoints that were asked
    for after the failed save are not carried out.

    Args:
        checkpoint_io: What writes, reads and removes the checkpoints; one file each in torch's format by default.
        on_request: Whether only saves within :meth:`request` go on in the background, and others are complete when
            they return. So it is where a callback asked for it, and not the user of the Trainer.

    Example:
        >>> import tempfile
        >>> checkpoint_io = AsyncCheckpointIO()
        >>> path = f"{tempfile.mkdtemp()}/last.ckpt"
        >>> checkpoint_io.save_checkpoint({"epoch": 1}, path)
        >>> checkpoint_io.load_checkpoint(path)
        {'epoch': 1}
        >>> checkpoint_io.teardown()
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None, on_request: bool = False) -> None:
        self.checkpoint_io: CheckpointIO = checkpoint_io or TorchCheckpointIO()
        self.is_collective = self.checkpoint_io.is_collective
        self.on_request: bool = on_request
        self._requested: Save | None = None
        self._stager = Stager()
        self._worker = Worker()

    @contextmanager
    def request(self, path: PathLike, in_background: bool = True) -> Iterator[Save]:
        """Let the save of ``path`` in this block go on in the background (see :meth:`CheckpointIO.request`)."""
        goes_on = in_background or not self.on_request
        save = Save(path, self._worker if goes_on else None)
        self._requested = save if goes_on else None
        try:
            yield save
        finally:
            self._requested = None
        save.end()

    def save_checkpoint(
        self, checkpoint: dict[str, object], path: PathLike, storage_options: object | None = None
    ) -> None:
        """Copy ``checkpoint``, wait for the save before this one if it is still going on, and write in the background.

        Raises:
            TypeError: ``storage_options`` are given, and the inner class has no use for them.
            TypeError, AttributeError or pickle.PicklingError: Something in ``checkpoint`` cannot be pickled.
            Exception: Whatever the save before this one failed with.
        """
        save, self._requested = self._requested, None
        if save is None and self.on_request:
            # At once, and not after what is under way: it may be the file of a signal, and the time that is left short.
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        self.wait()
        self.check()
        if type(self.checkpoint_io) is TorchCheckpointIO:
            reject_storage_options(storage_options, self.checkpoint_io)
        save = save or Save(path, self._worker)
        snapshot = self._stager.stage(checkpoint)
        save.begin(lambda: self._write(snapshot, path, storage_options))

    def load_checkpoint(
        self, path: PathLike, map_location: object | None = None, weights_only: bool | None = None
    ) -> dict[str, object]:
        """Return the checkpoint at ``path``, after all that is under way is done."""
        self.wait()
        return self.checkpoint_io.load_checkpoint(path, map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the checkpoint at ``path``, after all that is under way is done; do not wait for it."""
        self._worker.submit(lambda: self.checkpoint_io.remove_checkpoint(path), f"Removing {path}")

    def check(self) -> None:
        """Raise the error of a save or removal that has failed, once; costs next to nothing when there is none."""
        if self._worker.error is not None:
            raise self._worker.take_error()

    def wait(self) -> None:
        """Wait until all that is under way is done or has failed."""
        self._worker.wait()

    def on_exception(self, exception: BaseException) -> None:
        """Wait for all that is under way; an error of it stays in the log, since the run has failed with another."""
        self.wait()
        if self._worker.error is not None:
            self._worker.take_error()

    def teardown(self) -> None:
        """Wait for all that is under way, give back the memory, and raise the error there was, if any."""
        self.wait()
        self.checkpoint_io.teardown()
        self._stager.release()
        self._worker.release()
        self.check()

    def __getstate__(self) -> dict[str, object]:
        # A copy in another process starts without memory and thread of its own.
        self.wait()
        return {"checkpoint_io": self.checkpoint_io, "on_request": self.on_request}

    def __setstate__(self, state: StateDict) -> None:
        AsyncCheckpointIO.__init__(self, **state)  # the one way to set every field

    def _write(self, snapshot: Snapshot, path: PathLike, storage_options: object | None) -> None:
        self.checkpoint_io.save_checkpoint(snapshot.realize(), path, storage_options)
        # What is saved meanwhile, such as the file of a signal, is newer, though this one may be complete later.
        set_modified(path, snapshot.taken_s)


def in_background(checkpoint_io: CheckpointIO) -> AsyncCheckpointIO:
    """Return ``checkpoint_io`` with the ability to write in the background what is requested."""
    if isinstance(checkpoint_io, AsyncCheckpointIO):
        return checkpoint_io
    return AsyncCheckpointIO(checkpoint_io, on_request=True)
