"""Metrics on their way to the loggers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, Optional

from levin.loggers.logger import Logger
from levin.utilities.numbers import Reading

# Between two looks at a row that is waited for.
POLL_S = 1e-4


class Row(NamedTuple):
    """Metrics of one step.

    Args:
        loggers: Who gets them: a hook may exchange those of the run.
        reading: Their numbers.
        step: Value on the x-axis; None where it is the value of ``step`` among them.
        saves: Whether loggers write at once what they got.
    """

    loggers: list[Logger]
    reading: Reading
    step: Optional[int]
    saves: bool


class Unsent:
    """Hands metrics to the loggers as soon as the device has computed them, in the order in which they were logged."""

    def __init__(self) -> None:
        self.rows: deque[Row] = deque()

    def add(
        self,
        loggers: list[Logger],
        metrics: Mapping[str, object],
        step: Optional[int],
        saves: bool = True,
        timeout_s: float = 0.0,
    ) -> None:
        """Send ``metrics`` after all that was added before; see :class:`Row` and :meth:`send`."""
        self.rows.append(Row(loggers, Reading(metrics), step, saves))
        self.send(timeout_s)

    def send(self, timeout_s: float) -> None:
        """Send the rows that are there, and wait for the others for so many seconds."""
        rows = self.rows
        end_s = time.monotonic() + timeout_s
        while rows:
            if not rows[0].reading.is_there:
                if time.monotonic() >= end_s:
                    return
                time.sleep(POLL_S)
                continue
            loggers, reading, step, saves = rows.popleft()
            values = reading.numbers()
            if step is None:
                step = int(values.pop("step"))
            for logger in loggers:
                logger.log_metrics(metrics=dict(values), step=step)
                if saves:
                    logger.save()
