"""A consistent copy of a tree of tensors, made fast enough that training hardly notices.

The containers are copied, each storage is copied once into one reusable block of host memory, and anything that is
neither a container nor a plain value is pickled at once. Turning the copy into a file is left to another thread.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import pickle
import time
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from levin.checkpoint.pickling import UNPICKLABLE, raise_explained
from levin.utilities.types import Tree

_ALIGNMENT = 64
# Below this, handing a copy to another thread costs more than it gains.
_PARALLEL_COPY_BYTES = 2**18
# Long enough that the system copies past the caches, short enough that no thread waits long for the last piece.
_PIECE_BYTES = 2**25
_MAX_COPIERS = 8
_IMMUTABLE = frozenset(
    (int, float, str, bool, bytes, complex, type(None), torch.dtype, torch.device, torch.Size, torch.layout)
)


class _StagedStorage:
    """The copy of a storage in host memory, or what will be one."""

    __slots__ = ("offset", "size", "source")

    def __init__(self, source: torch.UntypedStorage) -> None:
        self.source: torch.UntypedStorage | None = source
        self.size: int = source.nbytes()
        self.offset = 0


class _StagedTensor(NamedTuple):
    """What a plain tensor is but for its bytes, which are in a :class:`_StagedStorage`."""

    storage: _StagedStorage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


@dataclass
class Snapshot:
    """A copy of a tree, with its tensors in host memory.

    Args:
        tree: Copies of the containers, with stand-ins for everything that can change.
        memory: Where the copies of the storages are.
        events: What to wait for until the copies from devices have arrived.
        taken_s: When it was made, in seconds since the epoch.
    """

    tree: Tree
    memory: memoryview
    events: list[Any] = field(default_factory=list)
    taken_s: float = field(default_factory=time.time)

    def realize(self) -> Any:
        """Wait for the copies and return the tree with tensors, on the CPU, whose memory is that of the copies."""
        for event in self.events:
            event.synchronize()
        return _Restorer(self.memory).restore(self.tree)


class Stager:
    """Makes snapshots in a block of host memory that is kept from one to the next.

    There is one block, so a snapshot has to be done with before the next one is made.

    Example:
        >>> weight = torch.zeros(2)
        >>> snapshot = Stager().stage({"weight": weight})
        >>> _ = weight.add_(1)
        >>> snapshot.realize()
        {'weight': tensor([0., 0.])}
    """

    def __init__(self) -> None:
        self._block: _Block | None = None
        self._helpers: ThreadPoolExecutor | None = None

    def stage(self, obj: object) -> Snapshot:
        """Return a snapshot of ``obj``.

        Copies from CUDA devices are only begun; they are done in the order of the device's work, so that what the
        caller does to the tensors next comes after them.

        Raises:
            TypeError, AttributeError or pickle.PicklingError: Something in ``obj`` cannot be pickled.
        """
        copier = _Copier()
        try:
            tree = copier.copy(obj)
        except UNPICKLABLE as error:
            raise_explained(error, obj)
        storages = list(copier.storages.values())
        total, is_pinned = 0, False
        for storage in storages:
            assert storage.source is not None
            storage.offset = -(-total // _ALIGNMENT) * _ALIGNMENT
            total = storage.offset + storage.size
            is_pinned = is_pinned or storage.source.device.type == "cuda"
        if self._block is None or self._block.size < total or (is_pinned and not self._block.is_pinned):
            self._block = None  # the old one goes before the new one comes
            self._block = _Block(total, is_pinned)
        if self._helpers is None:
            self._helpers = ThreadPoolExecutor(_num_copiers(), "levin-copy")
        return Snapshot(tree, self._block.view, self._block.copy_in(storages, self._helpers))

    def release(self) -> None:
        """Give the memory and the threads back."""
        self._block = None
        if self._helpers is not None:
            self._helpers.shutdown()
            self._helpers = None


class _Block:
    """A block of host memory; page-locked when devices copy into it."""

    def __init__(self, size: int, is_pinned: bool) -> None:
        self.size = size
        self.is_pinned = is_pinned
        self.tensor: torch.Tensor | None = None
        if is_pinned:
            self.tensor = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.view = memoryview((ctypes.c_char * size).from_address(self.tensor.data_ptr())).cast("B")
        else:
            memory = mmap.mmap(-1, max(size, 1))
            # First use of small pages, one fault each, would take many times as long as the copy.
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view)) if size else 0

    def copy_in(self, storages: list[_StagedStorage], helpers: ThreadPoolExecutor) -> list[Any]:
        """Copy each storage to its offset; return what to wait for until all is there."""
        devices: set[torch.device] = set()
        address, move = self.address, ctypes.memmove
        long_moves: deque[tuple[int, int, int]] = deque()
        sources = []  # whose memory has to stay until it is copied
        for storage in storages:
            source, size = storage.source, storage.size
            storage.source = None
            assert source is not None
            if source.device.type != "cpu":
                if size:
                    self._copy_from_device(source, storage.offset, devices)
            elif size < _PARALLEL_COPY_BYTES:
                move(address + storage.offset, source.data_ptr(), size)
            else:
                sources.append(source)
                start, target = source.data_ptr(), address + storage.offset
                for piece in range(0, size, _PIECE_BYTES):
                    long_moves.append((target + piece, start + piece, min(size - piece, _PIECE_BYTES)))
        _move_all(long_moves, helpers)
        events = []
        for device in devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events.append(event)
        return events

    def _copy_from_device(self, source: torch.UntypedStorage, offset: int, devices: set[torch.device]) -> None:
        if source.device.type == "cuda" and self.tensor is not None:
            target = self.tensor[offset : offset + source.nbytes()]
            target.copy_(_as_bytes(source), non_blocking=True)
            devices.add(source.device)
        else:
            target = torch.frombuffer(self.view[offset : offset + source.nbytes()], dtype=torch.uint8)
            target.copy_(_as_bytes(source))


def _num_copiers() -> int:
    """Return how many threads copy: training waits for them, so that its processors are free."""
    num_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(num_cpus, _MAX_COPIERS)


def _move_all(moves: deque[tuple[int, int, int]], helpers: ThreadPoolExecutor) -> None:
    """Copy ``(target, source, size)`` each, in this thread and in those that come to help.

    Everyone takes the next one from the row, so that a helper that the system is slow to wake holds nobody up.
    """

    def work() -> None:
        move = ctypes.memmove  # lets other threads run meanwhile
        while True:
            try:
                target, source, size = moves.popleft()
            except IndexError:
                return
            move(target, source, size)

    num_helpers = min(len(moves), _num_copiers()) - 1
    started = [helpers.submit(work) for _ in range(num_helpers)]
    work()
    for helper in started:
        # One that has not begun finds nothing to do any more.
        if not helper.cancel():
            helper.result()


class _Pickled:
    """Something other than a container or a plain value, pickled when the snapshot was made; its tensors are staged."""

    __slots__ = ("data", "tensors")

    def __init__(self, value: object, copier: _Copier) -> None:
        self.tensors: list[Any] = []
        buffer = io.BytesIO()
        _Pickler(buffer, self.tensors, copier).dump(value)
        self.data = buffer.getvalue()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[object], copier: _Copier) -> None:
        super().__init__(file, protocol=2)
        self._tensors = tensors
        self._copier = copier

    def persistent_id(self, obj: object) -> int | None:
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return None
        self._tensors.append(self._copier.copy_plain(obj))
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    # It reads what this process has pickled itself.
    def __init__(self, pickled: _Pickled, restorer: _Restorer) -> None:
        super().__init__(io.BytesIO(pickled.data))
        self._tensors = pickled.tensors
        self._restorer = restorer

    def persistent_load(self, pid: Any) -> Any:
        return self._restorer.restore(self._tensors[pid])


class _Copier:
    """Copies containers, and collects the storages that have to be copied."""

    def __init__(self) -> None:
        self.storages: dict[int, _StagedStorage] = {}
        self._done: dict[int, Any] = {}

    def copy(self, value: Tree) -> Tree:
        kind = type(value)
        if kind is torch.Tensor:
            return self._copy_tensor(value)
        if kind in _IMMUTABLE:
            return value
        known = self._done.get(id(value))
        if known is not None:
            return known
        if kind is dict or kind is OrderedDict:
            result: Any = kind()
            self._done[id(value)] = result
            for key, item in value.items():
                result[key] = self.copy(item)
            # A module's state_dict carries the versions of the layers as an attribute.
            if kind is OrderedDict and vars(value):
                vars(result).update(self.copy(vars(value)))
            return result
        if kind is list:
            result = self._done[id(value)] = []
            result.extend(value if _IMMUTABLE.issuperset(map(type, value)) else map(self.copy, value))
            return result
        # The state of python's random numbers is a tuple of 625 numbers.
        if kind is tuple and _IMMUTABLE.issuperset(map(type, value)):
            return value
        result = tuple(map(self.copy, value)) if kind is tuple else _Pickled(value, self)
        self._done[id(value)] = result
        return result

    def _copy_tensor(self, tensor: torch.Tensor) -> object:
        # Called for each tensor of a model while training waits: no more than is needed.
        known = self._done.get(id(tensor))
        if known is not None:
            return known
        result = self._done[id(tensor)] = self.copy_plain(tensor) if _is_plain(tensor) else _Pickled(tensor, self)
        return result

    def copy_plain(self, tensor: torch.Tensor) -> _StagedTensor:
        """Return what stands for a plain tensor; its storage is copied later, once."""
        storage = tensor.untyped_storage()
        staged = self.storages.get(storage._cdata)
        if staged is None:
            staged = self.storages[storage._cdata] = _StagedStorage(storage)
        offset: Any = tensor.storage_offset()
        return _StagedTensor(staged, tensor.dtype, offset, tensor.size(), tensor.stride(), tensor.requires_grad)


class _Restorer:
    """Puts tensors over the memory of a snapshot in the place of their stand-ins."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._done: dict[int, Any] = {}

    def restore(self, value: Tree) -> Tree:
        kind = type(value)
        if kind not in (dict, OrderedDict, list, tuple, _StagedTensor, _Pickled):
            return value
        if kind is tuple and _IMMUTABLE.issuperset(map(type, value)):
            return value
        if id(value) in self._done:
            return self._done[id(value)]
        if kind is _StagedTensor:
            result: Any = self._tensor(value)
        elif kind is _Pickled:
            result = _Unpickler(value, self).load()
        elif kind is tuple:
            result = tuple(map(self.restore, value))
        else:
            result = self._done[id(value)] = value
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                value[key] = self.restore(item)
            if kind is OrderedDict:
                for key, item in list(vars(value).items()):
                    setattr(value, key, self.restore(item))
        self._done[id(value)] = result
        return result

    def _tensor(self, staged: _StagedTensor) -> torch.Tensor:
        storage = staged.storage
        over = self._storages.get(id(storage))
        if over is None:
            over = self._storages[id(storage)] = _storage_over(
                self._memory[storage.offset : storage.offset + storage.size]
            )
        tensor = torch.empty(0, dtype=staged.dtype).set_(over, staged.offset, staged.size, staged.stride)
        return tensor.requires_grad_(staged.requires_grad)


def _storage_over(data: memoryview) -> torch.UntypedStorage:
    """Return a storage that uses the memory of ``data``."""
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Return whether size, strides and storage say everything about an instance of ``torch.Tensor`` itself."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg() or tensor.is_nested)
        and not tensor._backward_hooks
        and not tensor.__dict__
    )


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
