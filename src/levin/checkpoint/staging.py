"""A consistent copy of a tree of tensors, made fast enough that training hardly notices.

Each storage is copied once into one reusable block of host memory, and everything else is pickled at once. Turning the
copy into a file is left to another thread.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import pickle
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from levin.checkpoint.pickling import UNPICKLABLE, raise_explained
from levin.utilities.processors import count_processors

_ALIGNMENT = 64
# Below this, handing a copy to another thread costs more than it gains.
_PARALLEL_COPY_BYTES = 2**18
# Long enough that the system copies past the caches, short enough that no thread waits long for the last piece.
_PIECE_BYTES = 2**25
_MAX_COPIERS = 8


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
        pickled: The tree, with a number in the place of each plain tensor.
        tensors: These tensors.
        memory: Where the copies of their storages are.
        events: What to wait for until the copies from devices have arrived.
        taken_s: When it was made, in seconds since the epoch.
    """

    pickled: bytes
    tensors: list[_StagedTensor]
    memory: memoryview
    events: list[torch.cuda.Event] = field(default_factory=list)
    taken_s: float = field(default_factory=time.time)

    def realize(self) -> Any:
        """Wait for the copies and return the tree with tensors, on the CPU, whose memory is that of the copies."""
        for event in self.events:
            event.synchronize()
        return _Restorer(self).load()


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
        file = io.BytesIO()
        copier = _Copier(file)
        try:
            copier.dump(obj)
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
        events = self._block.copy_in(storages, self._helpers)
        return Snapshot(file.getvalue(), copier.tensors, self._block.view, events)

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

    def copy_in(self, storages: list[_StagedStorage], helpers: ThreadPoolExecutor) -> list[torch.cuda.Event]:
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
    return min(count_processors(), _MAX_COPIERS)


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


class _Copier(pickle.Pickler):
    """Pickles a tree without its plain tensors, and collects the storages that have to be copied.

    Args:
        file: Where to.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.storages: dict[int, _StagedStorage] = {}
        self.tensors: list[_StagedTensor] = []

    def reducer_override(self, obj: object) -> Any:
        """Return what stands for a plain tensor; not called for containers and plain values."""
        if type(obj) is not torch.Tensor or not _is_plain(obj):
            return NotImplemented
        storage = obj.untyped_storage()
        staged = self.storages.get(storage._cdata)
        if staged is None:
            staged = self.storages[storage._cdata] = _StagedStorage(storage)
        offset: Any = obj.storage_offset()
        self.tensors.append(_StagedTensor(staged, obj.dtype, offset, obj.size(), obj.stride(), obj.requires_grad))
        return _tensor_at, (len(self.tensors) - 1,)


def _tensor_at(number: int) -> torch.Tensor:
    """Stand in a pickle for the method of :class:`_Restorer`."""
    raise NotImplementedError


class _Restorer(pickle.Unpickler):
    """Reads what this process has pickled itself, with tensors over the memory of the snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(io.BytesIO(snapshot.pickled))
        self._snapshot = snapshot
        self._storages: dict[int, torch.UntypedStorage] = {}

    def find_class(self, module: str, name: str) -> object:
        return self._tensor if (module, name) == (__name__, _tensor_at.__name__) else super().find_class(module, name)

    def _tensor(self, number: int) -> torch.Tensor:
        staged = self._snapshot.tensors[number]
        storage = staged.storage
        over = self._storages.get(id(storage))
        if over is None:
            data = self._snapshot.memory[storage.offset : storage.offset + storage.size]
            over = self._storages[id(storage)] = _storage_over(data)
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
