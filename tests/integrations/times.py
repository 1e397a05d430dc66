"""Step times of a run while something is done to a service that it uses, side by side."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from levin import Callback


class Clock(Callback):
    """Times each step, and does something to a service before some.

    Args:
        when: Number of the step -> what is done before it.
    """

    def __init__(self, when: dict[int, Callable[[], object]] | None = None) -> None:
        self.seconds: list[float] = []
        self.when = when or {}
        self.began: float | None = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.when:
            self.when[batch_idx]()
        now = time.perf_counter()
        if self.began is not None:
            self.seconds.append(now - self.began)
        self.began = now

    def write(self, path: Path) -> None:
        """Leave the times for the process that makes the table."""
        path.write_text(json.dumps(self.seconds))


def print_times(title: str, times: dict[str, list[float]], whole_s: dict[str, float]) -> None:
    """Print a table: for each condition the steps, and the whole call."""
    print(f"\n{title:26} median step  99 %       slowest    whole call")
    for name, seconds in times.items():
        percent = statistics.quantiles(seconds, n=100)
        print(
            f"{name:26} {1e6 * percent[49]:8.0f} us {1e6 * percent[98]:8.0f} us {1e3 * max(seconds):7.1f} ms"
            f" {whole_s[name]:8.1f} s"
        )
