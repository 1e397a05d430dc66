"""Which of the calls that are under way is the user's."""

from __future__ import annotations

import linecache
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from levin.utilities.stacks import Call

Value = TypeVar("Value", str, float)
_NOT_THE_USERS = ("/site-packages/torch/", f"{Path(__file__).parents[1].as_posix()}/", "<frozen ")


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's nor levin's."""
    path = filename.replace(os.sep, "/")
    return not any(part in path for part in _NOT_THE_USERS)


def call_under_way(calls: Iterable[Call]) -> tuple[str, str]:
    """Return the function that the innermost call of the user's code has called, and its line; "" where there is none.

    Args:
        calls: The innermost first.
    """
    called = ""
    for call in calls:
        if is_users(call.filename):
            text = linecache.getline(call.filename, call.line).strip()
            number = f":{call.line}" if call.line else ""
            return called, f"`{text or called}` ({os.path.basename(call.filename)}{number}, {call.name})"
        called = call.name
    return "", ""


def describe_different_calls(lines: Mapping[str, Sequence[int]]) -> str:
    """Return what to say where ranks wait for each other in different calls, as below a question for the rank.

    Args:
        lines: What was called -> the ranks that did.

    Example:
        >>> print(describe_different_calls({"`trainer.save_checkpoint(path)`": [0], "`trainer.fit(model)`": [1, 2]})[:120])
        All ranks have to make the same calls, received `trainer.save_checkpoint(path)` on rank 0; `trainer.fit(model)` on ranks
    """
    shown = "; ".join(f"{line} on {name_ranks(ranks)}" for line, ranks in lines.items())
    return (
        f"All ranks have to make the same calls, received {shown}. Make them on all ranks, not below "
        "`if trainer.is_global_zero:` or the like; what writes a file does so on rank 0 alone by itself."
    )


def name_ranks(ranks: Sequence[int]) -> str:
    """Return ranks as text, the first of many.

    Example:
        >>> name_ranks([3]), name_ranks([0, 2])
        ('rank 3', 'ranks 0, 2')
    """
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def ranks_by_value(values: Sequence[Value]) -> dict[Value, list[int]]:
    """Return each value with the ranks that have it.

    Args:
        values: One of each rank.
    """
    ranks: dict[Value, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def show_by_rank(ranks: Mapping[Value, Sequence[int]]) -> str:
    """Return values and their ranks as text.

    Example:
        >>> show_by_rank(ranks_by_value([2, 3, 2]))
        '2 on ranks 0, 2 and 3 on rank 1'
    """
    return " and ".join(f"{value} on {name_ranks(having)}" for value, having in ranks.items())
