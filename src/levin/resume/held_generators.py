"""The random generators that data sets, samplers, transforms and the like hold, found by searching what they refer to."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import Any

import torch

from levin.utilities.rng_states import (
    bytes_tensor,
    pack_arrays,
    pack_python,
    tensor_bytes,
    unpack_arrays,
    unpack_python,
)

Path = tuple[str | int, ...]

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
    return {path: (kind, _READ[kind](obj)) for path, obj in generators.items() if (kind := _kind(obj)) is not None}


def write_generators(root: object, states: Mapping[Path, tuple[str, object]], leave_out: Collection[int] = ()) -> None:
    """Set the generators that ``root`` holds to ``states``, as :func:`read_generators` returned them.

    A generator that is not there yet, because its owner makes it when first used, is made.
    """
    present = find_generators(root, leave_out) if states else {}
    for path, (kind, state) in states.items():
        generator = present.get(path)
        if generator is None or _kind(generator) != kind:
            generator = _NEW[kind](state)
            if not _put(root, path, generator):
                continue
        _WRITE[kind](generator, state)


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
    leaves = (
        str,
        bytes,
        int,
        float,
        type,
        ModuleType,
        FunctionType,
        torch.Tensor,
        torch.dtype,
        torch.device,
        type(None),
    )
    return issubclass(kind, leaves)


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


class _ByKind(dict[str, Callable[..., Any]]):
    """The functions for each kind of generator; those of numpy's bit generators share one."""

    def __missing__(self, kind: str) -> Callable[..., object]:
        return self["numpy"]


def _write_numpy(generator: Any, state: Any) -> None:
    generator.bit_generator.state = unpack_arrays(state)


def _new_numpy(state: Any) -> Any:
    import numpy

    return numpy.random.Generator(getattr(numpy.random, state["bit_generator"])())


def _new_random_state(state: object) -> object:
    import numpy

    return numpy.random.RandomState(0)


def _new_torch(state: Any) -> torch.Generator:
    return torch.Generator(device=state[0])


_READ = _ByKind(
    {
        "torch": lambda generator: (str(generator.device), tensor_bytes(generator.get_state())),
        "python": lambda generator: pack_python(generator.getstate()),
        "numpy": lambda generator: pack_arrays(generator.bit_generator.state),
        "numpy.RandomState": lambda generator: pack_arrays(generator.get_state(legacy=False)),
    }
)
_WRITE = _ByKind(
    {
        "torch": lambda generator, state: generator.set_state(bytes_tensor(state[1])),
        "python": lambda generator, state: generator.setstate(unpack_python(state)),
        "numpy": _write_numpy,
        "numpy.RandomState": lambda generator, state: generator.set_state(unpack_arrays(state)),
    }
)
_NEW = _ByKind(
    {
        "torch": _new_torch,
        "python": lambda state: random.Random(0),
        "numpy": _new_numpy,
        "numpy.RandomState": _new_random_state,
    }
)
