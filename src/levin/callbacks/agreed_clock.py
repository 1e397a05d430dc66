"""A clock that all ranks read alike, without talking about it at every batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from levin.trainer import Trainer

_MAX_SILENCE_S = 5.0


def calls_until_next_look(time_left_s: float, seconds_per_call: float) -> int:
    """Return how many calls may go by before the clock is looked at again.

    Half of the time that is left goes by unobserved, and never more than a few seconds, so that slower calls later on
    make the clock late by little.

    Args:
        time_left_s: Seconds until the clock goes off.
        seconds_per_call: How long a call took so far.

    Example:
        >>> calls_until_next_look(time_left_s=2.0, seconds_per_call=0.1)
        10
    """
    return int(min(time_left_s / 2, _MAX_SILENCE_S) / max(seconds_per_call, 1e-6))


class AgreedClock:
    """Goes off once ``duration_s`` seconds have passed since the last :meth:`restart`.

    Rank 0 reads the time. The others hear from it every few seconds, since a word at every batch would cost more than
    the batch.

    Args:
        duration_s: Seconds until the clock goes off.
    """

    def __init__(self, duration_s: float) -> None:
        self.duration_s: float = duration_s
        self._started_s: float = 0.0
        self._looked_s: float = 0.0
        self._calls_since_look: int = 0
        self._calls_to_skip: int = 0
        self.restart()

    def restart(self) -> None:
        """Begin a new span of time."""
        self._started_s = self._looked_s = time.monotonic()
        self._calls_since_look = self._calls_to_skip = 0

    def has_gone_off(self, trainer: Trainer) -> bool:
        """Return whether the time is up. Every rank calls this at the same batches and gets the same answer."""
        if trainer.world_size == 1:
            return time.monotonic() - self._started_s >= self.duration_s
        self._calls_since_look += 1
        if self._calls_since_look <= self._calls_to_skip:
            return False
        now = time.monotonic()
        time_left_s = self.duration_s - (now - self._started_s)
        skip = calls_until_next_look(time_left_s, (now - self._looked_s) / self._calls_since_look)
        is_over, self._calls_to_skip = trainer.strategy.broadcast((time_left_s <= 0, max(skip, 0)))
        self._looked_s, self._calls_since_look = now, 0
        return bool(is_over)
