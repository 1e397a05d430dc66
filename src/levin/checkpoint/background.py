"""Saving checkpoints while training goes on."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from levin.checkpoint.archive import Buffer, write_archive
from levin.checkpoint.io import CheckpointIO, TorchCheckpointIO, reject_storage_options
from levin.checkpoint.staging import Snapshot, Stager
from levin.utilities.atomic import atomic_open
from levin.utilities.rank_zero import log
from levin.utilities.types import PathLike

# The writer holds the interpreter while it handles tensors and small pieces, and gives it up after so many of them,
# which is every tenth of a millisecond or so. It does not hold it while it writes large pieces.
_PIECES_BETWEEN_PAUSES = 16
_SMALL_PIECE_BYTES = 2**14
_PAUSE_S = 1e-4


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

    Example:
        >>> import tempfile
        >>> checkpoint_io = AsyncCheckpointIO()
        >>> path = f"{tempfile.mkdtemp()}/last.ckpt"
        >>> checkpoint_io.save_checkpoint({"epoch": 1}, path)
        >>> checkpoint_io.load_checkpoint(path)
        {'epoch': 1}
        >>> checkpoint_io.teardown()
    """

    def __init__(self, checkpoint_io: CheckpointIO | None = None) -> None:
        self.checkpoint_io: CheckpointIO = checkpoint_io or TorchCheckpointIO()
        self._stager = Stager()
        self._worker = _Worker()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None) -> None:
        """Copy ``checkpoint``, wait for the save before this one if it is still going on, and write in the background.

        Raises:
            TypeError: ``storage_options`` are given, and the inner class has no use for them.
            TypeError, AttributeError or pickle.PicklingError: Something in ``checkpoint`` cannot be pickled.
            Exception: Whatever the save before this one failed with.
        """
        if type(self.checkpoint_io) is TorchCheckpointIO:
            reject_storage_options(storage_options, self.checkpoint_io)
        self.wait()
        self.check()
        snapshot = self._stager.stage(checkpoint)
        self._worker.submit(lambda: self._write(snapshot, path, storage_options), f"Saving {path}")

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint at ``path``, after all that is under way is done."""
        self.wait()
        return self.checkpoint_io.load_checkpoint(path, map_location=map_location, weights_only=weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the checkpoint at ``path``, after all that is under way is done; do not wait for it."""
        self._worker.submit(lambda: self.checkpoint_io.remove_checkpoint(path), f"Removing {path}")

    def call_after_saves(self, function: Callable[[], None], name: str) -> None:
        """Call ``function`` after all that is under way is done, unless it fails; do not wait for it.

        Args:
            function: Takes no arguments; its error is raised like that of a save.
            name: What it does, for messages.
        """
        self._worker.submit(function, name)

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
        self.end()

    def end(self) -> None:
        """Do what :meth:`teardown` does, except that the inner CheckpointIO stays in use."""
        self.wait()
        self._stager.release()
        self._worker.release()
        self.check()

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process starts without memory and thread of its own.
        self.wait()
        return {"checkpoint_io": self.checkpoint_io}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["checkpoint_io"])  # type: ignore[misc]  # the one way to set every field

    def _write(self, snapshot: Snapshot, path: PathLike, storage_options: Any | None) -> None:
        if type(self.checkpoint_io) is not TorchCheckpointIO:
            self.checkpoint_io.save_checkpoint(snapshot.realize(), path, storage_options)
            return
        pauses = _Pauses()
        archive = snapshot.pack(pauses.count)
        # A file that is saved meanwhile, such as that of a signal, is newer, though it may be complete before this one.
        with atomic_open(path, modified_s=snapshot.taken_s) as file:

            def write(data: Buffer) -> None:
                file.write(data)
                if len(data) < _SMALL_PIECE_BYTES:
                    pauses.count()

            write_archive(archive, write)


class _Pauses:
    """Sleeps for a moment on every so many calls, so that other threads come to run."""

    def __init__(self) -> None:
        self._num_calls = 0

    def count(self) -> None:
        self._num_calls += 1
        if self._num_calls % _PIECES_BETWEEN_PAUSES == 0:
            time.sleep(_PAUSE_S)


class _Worker:
    """Runs jobs one after the other in a thread, which is kept until it is given back.

    A process that ends regularly finishes its jobs first.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._jobs: deque[tuple[Callable[[], None], str]] = deque()
        self._condition = threading.Condition()
        self._is_working = False
        # Starting a thread waits until it runs, which on a busy machine takes milliseconds; waking one does not.
        self._thread: ThreadPoolExecutor | None = None

    def submit(self, job: Callable[[], None], name: str) -> None:
        """Run ``job`` after those before it, unless one of them fails."""
        with self._condition:
            if self.error is not None:
                return
            self._jobs.append((job, name))
            if not self._is_working:
                if self._thread is None:
                    self._thread = ThreadPoolExecutor(1, "levin-checkpoint")
                self._thread.submit(self._work)
                # Last, since Ctrl-C may come in between, and then nobody would ever say that the work is done.
                self._is_working = True

    def wait(self) -> None:
        """Wait until there are no jobs."""
        with self._condition:
            self._condition.wait_for(lambda: not self._is_working)

    def release(self) -> None:
        """End the thread, which has no jobs; the next one starts another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def take_error(self) -> BaseException:
        """Return the error and forget it."""
        with self._condition:
            error, self.error = self.error, None
        assert error is not None
        return error

    def _work(self) -> None:
        while True:
            with self._condition:
                if not self._jobs:
                    self._is_working = False
                    self._condition.notify_all()
                    return
                job, name = self._jobs.popleft()
            try:
                job()
            except BaseException as error:  # it is raised in the thread that trains
                log.error("%s in the background failed: %s", name, error)
                with self._condition:
                    self.error = error
                    self._jobs.clear()
            finally:
                del job  # and the snapshot with it
