"""How often each action ran and how long it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Optional

from typing_extensions import override

from levin.profilers.profiler import Profiler
from levin.utilities.types import PathLike


class SimpleProfiler(Profiler):
    """Counts the calls of every action and adds up the seconds.

    On an accelerator these are the seconds the host took: kernels run on behind its back.

    Args:
        dirpath: Directory of the report, by default the ``log_dir`` of the Trainer.
        filename: Name of the report; None prints it.
        extended: Whether the report has the number of calls and the percentage of the total as well.

    Raises:
        ValueError: An action is started twice, or stopped without having been started.

    Example:
        >>> profiler = SimpleProfiler()
        >>> with profiler.profile("work"):
        ...     total = sum(range(1000))
        >>> "work" in profiler.summary()
        True
    """

    def __init__(
        self, dirpath: Optional[PathLike] = None, filename: Optional[str] = None, extended: bool = True
    ) -> None:
        super().__init__(dirpath, filename)
        self.extended: bool = extended
        self.current_actions: dict[str, float] = {}
        self.recorded_durations: dict[str, list[float]] = {}
        self.start_time: float = time.perf_counter()

    @override
    def start(self, action_name: str) -> None:
        """Note the time."""
        if action_name in self.current_actions:
            raise ValueError(f"Attempted to start {action_name} which has already started.")
        self.current_actions[action_name] = time.perf_counter()

    @override
    def stop(self, action_name: str) -> None:
        """Add the seconds since :meth:`start`."""
        now = time.perf_counter()
        if action_name not in self.current_actions:
            raise ValueError(f"Attempting to stop recording an action ({action_name}) which was never started.")
        duration = now - self.current_actions.pop(action_name)
        self.recorded_durations.setdefault(action_name, []).append(duration)

    @override
    def summary(self) -> str:
        elapsed = time.perf_counter() - self.start_time
        totals = {action: sum(durations) for action, durations in self.recorded_durations.items()}
        all_calls = sum(map(len, self.recorded_durations.values()))
        rows = [
            ("Action", "Mean duration (s)", "Num calls", "Total time (s)", "Percentage %"),
            ("Total", "-", str(all_calls), f"{elapsed:.5}", "100 %"),
        ]
        for action in sorted(totals, key=totals.__getitem__, reverse=True):
            num_calls, total = len(self.recorded_durations[action]), totals[action]
            share = f"{100 * total / elapsed:.5}"
            rows.append((action, f"{total / num_calls:.5}", str(num_calls), f"{total:.5}", share))
        header, *below = rows if self.extended else [(row[0], row[1], row[3]) for row in (rows[0], *rows[2:])]
        return f"{self._title()}\n\n{table(header, below)}\n"

    @override
    def teardown(self, stage: Optional[str]) -> None:
        """Forget actions that were under way when the run failed."""
        self.current_actions.clear()


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return ``rows`` under ``header`` as text with aligned columns and ruled lines.

    Example:
        >>> print(table(("a", "b"), [("1", "22")]))
        --------------
        |  a  |  b   |
        --------------
        |  1  |  22  |
        --------------
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        "|" + "|".join(f"  {cell:<{width}}  " for cell, width in zip(row, widths)) + "|" for row in (header, *rows)
    ]
    rule = "-" * len(lines[0])
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])
