"""A save that may go on in the background, and the thread that does it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from levin.utilities.rank_zero import log
from levin.utilities.types import PathLike


class Save:
    """A save that was asked for: whether its file is there.

    Args:
        path: Where to.
        worker: What writes it in the background; None where the save is done when the call returns.
    """

    def __init__(self, path: PathLike, worker: Worker | None = None) -> None:
        self.path: PathLike = path
        self.is_begun: bool = False
        self.is_written: bool = False
        self._worker = worker

    def begin(self, write: Callable[[], None]) -> None:
        """Let ``write``, which takes no arguments, make the file in the background."""

        def job() -> None:
            write()
            self.is_written = True

        assert self._worker is not None
        self.is_begun = True
        self._worker.submit(job, f"Saving {self.path}")

    def end(self) -> None:
        """Note that the call is over; what was not begun in the background is complete, or not this process's to write."""
        self.is_written = self.is_written or not self.is_begun

    def then(self, function: Callable[[], None], name: str) -> None:
        """Call ``function`` once the file is there; in the background, if that is where it is written.

        Args:
            function: Takes no arguments; its error is raised like that of the save.
            name: What it does, for messages.
        """
        if self._worker is None:
            function()
        else:
            self._worker.submit(function, name)

    def wait(self) -> None:
        """Wait until the file is there, or writing it has failed, which the CheckpointIO will tell."""
        if self._worker is not None:
            self._worker.wait()


class Worker:
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
