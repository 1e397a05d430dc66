"""The columns of the Rich progress bar."""

from __future__ import annotations

import sys
from abc import ABC
from collections.abc import Iterable
from datetime import timedelta

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.constrain import Constrain
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.style import StyleType
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import override

BAR_WIDTH = 40
MIN_BAR = 5
"""Cells below which a bar says nothing."""
MARGIN = 2
"""Cells left free at the right: there the terminal writes ``^C``, which would break a full line."""
MIN_RATE = 0.1
"""Batches per second below which the speed is written in seconds per batch."""


class CustomBarColumn(BarColumn):
    """The bar itself; it pulses while the number of batches is unknown."""


class _StyledColumn(ProgressColumn, ABC):
    """A column of one style, which is not wrapped."""

    def __init__(self, style: StyleType) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.style: StyleType = style


class BatchesProcessedColumn(_StyledColumn):
    """Batches done and their number, ``--`` if that is unknown.

    Args:
        style: Rich style.
    """

    @override
    def render(self, task: Task) -> Text:
        total = "--" if task.total is None else str(int(task.total))
        return Text(f"{int(task.completed)}/{total}", style=self.style)


class CustomTimeColumn(_StyledColumn):
    """Time since the start and time left, ``-:--:--`` if that is unknown.

    Args:
        style: Rich style.
    """

    @override
    def render(self, task: Task) -> Text:
        elapsed = task.finished_time if task.finished else task.elapsed
        return Text(f"{_as_time(elapsed)} • {_as_time(task.time_remaining)}", style=self.style)


class ProcessingSpeedColumn(_StyledColumn):
    """Batches per second, or seconds per batch where they are slow.

    Args:
        style: Rich style.
    """

    @override
    def render(self, task: Task) -> Text:
        speed = (task.finished_speed if task.finished else None) or task.speed
        num_timed = task.completed - task.fields.get("first", 0)
        if not speed and num_timed > 0 and task.elapsed:  # Rich knows a speed from the second drawing on
            speed = num_timed / task.elapsed
        if not speed:
            return Text("-.--it/s", style=self.style)
        return Text(f"{1 / speed:.1f}s/it" if speed < MIN_RATE else f"{speed:.2f}it/s", style=self.style)


class MetricsTextColumn(_StyledColumn):
    """The values, which the task has in its field ``metrics``.

    Args:
        style: Rich style.
        delimiter: Text between two values.
    """

    def __init__(self, style: StyleType, delimiter: str = " ") -> None:
        super().__init__(style)
        self.delimiter: str = delimiter
        self.is_empty: bool = False

    @override
    def render(self, task: Task) -> Text:
        metrics = () if self.is_empty else task.fields.get("metrics", ())
        return Text(self.delimiter.join(metrics), style=self.style)

    def fold(self, metrics: Iterable[str], width: int) -> Text:
        """Return the values on lines of at most ``width`` cells, broken between two values where that is possible."""
        lines: list[str] = []
        for value in metrics:
            longer = f"{lines[-1]}{self.delimiter}{value}" if lines else value
            if lines and cell_len(longer) <= width:
                lines[-1] = longer
            else:
                lines.append(value)
        return Text("\n".join(lines), style=self.style)


class MetricsProgress(Progress):
    """Rich's display of bars, with the values behind the bar, or below it where they do not fit.

    Args:
        *columns: Columns before that of the values.
        metrics: Column of the values.
        console: Where to draw.
    """

    def __init__(self, *columns: ProgressColumn | str, metrics: MetricsTextColumn, console: Console | None) -> None:
        self._metrics_column: MetricsTextColumn = metrics
        self.is_hidden: bool = False
        super().__init__(
            *columns, metrics, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the table of bars, and the values where they need lines of their own."""
        tasks = [task for task in self.tasks if task.visible]
        if not tasks or self.is_hidden:
            return
        self._metrics_column.is_empty = True
        column, width = self._metrics_column, self.console.width - MARGIN
        metrics = next((task.fields["metrics"] for task in tasks if task.fields.get("metrics")), ())
        table, free = self._table(tasks, width)
        if cell_len(column.delimiter.join(metrics)) <= free:
            column.is_empty = False
            yield Constrain(self.make_tasks_table(tasks), width)
        else:
            yield Constrain(table, width)
            yield column.fold(metrics, width)

    def _table(self, tasks: list[Task], width: int) -> tuple[Table, int]:
        """Return the bars, and how many cells are left beside them; -1 where even a part of them has to go.

        The bar itself goes first, then the times, then the speed.
        """
        whole, options = self.columns, self.console.options.update(width=sys.maxsize)
        table = self.make_tasks_table(tasks)
        natural = Measurement.get(self.console, options, table).maximum
        if natural - BAR_WIDTH + MIN_BAR <= width:
            return table, width - natural + BAR_WIDTH // 2  # the bar may give way until it is half as wide
        for kind in (BarColumn, CustomTimeColumn, ProcessingSpeedColumn):
            self.columns = tuple(column for column in self.columns if not isinstance(column, kind))
            table = self.make_tasks_table(tasks)
            if Measurement.get(self.console, options, table).maximum <= width:
                break
        self.columns = whole
        return table, -1


def _as_time(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=int(seconds)))
