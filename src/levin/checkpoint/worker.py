"""The thread that saves in the background."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from levin.utilities.rank_zero import log


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
