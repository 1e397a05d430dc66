"""The random generators that data sets, samplers, transforms and the like hold, found by searching what they refer to."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from levin.utilities.rng_states import (
    bytes_tensor,
    pack_arrays,
    pack_python,
    tensor_bytes,
    unpack_arrays,
    unpack_python,
)
from levin.utilities.types import StateDict

Path = tuple[str | int, ...]

_LEAVES = (str, bytes, int, float, type, ModuleType, FunctionType, torch.Tensor, torch.dtype, torch.device, type(None))
_MAX_DEPTH = 6
_MAX_OBJECTS = 1000
_MAX_ITEMS = 64


def find_generators(root: object, leave_out: Collection[int] = ()) -> dict[Path, object]:
    """Return the generators that ``root`` and what it refers to hold, by the way to them.

    Args:
        root: A data set, sampler, transform or the like. Its attributes, lists, tuples, dicts and partial functions
            are searched to a limited depth.
        leave_out: ``id()`` of objects not to look into.

    Returns:
        Generators of torch, numpy and python's ``random.Random``, other than the global ones.

    Example:
        >>> from types import SimpleNamespace
        >>> find_generators(SimpleNamespace(name="data", rng=random.Random(0))).keys()
        dict_keys([('rng',)])
    """
    found: dict[Path, object] = {}
    seen = {*leave_out, *_global_ids()}
    level: list[tuple[Path, object]] = [((), root)]
    for _ in range(_MAX_DEPTH):
        following: list[tuple[Path, object]] = []
        for path, obj in level:
            if id(obj) in seen or len(seen) > _MAX_OBJECTS:
                continue
            seen.add(id(obj))
            if _family(_of_type(obj)) is not None:
                if _kind(obj) is not None:
                    found[path] = obj
            else:
                for key, child in _children(obj):
                    if not _is_leaf(_of_type(child)):
                        following.append(((*path, key), child))
        level = following
    return found


def read_generators(generators: Mapping[Path, object]) -> dict[Path, tuple[str, object]]:
    """Return the kind and state of each generator that :func:`find_generators` found."""
    return {path: (kind, _of(kind).read(obj)) for path, obj in generators.items() if (kind := _kind(obj)) is not None}


def write_generators(root: object, states: Mapping[Path, tuple[str, object]], leave_out: Collection[int] = ()) -> None:
    """Set the generators that ``root`` holds to ``states``, as :func:`read_generators` returned them.

    A generator that is not there yet, because its owner makes it when first used, is made.
    """
    present = find_generators(root, leave_out) if states else {}
    for path, (kind, state) in states.items():
        generator = present.get(path)
        if generator is None or _kind(generator) != kind:
            generator = _of(kind).new(state)
            if not _put(root, path, generator):
                continue
        _of(kind).write(generator, state)


def _put(root: object, path: Path, generator: object) -> bool:
    owner = root
    for key in path[:-1]:
        owner = dict(_children(owner)).get(key)
    if not path or not isinstance(path[-1], str) or not hasattr(owner, "__dict__"):
        return False
    if vars(owner).get(path[-1]) is not None:
        return False
    vars(owner)[path[-1]] = generator
    return True


def _global_ids() -> set[int]:
    ids = {id(torch.default_generator), id(getattr(random, "_inst", None))}
    module = sys.modules.get("numpy.random")
    if module is not None:
        ids.add(id(module.get_bit_generator()))
        ids.add(id(getattr(getattr(module, "mtrand", None), "_rand", None)))
    return ids


# The search runs at the beginning of every epoch, so what a type says is remembered.
_of_type: Callable[[object], object] = type  # mypy does not take a `type[Any]` for hashable


@functools.lru_cache(maxsize=4096)
def _is_leaf(kind: type) -> bool:
    return issubclass(kind, _LEAVES)


def _children(obj: object) -> Iterator[tuple[str | int, object]]:
    if _is_leaf(_of_type(obj)):
        return
    if isinstance(obj, dict):
        if len(obj) <= _MAX_ITEMS:
            yield from ((key, value) for key, value in obj.items() if isinstance(key, (str, int)))
        return
    if isinstance(obj, (list, tuple)):
        if len(obj) <= _MAX_ITEMS:
            yield from enumerate(obj)
        return
    if isinstance(obj, functools.partial):
        yield "func", obj.func
        yield "args", obj.args
        yield "keywords", obj.keywords
    bound_to = getattr(obj, "__self__", None)
    if bound_to is not None:
        yield "__self__", bound_to
    try:
        attributes = vars(obj)
    except TypeError:
        return
    yield from list(attributes.items())


@functools.lru_cache(maxsize=4096)
def _family(kind: type) -> str | None:
    if issubclass(kind, torch.Generator):
        return "torch"
    if issubclass(kind, random.Random) and not issubclass(kind, random.SystemRandom):
        return "python"
    module = sys.modules.get("numpy.random")
    if module is not None:
        if issubclass(kind, module.Generator):
            return "numpy"
        if issubclass(kind, module.RandomState):
            return "numpy.RandomState"
    return None


def _kind(obj: Any) -> str | None:
    family = _family(_of_type(obj))
    return f"numpy.{type(obj.bit_generator).__name__}" if family == "numpy" else family


class _Family(NamedTuple):
    """How the generators of one kind are read, set, and made for a state."""

    read: Callable[[Any], object]
    write: Callable[[Any, Any], object]
    new: Callable[[Any], object]


def _write_numpy(generator: Any, state: object) -> None:
    generator.bit_generator.state = unpack_arrays(state)


def _new_numpy(state: StateDict) -> object:
    import numpy

    return numpy.random.Generator(getattr(numpy.random, state["bit_generator"])())


def _new_random_state(state: object) -> object:
    import numpy

    return numpy.random.RandomState(0)


_FAMILIES = {
    "torch": _Family(
        lambda generator: (str(generator.device), tensor_bytes(generator.get_state())),
        lambda generator, state: generator.set_state(bytes_tensor(state[1])),
        lambda state: torch.Generator(device=state[0]),
    ),
    "python": _Family(
        lambda generator: pack_python(generator.getstate()),
        lambda generator, state: generator.setstate(unpack_python(state)),
        lambda state: random.Random(0),
    ),
    "numpy": _Family(lambda generator: pack_arrays(generator.bit_generator.state), _write_numpy, _new_numpy),
    "numpy.RandomState": _Family(
        lambda generator: pack_arrays(generator.get_state(legacy=False)),
        lambda generator, state: generator.set_state(unpack_arrays(state)),
        _new_random_state,
    ),
}


def _of(kind: str) -> _Family:
    # Those of numpy's bit generators have one way.
    return _FAMILIES.get(kind, _FAMILIES["numpy"])
