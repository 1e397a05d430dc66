"""The table of results that validate and test print."""

from __future__ import annotations

import builtins
import importlib.util
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import zip_longest

MIN_COLUMN_WIDTH = 25
"""Width that a column gets in characters where there is room, so that tables of short numbers look alike."""


def print_results(results: list[dict[str, float]], stage: str) -> None:
    """Print one row per metric and one column per loader, with Rich where it is installed.

    Loaders whose columns do not fit beside each other come in further tables. Nothing is printed without a metric.

    Args:
        results: What ``validate`` or ``test`` returns, one dict per loader. The suffix ``/dataloader_idx_i`` of a
            name is left out, as the column says it.
        stage: ``"validate"`` or ``"test"``.

    Example:
        >>> print_results([{"acc": 0.5}], "test")  # doctest: +SKIP
    """
    rows = collect_rows(results)
    if not rows:
        return
    title = f"{str(stage).capitalize()} metric"
    has_rich = importlib.util.find_spec("rich") is not None
    width = shutil.get_terminal_size((120, 24)).columns
    column_width = _column_width(title, rows, len(results), width)
    # A cell of Rich has three characters around it, one of ours two.
    num_columns = max(2, (width - 1) // (column_width + (3 if has_rich else 2)))
    for loaders in _groups(len(results), num_columns - 1):
        header = [title, *(f"DataLoader {index}" for index in loaders)]
        body = [[name, *(values[index] for index in loaders)] for name, values in rows.items()]
        if has_rich:
            _print_rich(header, body, column_width)
        else:
            for line in format_table(header, body, column_width, width):
                builtins.print(line)


def collect_rows(results: list[dict[str, float]]) -> dict[str, list[str]]:
    """Return metric name -> its text for each loader, sorted by name; empty text where a loader has no such metric.

    Example:
        >>> collect_rows([{"loss/dataloader_idx_0": 1.0}, {"loss/dataloader_idx_1": 2.0, "acc": 0.5}])
        {'acc': ['', '0.5'], 'loss': ['1.0', '2.0']}
    """
    rows: dict[str, list[str]] = {}
    for index, result in enumerate(results):
        for key, value in result.items():
            name = re.sub(r"/dataloader_idx_\d+$", "", key)
            rows.setdefault(name, [""] * len(results))[index] = str(value)
    return dict(sorted(rows.items()))


def format_table(header: Sequence[str], body: Sequence[Sequence[str]], column_width: int, width: int) -> Iterator[str]:
    """Yield the lines of a plain table; text that is too long for its column goes on in the next line.

    Args:
        header: Titles of the columns.
        body: Rows of as many cells.
        column_width: Width of each column in characters.
        width: Width of the rules in characters.
    """
    rule = "-" * min(width, len(header) * (column_width + 2) - 2)
    yield rule
    for number, row in enumerate([header, *body]):
        pieces = [[cell[i : i + column_width] for i in range(0, len(cell), column_width)] for cell in row]
        for line in zip_longest(*pieces, fillvalue=""):
            yield "  ".join(f"{cell:^{column_width}}" for cell in line).rstrip()
        if number == 0:
            yield rule
    yield rule


def _column_width(title: str, rows: dict[str, list[str]], num_loaders: int, width: int) -> int:
    """Return the width that all columns get: that of the longest text, less where two do not fit."""
    texts = [title, *rows, *(value for values in rows.values() for value in values)]
    texts += [f"DataLoader {index}" for index in range(num_loaders)]
    return max(1, min(max(MIN_COLUMN_WIDTH, *map(len, texts)), (width - 1) // 2 - 3))


def _groups(number: int, size: int) -> Iterator[range]:
    for start in range(0, number, size):
        yield range(start, min(start + size, number))


def _print_rich(header: Sequence[str], body: Sequence[Sequence[str]], column_width: int) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    columns = [
        Column(title, justify="center", style=style, width=column_width, overflow="fold")
        for title, style in zip(header, ["cyan", *["magenta"] * (len(header) - 1)])
    ]
    table = Table(*columns)
    for row in body:
        table.add_row(*row)
    Console().print(table, markup=False)
