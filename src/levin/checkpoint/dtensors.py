"""Tensors that are spread over ranks, made whole for a file that one rank writes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

_PLAIN = frozenset((int, float, str, bool, bytes, complex, type(None)))


def whole(tree: Any, is_kept: bool = True, is_alone: bool = False) -> Any:
    """Return ``tree`` with whole tensors, on the CPU, in the place of those that are spread over ranks.

    All ranks call this with trees of one form; one tensor is gathered after the other.

    Args:
        tree: Dicts, lists and tuples of anything. It stays as it is.
        is_kept: Whether this rank wants them; the others are left with what they had.
        is_alone: Whether the other ranks do not take part.

    Raises:
        RuntimeError: There are such tensors, and the other ranks do not take part.
    """

    def gather(tensor: Any) -> Any:
        if is_alone:
            raise RuntimeError(
                "A tensor whose parts are on several ranks cannot be saved by one of them, and the others do not answer "
                "since a rank has failed. Go on from an older checkpoint."
            )
        found = tensor.detach().full_tensor()
        return found.cpu() if is_kept else tensor

    return _replaced(tree, gather)


def own_parts(tree: Any) -> Any:
    """Return ``tree`` with this rank's parts in the place of tensors that are spread over ranks."""
    return _replaced(tree, lambda tensor: tensor.to_local())


def _replaced(tree: Any, function: Callable[[Any], Any]) -> Any:
    # Without this module nobody can have made one.
    module = sys.modules.get("torch.distributed.tensor")
    return tree if module is None else _walk(tree, module.DTensor, function)


def _walk(value: Any, spread: type, function: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict):
        # Called for each tensor of a model: most entries need no call of their own.
        changed = {
            key: new
            for key, item in value.items()
            if type(item) not in _PLAIN and (new := _walk(item, spread, function)) is not item
        }
        if not changed:
            return value
        result = kind(value)
        vars(result).update(vars(value)) if kind is OrderedDict else None
        result.update(changed)
        return result
    if kind in (list, tuple):
        # The state of python's random numbers is a tuple of 625 numbers.
        if _PLAIN.issuperset(map(type, value)):
            return value
        row = [_walk(item, spread, function) for item in value]
        return value if all(new is old for new, old in zip(row, value, strict=True)) else kind(row)
    return function(value) if isinstance(value, spread) else value
