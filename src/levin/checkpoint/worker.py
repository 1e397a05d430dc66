"""The thread that saves in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from levin.utilities.rank_zero import log


class Worker:
    """Runs jobs one after the other in a thread, which is kept until it is given back.

    A process that ends regularly finishes its jobs first.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        # Starting a thread waits until it runs, which on a busy machine takes milliseconds; waking one does not.
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def submit(self, job: Callable[[], None], name: str) -> None:
        """Run ``job`` after those before it, unless one of them fails."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "levin-checkpoint")
        self._last = self._thread.submit(self._run, job, name)

    def wait(self) -> None:
        """Wait until there are no jobs."""
        if self._last is not None:
            wait([self._last])

    def release(self) -> None:
        """End the thread, which has no jobs; the next one starts another."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()

    def take_error(self) -> BaseException:
        """Return the error and forget it, once the jobs that came after it are left out."""
        self.wait()
        error, self.error = self.error, None
        assert error is not None
        return error

    def _run(self, job: Callable[[], None], name: str) -> None:
        if self.error is not None:
            return
        try:
            job()
        except BaseException as error:  # it is raised in the thread that trains
            log.error("%s in the background failed: %s", name, error)
            self.error = error
