"""One line of a laid open loop, with what stands under it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple, Optional

from levin.utilities.overrides import innermost
from levin.utilities.types import Function


class Place(NamedTuple):
    """A batch of training."""

    epoch: int
    batch_idx: int


class When(NamedTuple):
    """After which batches something is due, as a rule (None: always) and in words."""

    due: Optional[Callable[[Place], bool]] = None
    words: str = ""


ALWAYS = When()


@dataclass
class Node:
    """One line, and the lines under it.

    Args:
        text: What it says.
        function: What is called here, where it is the user's or a callback's.
        due: Whether it happens after a batch; by default always. None in its place in ``when`` says that nobody can know.
        when: ``due`` in words.
        counts: For a loop: which axis it counts, and how often it goes round in an epoch.
        body: What stands under it.
    """

    text: str
    function: Optional[Function] = None
    due: Optional[Callable[[Place], bool]] = None
    when: str = ""
    counts: Optional[tuple[str, Callable[[int], int]]] = None
    body: list[Node] = field(default_factory=list)


def code_of(function: Function) -> Optional[CodeType]:
    """Return the code that runs when ``function`` is called, without what wraps it."""
    code: Optional[CodeType] = getattr(innermost(unbound(function)), "__code__", None)
    return code


def unbound(function: Function) -> Any:
    """Return ``function`` without the arguments that are bound to it."""
    while isinstance(function, functools.partial):
        # A hook may get the batch of a step with a ``dataloader_iter``, see loops/hook_table.py.
        shows_batch = getattr(function.func, "__name__", "") == "_call_with_batch"
        function = function.args[0] if shows_batch else function.func
    return function
