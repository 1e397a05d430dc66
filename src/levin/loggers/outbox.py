"""What goes to a service over the network, sent by a thread: training waits for no service and ends for none."""

from __future__ import annotations

import atexit
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Optional

from levin.utilities.exceptions import causes
from levin.utilities.rank_zero import log
from levin.utilities.types import StateDict

_MAX_GROUP = 1000
_IDLE_S = 5.0
_LAST_TRY_S = 5.0
_PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Entry:
    """Something to send.

    Args:
        kind: What it is; neighbours of one kind are sent together.
        payload: Its content, which JSON has a form for.
        limit_s: How long the end of a run waits for it.
        sent: Done when it was sent or refused.
    """

    kind: str
    payload: Any
    limit_s: float
    sent: Future[None]


class Outbox:
    """Sends entries in their order from a thread, again and again while the service is away.

    Args:
        service: Its name, for messages.
        send: Sends payloads of one kind; may take as long as it likes, and raises what went wrong.
        is_away: Whether an error means that the service cannot be reached now. Entries with another error are refused:
            they are left out, with a message.
        keep: Keeps what was not sent, and returns a sentence that says where, and how it is sent later.
        limit: How many entries wait in memory at most; when more come, all that wait are kept.

    Example:
        >>> sent = []
        >>> outbox = Outbox("list", lambda kind, payloads: sent.extend(payloads), lambda error: False, str)
        >>> _ = outbox.put("metric", 1)
        >>> outbox.close()
        >>> sent
        [1]
    """

    def __init__(
        self,
        service: str,
        send: Callable[[str, list[Any]], None],
        is_away: Callable[[Exception], bool],
        keep: Callable[[list[Entry]], str],
        limit: int = 100_000,
    ) -> None:
        self._service: str = service
        self._send: Callable[[str, list[Any]], None] = send
        self._is_away: Callable[[Exception], bool] = is_away
        self._keep: Callable[[list[Entry]], str] = keep
        self._limit: int = limit
        self._reset()

    def _reset(self) -> None:
        self._owner: int = os.getpid()
        self._changed: threading.Condition = threading.Condition()
        self._waiting: deque[Entry] = deque()
        self._under_way: list[Entry] = []
        self._since_s: float = 0.0
        self._worker: Optional[threading.Thread] = None
        self._num_failures: int = 0
        self._num_alone: int = 0
        self._num_refused: int = 0
        # While it is being closed: how many failures there may be.
        self._max_failures: Optional[int] = None

    def __getstate__(self) -> StateDict:
        """Leave the thread here, and what it sends."""
        names = ("_service", "_send", "_is_away", "_keep", "_limit")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: StateDict) -> None:
        vars(self).update(state)
        self._reset()

    def put(self, kind: str, payload: Any, limit_s: float = 30.0) -> Future[None]:
        """Let ``payload`` be sent, and return at once.

        Args:
            kind: What it is.
            payload: Its content, which JSON has a form for.
            limit_s: How long the end of a run waits for it, once it is its turn.

        Returns:
            Is done when it was sent, and has the error when it was refused.
        """
        if self._owner != os.getpid():
            self._reset()  # A process that was forked off has neither the thread nor what the other one sends.
        entry = Entry(kind, payload, limit_s, Future())
        too_many: list[Entry] = []
        with self._changed:
            if len(self._waiting) >= self._limit:
                too_many = list(self._waiting)
                self._waiting.clear()
            self._waiting.append(entry)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"levin-{self._service}", daemon=True)
                self._worker.start()
                atexit.register(self.close)
            self._changed.notify_all()
        if too_many:
            log.warning(f"{self._service} does not keep up: {len(too_many)} entries waited. {self._keep(too_many)}")
        return entry.sent

    def close(self) -> None:
        """Wait until everything is sent, as long as the service takes it, and keep the rest. More may be put in later.

        Each entry has the time that it was given; a service that is away is tried once more.
        """
        with self._changed:
            if self._owner != os.getpid():
                return
            self._max_failures, self._since_s = self._num_failures, time.monotonic()
            self._changed.notify_all()
            while (self._waiting or self._under_way) and self._num_failures <= self._max_failures:
                limit_s = (self._under_way or self._waiting)[0].limit_s
                if self._num_failures:
                    limit_s = min(limit_s, _LAST_TRY_S)  # Clients try again by themselves, for minutes.
                rest_s = self._since_s + limit_s - time.monotonic()
                if rest_s <= 0 or not self._changed.wait(rest_s):
                    break
            left = [*self._under_way, *self._waiting]
            if left:
                # The thread may still be in the middle of a request. It ends after that.
                self._waiting, self._under_way, self._worker = deque(), [], None
            num_refused = self._num_refused
            self._num_failures = self._num_refused = self._num_alone = 0
            self._max_failures = None
        if num_refused > 1:
            log.error(f"{self._service} refused {num_refused} entries.")
        if left:
            log.error(f"{len(left)} entries could not be sent to {self._service}. {self._keep(left)}")

    def _work(self) -> None:
        while group := self._next_group():
            error: Optional[Exception] = None
            try:
                self._send(group[0].kind, [entry.payload for entry in group])
            except Exception as failure:  # Whatever it is, training goes on.
                error = failure
            with self._changed:
                if self._worker is not threading.current_thread():
                    return
                self._settle(group, error)
                self._under_way, self._since_s = [], time.monotonic()
                self._changed.notify_all()

    def _next_group(self) -> list[Entry]:
        me = threading.current_thread()
        with self._changed:
            if self._num_failures:
                pause_s = _PAUSES_S[min(self._num_failures, len(_PAUSES_S)) - 1]
                self._changed.wait_for(lambda: self._is_last_try or self._worker is not me, pause_s)
            self._changed.wait_for(lambda: bool(self._waiting) or self._worker is not me, _IDLE_S)
            if self._worker is not me:
                return []
            if not self._waiting:
                self._worker = None
                atexit.unregister(self.close)
                return []
            size = 1 if self._num_alone else _MAX_GROUP
            self._num_alone = max(0, self._num_alone - 1)
            group = list(itertools.islice(self._waiting, size))
            self._under_way = list(itertools.takewhile(lambda entry: entry.kind == group[0].kind, group))
            for _ in self._under_way:
                self._waiting.popleft()
            self._since_s = time.monotonic()
            return self._under_way

    @property
    def _is_last_try(self) -> bool:
        return self._max_failures is not None and self._num_failures <= self._max_failures

    def _settle(self, group: list[Entry], error: Optional[Exception]) -> None:
        is_away = error is not None and self._is_away(error)
        if is_away:
            if self._num_failures == 0:
                log.warning(
                    f"{self._service} cannot be reached, training goes on and the values wait: {_first_line(error)}"
                )
            self._num_failures += 1
            self._waiting.extendleft(reversed(group))
            return
        if self._num_failures:
            log.info(f"{self._service} is back, what waited is sent.")
            self._num_failures = 0
        if error is None:
            for entry in group:
                entry.sent.set_result(None)
        elif len(group) > 1:
            # One of them may be the reason that all were refused.
            self._num_alone = len(group)
            self._waiting.extendleft(reversed(group))
        else:
            if self._num_refused == 0:
                log.error(f"{self._service} refused {group[0].kind} {group[0].payload!r}: {_first_line(error)}")
            self._num_refused += 1
            group[0].sent.set_exception(error)


def is_unreachable(error: BaseException) -> bool:
    """Return whether an error, or one of its causes, is that a service was not reached by HTTP, or cannot answer now."""
    from requests.exceptions import ConnectionError as RequestsConnectionError
    from requests.exceptions import Timeout

    unreachable = (RequestsConnectionError, Timeout, ConnectionError, TimeoutError)
    for cause in causes(error):
        status = getattr(cause, "status", getattr(getattr(cause, "response", None), "status_code", None))
        asks_to_wait = isinstance(status, int) and (status >= 500 or status in (408, 429))
        if asks_to_wait or isinstance(cause, unreachable):
            return True
    return False


def _first_line(error: Optional[Exception]) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
