"""What the pickle inside a checkpoint may refer to.

A pickle names classes and functions and says what to call them with. With ``weights_only=True`` torch accepts tensors
and plain containers; here that list grows by what checkpoints commonly hold and what can do no harm. With
``weights_only=False`` everything that can be imported is called, which is for files of trusted origin alone.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import pathlib
import pickle
import re
import sys
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch

from levin.utilities.attribute_dict import AttributeDict

# Where the classes of other versions of the same names live: old files refer to them.
_LIGHTNING_ROOTS = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric", "lightning_fabric", "lightning_lite")
_ATTRIBUTE_DICTS = ("utilities.parsing.AttributeDict", "utilities.data.AttributeDict")
# Functions and classes that were pickled by accident with the arguments of the Trainer, and mean nothing any more.
_MEANINGLESS = (
    "utilities.argparse._gpus_arg_default",
    "utilities.argparse_utils._gpus_arg_default",
    "utilities.enums._FaultTolerantMode",
)
# Before 1.5 the state of a callback had its class as the key; the name of the class says as much.
_CALLBACKS = {
    f"callbacks.{file}.{name}": name
    for file, names in {
        "early_stopping": ("EarlyStopping",),
        "model_checkpoint": ("ModelCheckpoint",),
        "timer": ("Timer",),
        "finetuning": ("BackboneFinetuning", "BaseFinetuning"),
        "stochastic_weight_avg": ("StochasticWeightAveraging",),
        "gradient_accumulation_scheduler": ("GradientAccumulationScheduler",),
        "lr_monitor": ("LearningRateMonitor",),
    }.items()
    for name in names
}
# Values of hyper-parameters, and factories of defaultdicts; a few bytes of arguments would make some of them fill the
# memory, so they can be referred to and not called.
_REFERENCES: tuple[type, ...] = (bool, bytes, dict, float, int, list, str, tuple)
_LOCK = threading.RLock()  # torch keeps its allow-list in a global variable

Finish = Callable[[Any], Any]


@contextlib.contextmanager
def allowed_globals() -> Iterator[Finish]:
    """Allow ``torch.load(weights_only=True)`` to make the harmless classes that checkpoints hold.

    Yields:
        A function that takes what ``torch.load`` returned and puts in the containers and arrays that could only be
        stood in for while loading.

    Example:
        >>> import io
        >>> file = io.BytesIO()
        >>> torch.save({"hyper_parameters": AttributeDict(lr=0.1)}, file)
        >>> _ = file.seek(0)
        >>> with allowed_globals() as finish:
        ...     checkpoint = finish(torch.load(file, weights_only=True))
        >>> checkpoint["hyper_parameters"].lr
        0.1
    """
    stand_ins = _StandIns()
    given = {
        item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}"
        for item in torch.serialization.get_safe_globals()
    }
    table = {**_plain_classes(), **stand_ins.table()}
    # What the user allowed stays as it is; our stand-ins for numpy do not mix with its own classes.
    has_numpy = any(name.startswith("numpy.") for name in given)
    entries: list[Any] = [
        (target, name)
        for name, target in table.items()
        if name not in given and not (has_numpy and name.startswith("numpy."))
    ]
    with _LOCK, torch.serialization.safe_globals(entries):
        yield stand_ins.finish


def refused_global(message: str) -> str | None:
    """Return the name that torch's unpickler says is not allowed, if that is what it says.

    Example:
        >>> refused_global("Unsupported global: GLOBAL os.system was not an allowed global by default.")
        'os.system'
    """
    match = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message)
    return match.group(1) if match else None


class RedirectingUnpickler(pickle.Unpickler):
    """Makes everything a pickle names, and finds the few classes that have moved."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function ``name`` of ``module``."""
        full_name = f"{module}.{name}"
        for root in _LIGHTNING_ROOTS:
            if full_name.startswith(f"{root}."):
                rest = full_name[len(root) + 1 :]
                if rest in _ATTRIBUTE_DICTS:
                    return AttributeDict
                if rest in _MEANINGLESS:
                    return _meaningless
                if rest in _CALLBACKS:
                    return name
        return super().find_class(module, name)


def redirecting_pickle() -> types.ModuleType:
    """Return a module like ``pickle`` that finds the classes that have moved, for ``torch.load(pickle_module=...)``."""
    module = types.ModuleType("pickle")

    def load(file: Any, **kwargs: Any) -> object:
        return RedirectingUnpickler(file, **kwargs).load()

    vars(module).update(vars(pickle))
    vars(module).update(Unpickler=RedirectingUnpickler, load=load)
    return module


def _meaningless(*_: object) -> None:
    """Stand for a function that no longer exists."""


def _plain_classes() -> dict[str, object]:
    """Return classes whose construction from any arguments has no effect but the object."""
    table: dict[str, object] = {"builtins.frozenset": frozenset, "builtins.slice": slice}
    times = (datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone)
    table |= {f"datetime.{kind.__name__}": kind for kind in times}
    table |= {"argparse.Namespace": argparse.Namespace, "types.SimpleNamespace": types.SimpleNamespace}
    table |= {f"{root}.{rest}": _meaningless for root in _LIGHTNING_ROOTS for rest in _MEANINGLESS}
    table |= {f"{root}.{rest}": name for root in _LIGHTNING_ROOTS for rest, name in _CALLBACKS.items()}
    foreign: type = pathlib.PurePosixPath if os.name == "nt" else pathlib.PureWindowsPath
    for module in ("pathlib", "pathlib._local"):
        own, other = ("WindowsPath", "PosixPath") if os.name == "nt" else ("PosixPath", "WindowsPath")
        table |= {f"{module}.{own}": pathlib.Path, f"{module}.{other}": foreign}
        table |= {
            f"{module}.PurePosixPath": pathlib.PurePosixPath,
            f"{module}.PureWindowsPath": pathlib.PureWindowsPath,
        }
    return table


class _StandIns:
    """Objects that stand for others while the pickle is read.

    torch fills exact dicts and lists only, so that other containers cannot come out of it. numpy's own way to make
    arrays out of bytes and types out of descriptions trusts its input with the memory of the process.
    """

    def __init__(self) -> None:
        self._finishers: dict[int, tuple[object, Callable[[object], object]]] = {}

    def table(self) -> dict[str, object]:
        attribute_dict = self._container(dict, lambda: AttributeDict)
        names = ["levin.utilities.attribute_dict.AttributeDict"]
        names += [f"{root}.{rest}" for root in _LIGHTNING_ROOTS for rest in _ATTRIBUTE_DICTS]
        table: dict[str, object] = dict.fromkeys(names, attribute_dict)
        table["collections.defaultdict"] = self._container(
            dict, lambda factory=None: lambda items: defaultdict(_checked_factory(factory), items)
        )
        table["collections.deque"] = self._container(
            list, lambda items=(), maxlen=None: lambda later: deque([*items, *later], maxlen)
        )
        table |= {f"builtins.{target.__name__}": _Reference(target) for target in _REFERENCES}
        if "numpy" in sys.modules:
            for core in ("numpy.core", "numpy._core"):
                table[f"{core}.multiarray.scalar"] = _numpy_scalar
                table[f"{core}.multiarray._reconstruct"] = _reconstruct
            table["numpy.ndarray"] = _Array
            table["numpy.dtype"] = _Dtype
        return table

    def _container(self, plain: type, make: Callable[..., Callable[[Any], object]]) -> object:
        """Return a class whose instances are plain dicts or lists, which :meth:`finish` turns into the right type."""
        finishers = self._finishers

        def new(cls: type, *args: object) -> object:
            finisher = make(*args)
            result = plain()
            finishers[id(result)] = (result, finisher)
            return result

        return type(plain.__name__, (), {"__new__": new})

    def finish(self, loaded: object) -> object:
        """Return ``loaded`` with the final objects in the place of the stand-ins."""
        return self._finish(loaded, {})

    def _finish(self, value: Any, done: dict[int, object]) -> object:
        kind = type(value)
        if kind is _Reference:
            return value.target
        if kind is _Array:
            return done.setdefault(id(value), value.array)
        if kind not in (dict, list, tuple) and not isinstance(value, dict):
            return value
        if id(value) in done:
            return done[id(value)]
        done[id(value)] = value  # for containers that contain themselves
        if kind is tuple:
            items = tuple(self._finish(item, done) for item in value)
            result: object = value if all(new is old for new, old in zip(items, value, strict=True)) else items
        else:
            pairs: Any = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in list(pairs):
                new = self._finish(item, done)
                if new is not item:
                    value[key] = new
            _, finisher = self._finishers.get(id(value), (None, None))
            result = finisher(value) if finisher is not None else value
        done[id(value)] = result
        return result


def _checked_factory(factory: object) -> Any:
    if isinstance(factory, _Reference):
        return factory.target
    if factory in (None, set, frozenset):
        return factory
    raise pickle.UnpicklingError(f"The default factory {factory!r} of a defaultdict is not allowed.")


class _Reference:
    """Stands for a class that must not be called while the pickle is read."""

    def __init__(self, target: type) -> None:
        self.target = target


class _Dtype:
    """A numpy type, of those whose values are nothing but bytes."""

    def __init__(self, code: object, align: object = False, copy: object = False) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f(?:2|4|8|16)|c(?:8|16|32)|[SU]\d{1,6}", code):
            raise pickle.UnpicklingError(f"The numpy type {code!r} is not allowed.")
        self.code = code
        self.order = "|"

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"The byte order {order!r} of a numpy type is not known.")
        self.order = order

    def resolve(self) -> Any:
        """Return the type itself."""
        import numpy

        return numpy.dtype(f"{self.order}{self.code}")


def _bytes_of(data: object) -> bytes:
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"The content of a numpy array must be bytes, received {type(data).__name__}.")
    return data


def _numpy_scalar(dtype: object, data: Any) -> object:
    import numpy

    if not isinstance(dtype, _Dtype):
        raise pickle.UnpicklingError(f"A numpy scalar must have a numpy type, received {type(dtype).__name__}.")
    kind = dtype.resolve()
    if len(_bytes_of(data)) != kind.itemsize:
        raise pickle.UnpicklingError(f"A numpy scalar of {kind.itemsize} bytes has {len(data)}.")
    return numpy.frombuffer(data, dtype=kind)[0]


class _Array:
    """An array while it is read; :attr:`array` is what it stands for."""

    def __init__(self) -> None:
        self.array: object = None

    def __setstate__(self, state: Any) -> None:
        import numpy

        _, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("A numpy array must have a shape and a type of plain values.")
        flat = numpy.frombuffer(_bytes_of(data), dtype=dtype.resolve())
        self.array = flat.reshape(shape, order="F" if is_fortran else "C").copy(order="A")


def _reconstruct(kind: object, shape: object, code: object) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError(f"Only plain numpy arrays are allowed, received {kind!r}.")
    return _Array()
