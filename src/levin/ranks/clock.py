"""A clock that goes off at the same batch on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.ranks.agreement import now_s

if TYPE_CHECKING:
    from levin.trainer import Trainer


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
        self._started_s: float = now_s(trainer._run)

    def restart(self, trainer: Trainer) -> None:
        """Begin a new span of time."""
        self._started_s = now_s(trainer._run)

    def is_due(self, trainer: Trainer) -> bool:
        """Return whether the time is up. Every rank that asks at the same batch gets the same answer."""
        return now_s(trainer._run) - self._started_s >= self.duration_s
