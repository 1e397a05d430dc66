"""Tensors that are spread over ranks, made whole for a file that one rank writes."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import torch


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
    # Without this module nobody can have made one.
    module = sys.modules.get("torch.distributed.tensor")
    return tree if module is None else _whole(tree, module.DTensor, is_kept, is_alone)


def _whole(value: Any, spread: type, is_kept: bool, is_alone: bool) -> Any:
    if isinstance(value, spread):
        if is_alone:
            raise RuntimeError(
                "A tensor whose parts are on several ranks cannot be saved by one of them, and the others do not answer "
                "since a rank has failed. Go on from an older checkpoint."
            )
        return _gathered(value, is_kept)
    kind = type(value)
    if kind in (dict, OrderedDict):
        items = {key: _whole(item, spread, is_kept, is_alone) for key, item in value.items()}
        if all(new is old for new, old in zip(items.values(), value.values(), strict=True)):
            return value
        result = kind(items)
        vars(result).update(vars(value)) if kind is OrderedDict else None
        return result
    if kind in (list, tuple):
        row = [_whole(item, spread, is_kept, is_alone) for item in value]
        return value if all(new is old for new, old in zip(row, value, strict=True)) else kind(row)
    return value


def _gathered(tensor: Any, is_kept: bool) -> Any:
    found: torch.Tensor = tensor.detach().full_tensor()
    return found.cpu() if is_kept else tensor
