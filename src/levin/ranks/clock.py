"""A clock that goes off at the same batch on all ranks."""

from __future__ import annotations

import time

from levin.protocols import Trainer


class AgreedClock:
    """Goes off once ``duration_s`` seconds have passed since the last :meth:`restart`.

    On several ranks the time is the one that they agreed on last, a fraction of a second ago at most while steps are
    short; see :mod:`levin.ranks.agreement`.

    Args:
        duration_s: Seconds until the clock goes off.
        trainer: Whose time.
    """

    def __init__(self, duration_s: float, trainer: Trainer) -> None:
        self.duration_s: float = duration_s
        self._started_s: float = _now_s(trainer)

    def restart(self, trainer: Trainer) -> None:
        """Begin a new span of time."""
        self._started_s = _now_s(trainer)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether the time is up. Every rank that asks at the same batch gets the same answer."""
        return _now_s(trainer) - self._started_s >= self.duration_s


def _now_s(trainer: Trainer) -> float:
    return time.monotonic() if trainer.run is None else trainer.run.now_s
