"""The states of the global random generators of a process: python's, numpy's, torch's and those of the devices.

A state is made of numbers, strings, bytes and (of devices) tensors, which are quick to read and load with
``weights_only=True``. Every state that levin keeps, hands to another process or writes to a file has this one form.
"""

from __future__ import annotations

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch

from levin.utilities.xla_generator import XLA_GENERATOR

RngStates = dict[str, Any]
PythonState = tuple[int, bytes, "float | None"]

# What every process has; the devices' generators cost a wait for the device and are read only where that may be.
PROCESS: tuple[str, ...] = ("torch", "python", "numpy")
DEVICES: tuple[str, ...] = ("torch.cuda", "torch.xla")

_PYTHON_STATE = struct.Struct("625I")
_NUMPY_BYTES = 624 * 4 + 4  # numpy's MT19937 is 624 words and the position in them


class ProcessRng:
    """Reads and sets the generators of this process; reading takes about 10 us.

    This is done once per batch in workers, hence an object: it remembers numpy's last state, which is slow to read, and
    reads it again only after numbers were drawn.

    Example:
        >>> rng = ProcessRng()
        >>> before = rng.read()
        >>> first = random.random()
        >>> rng.write(before)
        >>> first == random.random()
        True
    """

    def __init__(self) -> None:
        self._numpy_words: bytes | None = None
        self._numpy_state: Any = None

    def read(self, names: Collection[str] = PROCESS) -> RngStates:
        """Return the states of the generators with these names; of numpy only if something imported it."""
        states: RngStates = {}
        if "torch" in names:
            states["torch"] = tensor_bytes(torch.default_generator.get_state())
        if "python" in names:
            states["python"] = _read_python()
        if "numpy" in names:
            numpy_state = self._read_numpy()
            if numpy_state is not None:
                states["numpy"] = numpy_state
        if "torch.cuda" in names and torch.cuda.is_initialized():
            states["torch.cuda"] = torch.cuda.get_rng_state_all()
        if "torch.xla" in names and XLA_GENERATOR.state is not None:
            states["torch.xla"] = XLA_GENERATOR.state
        return states

    def write(self, states: Mapping[str, object]) -> None:
        """Set the generators to ``states``; those that are not in it are left alone."""
        set_rng_states(states)
        self._numpy_words = None

    def _read_numpy(self) -> object:
        module = sys.modules.get("numpy.random")
        if module is None:
            # A generator that nobody has imported has not drawn a number yet.
            return None
        memory = _numpy_memory(module.get_bit_generator())
        words = None if memory is None else memory.raw
        rests = words is not None and words == self._numpy_words
        # A normal number may be waiting (`has_gauss`); taking it changes the state but not the words.
        if not (rests and not self._numpy_state["has_gauss"]):
            self._numpy_words = words
            self._numpy_state = pack_arrays(module.get_state(legacy=False))
        return self._numpy_state


def collect_rng_states(include_cuda: bool = True) -> RngStates:
    """Return the states of the global random generators of this process.

    Args:
        include_cuda: Whether to add the generators of all CUDA devices, and of XLA, if they are in use.

    Returns:
        ``"python"`` and ``"torch"``; ``"numpy"`` when numpy has been imported; ``"torch.cuda"``, one tensor for each device;
        ``"torch.xla"``, a number.

    Example:
        >>> states = collect_rng_states()
        >>> first = torch.rand(1)
        >>> set_rng_states(states)
        >>> bool(first == torch.rand(1))
        True
    """
    return ProcessRng().read(PROCESS + DEVICES if include_cuda else PROCESS)


def set_rng_states(states: Mapping[str, Any]) -> None:
    """Set the generators to what :func:`collect_rng_states` returned; those that are not in it are left alone.

    Args:
        states: Maps the generator's name to its state, which may also be what ``random.getstate``, ``torch.get_rng_state``
            and ``numpy.random.get_state`` return. States of CUDA devices that are not here are ignored.
    """
    if "torch" in states:
        state = states["torch"]
        torch.set_rng_state(state.cpu() if isinstance(state, torch.Tensor) else bytes_tensor(state))
    if "python" in states:
        random.setstate(unpack_python(states["python"]))
    if "numpy" in states:
        import numpy

        numpy.random.set_state(unpack_arrays(states["numpy"]))  # noqa: NPY002  (the user draws from it)
    if "torch.cuda" in states and torch.cuda.is_available():
        for index, state in enumerate(states["torch.cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), index)
    if "torch.xla" in states:
        XLA_GENERATOR.state = states["torch.xla"]


# To read memory through an array that lies on it takes a quarter of a call of ``ctypes.string_at``. These are of the process,
# and not of an object that is copied: a copy of the array has memory of its own.
def _memory(address: int, size: int) -> ctypes.Array[ctypes.c_char]:
    return (ctypes.c_char * size).from_address(address)


@functools.lru_cache(maxsize=1)
def _numpy_memory(bit_generator: Any) -> ctypes.Array[ctypes.c_char] | None:
    if type(bit_generator).__name__ != "MT19937":
        return None
    return _memory(bit_generator.ctypes.state_address, _NUMPY_BYTES)


def _read_python() -> PythonState:
    return _read_python_memory() if _can_read_memory() else pack_python(random.getstate())


@functools.cache
def _can_read_memory() -> bool:
    return sys.implementation.name == "cpython" and _read_python_memory() == pack_python(random.getstate())


@functools.cache
def _python_memory() -> tuple[Any, ctypes.Array[ctypes.c_char]]:
    """Return python's generator and where CPython keeps its state: behind the head of the object."""
    generator: object = getattr(random.getstate, "__self__")  # noqa: B009  (its type is not declared)
    return generator, _memory(id(generator) + object.__basicsize__, _PYTHON_STATE.size)


def _read_python_memory() -> PythonState:
    """Return the packed state from memory, which holds first the position, then the words.

    ``random.getstate`` makes an int of each word and takes ten times as long.
    """
    generator, memory = _python_memory()
    state = memory.raw
    return generator.VERSION, state[4:] + state[:4], generator.gauss_next


def tensor_bytes(state: torch.Tensor) -> bytes:
    """Return a generator's state, a uint8 tensor on the CPU, as bytes."""
    return _memory(state.data_ptr(), state.numel()).raw


def bytes_tensor(state: bytes) -> torch.Tensor:
    """Return bytes as the uint8 tensor that generators take."""
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def pack_python(state: tuple[Any, ...]) -> PythonState:
    """Return the state of a ``random.Random`` with its 625 numbers as bytes."""
    version, words, gauss = state
    return version, _PYTHON_STATE.pack(*words), gauss


def unpack_python(state: tuple[int, Any, float | None]) -> tuple[object, ...]:
    """Undo :func:`pack_python`; the numbers may be a sequence as well."""
    version, words, gauss = state
    return version, _PYTHON_STATE.unpack(words) if isinstance(words, bytes) else tuple(words), gauss


def pack_arrays(value: Any) -> object:
    """Return nested dicts with each numpy array as ``("ndarray", dtype, bytes)``."""
    if isinstance(value, dict):
        return {key: pack_arrays(item) for key, item in value.items()}
    if type(value).__name__ == "ndarray":
        return ("ndarray", value.dtype.str, value.tobytes())
    return value.item() if hasattr(value, "item") else value


def unpack_arrays(value: object) -> Any:
    """Undo :func:`pack_arrays`."""
    if isinstance(value, dict):
        return {key: unpack_arrays(item) for key, item in value.items()}
    if isinstance(value, tuple) and len(value) == 3 and value[0] == "ndarray":
        import numpy

        return numpy.frombuffer(value[2], dtype=value[1]).copy()
    return value
