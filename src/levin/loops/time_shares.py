"""Where the time of training goes: samples of what the loop's thread is doing, taken ten times a second beside it.

A pair of looks at the clock around every part of every step would cost each step something, and would have to know all
parts beforehand. A sample costs the loop nothing, and sees whatever runs.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from levin.loops.run import Run
from levin.utilities.stacks import Call, ThreadCalls

INTERVAL_S = 0.1
MAX_POINTS = 400
"""How many points of the curve over time are kept; with more, every other one is dropped and they come half as often."""

_HOUSE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_LOADERS = os.path.join("torch", "utils", "data")
_PLACES = (
    ("checkpoints", ("checkpoint", os.path.join("callbacks", "model_checkpoint.py"))),
    ("logging", ("loggers", os.path.join("loops", "logging.py"))),
    ("progress bar", (os.path.join("callbacks", "progress"),)),
    ("callbacks", ("callbacks",)),
)
"""Part of the work -> the files of levin's that do it."""


class Point(NamedTuple):
    """One point of the curve over time."""

    time_s: float
    """Seconds since 1970."""
    step: int
    epoch: int
    data_share: float
    """Part of the time since the point before that went into waiting for data."""
    memory: float
    """Bytes that tensors hold on the device; nan on the CPU."""


class TimeShares:
    """Samples what the thread that makes it does, until :meth:`stop`.

    Args:
        run: Whose training it is.
    """

    def __init__(self, run: Run) -> None:
        self.counts: Counter[str] = Counter()
        self.points: list[Point] = []
        self._run = weakref.ref(run)
        self._calls = ThreadCalls()
        self._stopped = threading.Event()
        self._stride = 1
        self._since: Counter[str] = Counter()
        self._keep(run)
        threading.Thread(target=self._watch, name="levin-time-shares", daemon=True).start()

    @property
    def num_samples(self) -> int:
        """How often it was looked."""
        return self.counts.total()

    def share(self, part: str) -> float:
        """Return which part of the time went into ``part``: 0 to 1."""
        return self.counts[part] / max(1, self.num_samples)

    def stop(self) -> None:
        """Look no more."""
        if not self._stopped.is_set():
            self._stopped.set()
            if (run := self._run()) is not None:
                self._keep(run)

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL_S) and self._look():
            pass

    def _look(self) -> bool:
        run = self._run()
        if run is None:
            return False
        if calls := self._calls():
            part = part_of(calls)
            self.counts[part] += 1
            self._since[part] += 1
        if self._since.total() >= self._stride * 10:
            self._keep(run)
        return True

    def _keep(self, run: Run) -> None:
        since, self._since = self._since, Counter()
        device = run.strategy.root_device
        memory = float("nan")
        if device.type == "cuda":
            import torch

            memory = float(torch.cuda.memory_allocated(device))
        share = since["data"] / max(1, since.total())
        self.points.append(Point(time.time(), run.global_step, run.current_epoch, share, memory))
        if len(self.points) > MAX_POINTS:
            self._stride *= 2
            del self.points[1::2]


def part_of(calls: Iterable[Call]) -> str:
    """Return which part of the work a thread is in, by the innermost of its calls that belongs to one.

    Everything in a validation is ``"validation"``; what belongs to no part, the step itself, is ``"training"``.
    """
    found = ""
    for path, _, name in calls:
        if path.startswith(_HOUSE):
            inside = path[len(_HOUSE) + 1 :]
            if inside == os.path.join("loops", "evaluate.py"):
                return "validation"
            if not found and inside == os.path.join("data", "feed.py"):
                found = "moving batches" if name == "place" else "data"
            if not found:
                found = next((part for part, files in _PLACES if inside.startswith(files)), "")
        elif not found and _LOADERS in path:
            found = "data"
    return found or "training"
