"""Values that a checkpoint can hold and that load without running code: tensors, numbers, texts, and collections of them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor
from torch.nn import Parameter

_SCALARS = (bool, int, float, complex, str, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Return whether ``value`` is made of tensors and plain values only.

    Example:
        >>> is_plain({"x": [1, 2.0, "a"]}), is_plain(object())
        (True, False)
    """
    kind = type(value)
    if kind in _SCALARS or kind in (Tensor, Parameter):
        return True
    if kind in (list, tuple):
        return all(is_plain(item) for item in value)
    if kind in (dict, OrderedDict):
        return all(type(key) in _SCALARS and is_plain(item) for key, item in value.items())
    return False


def copied(value: Any) -> Any:
    """Return ``value`` with a detached copy of each tensor in it, on its own device."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    kind = type(value)
    if kind in (list, tuple):
        return kind(copied(item) for item in value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return value
