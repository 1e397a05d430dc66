"""Walks over nested collections of values."""

from __future__ import annotations

import copy
import dataclasses
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Iterator, Union

from levin.utilities.types import Function, Tree

Types = Union[type, tuple[type, ...]]

# Sequences that cannot hold anything to change.
_FLAT = (str, bytes, bytearray, memoryview, range, array)


def as_list(value: object) -> list[Any]:
    """Return a list of what may be one object, several, or None for none.

    Example:
        >>> as_list(None), as_list(1), as_list((1, 2))
        ([], [1], [1, 2])
    """
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_namedtuple(obj: object) -> bool:
    """Return whether ``obj`` is an instance of a named tuple."""
    return isinstance(obj, tuple) and hasattr(obj, "_asdict") and hasattr(obj, "_fields")


def apply_to_collection(data: Tree, dtype: Types, function: Function, *args: object, **kwargs: object) -> Tree:
    """Return a copy of ``data`` in which each leaf of type ``dtype`` is replaced by ``function(leaf)``.

    Args:
        data: A leaf, or any nesting of mappings, sequences, named tuples and dataclass instances.
        dtype: Type or types of the leaves to change; all others are kept as they are.
        function: Called with the leaf, ``args`` and ``kwargs``.

    Example:
        >>> apply_to_collection({"a": [1, "x"]}, int, lambda v: v + 1)
        {'a': [2, 'x']}
    """
    if isinstance(data, dtype):
        return function(data, *args, **kwargs)
    kind: Any = type(data)
    if isinstance(data, Mapping):
        items = [(key, apply_to_collection(value, dtype, function, *args, **kwargs)) for key, value in data.items()]
        if isinstance(data, defaultdict):
            return defaultdict(data.default_factory, OrderedDict(items))
        return dict(items) if kind is dict else _mapping_like(data, items)
    if isinstance(data, Sequence) and not isinstance(data, _FLAT):
        values = [apply_to_collection(value, dtype, function, *args, **kwargs) for value in data]
        return values if kind is list else _sequence_like(data, values)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        result = copy.copy(data)
        for field in dataclasses.fields(data):
            value = apply_to_collection(getattr(data, field.name), dtype, function, *args, **kwargs)
            object.__setattr__(result, field.name, value)
        return result
    return data


def _mapping_like(data: Tree, items: list[tuple[object, object]]) -> Tree:
    """Return a mapping of the kind of ``data`` that holds ``items``."""
    values = OrderedDict(items)
    kind: Any = type(data)
    try:
        result = kind(values)
    except TypeError:
        pass
    else:
        if result.keys() == values.keys() and not any(each is values for each in result.values()):
            return result
    # Its `__init__` takes something else.
    result = copy.copy(data)
    result.update(items)
    return result


def _sequence_like(data: Tree, values: list[Any]) -> Tree:
    """Return a sequence of the kind of ``data`` that holds ``values``."""
    kind: Any = type(data)
    if isinstance(data, deque):
        return kind(values, data.maxlen)
    try:
        result = kind(*values) if is_namedtuple(data) else kind(values)
    except TypeError:
        pass
    else:
        if len(result) == len(values) and not any(each is values for each in result):
            return result
    # Its `__init__` or `__new__` takes something else.
    if not isinstance(data, tuple):
        result = copy.copy(data)
        result[:] = values
        return result
    result = tuple.__new__(kind, values)
    getattr(result, "__dict__", {}).update(getattr(data, "__dict__", {}))
    return result


def _parts_of(data: object) -> Iterable[tuple[object, object]] | None:
    """Return what a nesting holds, each with the key or field that leads there ("" in a sequence); None for a leaf."""
    if isinstance(data, Mapping):
        return data.items()
    if isinstance(data, Sequence) and not isinstance(data, _FLAT):
        return [("", value) for value in data]
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return [(field.name, getattr(data, field.name)) for field in dataclasses.fields(data)]
    return None


def leaves(data: object) -> Iterator[object]:
    """Yield the leaves of nested mappings, sequences and dataclass instances, depth first."""
    parts = _parts_of(data)
    if parts is None:
        yield data
        return
    for _, value in parts:
        yield from leaves(value)


def named_leaves(data: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield what :func:`leaves` does, each with the keys and fields that lead there, joined by dots.

    Args:
        data: A leaf or a nesting of leaves.
        name: Leads to ``data``.

    Example:
        >>> list(named_leaves({"a": [1, {"b": 2}]}))
        [('a', 1), ('a.b', 2)]
    """
    parts = _parts_of(data)
    if parts is None:
        yield name, data
        return
    for key, value in parts:
        yield from named_leaves(value, ".".join(filter(None, (name, str(key)))))
