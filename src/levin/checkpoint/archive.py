"""The file format of ``torch.save``, taken apart: pickle first, write the bytes later.

``torch.save`` holds the interpreter while it writes. Here the two halves are separate: :func:`pack` pickles an object
and notes which storages it needs, :func:`write_archive` puts the bytes out. The second half does nothing but checksums
and writes of large buffers, during which other threads run, and it may work on a copy of the storages.

The layout is a zip file with uncompressed records (``data.pkl``, a few short ones, then one for each storage), every
one aligned to 64 bytes, or to a page where the storages are large, described twice (in front of it and in the directory
at the end) and with its CRC-32.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import pickle
import struct
import sys
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# As torch.save does it, and where that costs at most one percent of the size: then memory can go to the disk as it is.
_ALIGNMENT, _LARGE_ALIGNMENT = 64, 4096
_ZIP64 = 0xFFFFFFFF
_ROOT = "archive"
# Long enough that the interpreter is free most of the time, short enough that checksum and write share the cache.
_CHUNK_BYTES = 4 * 2**20
_UTF8_NAME = 0x0800
_CHECKSUM_FOLLOWS_DATA = 0x0008

Buffer = bytes | memoryview


@dataclass(frozen=True)
class Archive:
    """A pickled object and the storages that it refers to.

    Args:
        pickled: The content of ``data.pkl``.
        storages: The storages, or copies of their bytes, in the order of their keys.
    """

    pickled: bytes
    storages: tuple[torch.UntypedStorage | StagedStorage, ...]

    @property
    def num_bytes(self) -> int:
        """Size of all storages together."""
        return sum(storage.nbytes() for storage in self.storages)

    @property
    def alignment(self) -> int:
        """The positions of the storages in the file are multiples of this many bytes."""
        is_large = self.num_bytes >= 100 * _LARGE_ALIGNMENT * len(self.storages) > 0
        return _LARGE_ALIGNMENT if is_large else _ALIGNMENT


class StagedStorage:
    """The copy of a storage in host memory, or what will be one."""

    __slots__ = ("data", "location", "offset", "size", "source")

    def __init__(self, source: torch.UntypedStorage) -> None:
        self.source: torch.UntypedStorage | None = source
        self.size: int = source.nbytes()
        self.location: Any = "cpu" if source.device.type == "cpu" else torch.serialization.location_tag(source)
        self.offset = 0
        self.data = memoryview(b"")

    def nbytes(self) -> int:
        """Return the size in bytes."""
        return self.size


class StagedTensor(NamedTuple):
    """What a plain tensor is but for its bytes, which are in a :class:`StagedStorage`."""

    storage: StagedStorage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool


def pack(
    obj: object, staged: Mapping[int, StagedStorage] | None = None, pause: Callable[[], None] | None = None
) -> Archive:
    """Pickle ``obj`` and collect the storages of its tensors, without a copy of their content.

    Args:
        obj: Anything that ``torch.save`` takes; also with :class:`StagedTensor` in the place of tensors.
        staged: Maps addresses in host memory to the staged storages that are there.
        pause: Called now and then.

    Raises:
        TypeError, AttributeError or pickle.PicklingError: Something in ``obj`` cannot be pickled.

    Example:
        >>> archive = pack({"weight": torch.zeros(3)})
        >>> archive.num_bytes
        12
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, staged or {}, pause)
    pickler.dump(obj)
    return Archive(buffer.getvalue(), tuple(pickler.storages))


def unpack(archive: Archive) -> Any:
    """Return the object of an archive that :func:`pack` made; its tensors use the archive's storages."""
    return _Unpickler(archive).load()


def write_archive(archive: Archive, write: Callable[[Buffer], Any]) -> int:
    """Write a file that ``torch.load`` reads.

    Args:
        archive: What to write. Storages on a device are fetched one after the other.
        write: Called with one piece after the other.

    Returns:
        The size of the file in bytes.
    """
    alignment = archive.alignment
    out = _ZipWriter(write, alignment)
    out.record("data.pkl", archive.pickled)
    out.record(".format_version", b"1")
    out.record(".storage_alignment", str(alignment).encode())
    out.record("byteorder", sys.byteorder.encode())
    for key, storage in enumerate(archive.storages):
        if isinstance(storage, StagedStorage):
            out.record(f"data/{key}", storage.data)
        else:
            # The name keeps the memory alive for as long as the view on it is in use.
            on_host = storage if storage.device.type == "cpu" else storage.cpu()
            out.record(f"data/{key}", memory_of(on_host))
    out.record("version", b"3\n")
    out.record(".data/serialization_id", out.fingerprint())
    return out.close()


def memory_of(storage: torch.UntypedStorage) -> memoryview:
    """Return the bytes of a storage in host memory; the view does not keep the storage alive."""
    num_bytes = storage.nbytes()
    if num_bytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * num_bytes).from_address(storage.data_ptr())).cast("B")


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether size, strides and storage say everything about an instance of ``torch.Tensor`` itself."""
    return (
        tensor.dtype in STORAGE_TYPES
        and tensor.layout is torch.strided
        and (tensor.is_cpu or tensor.is_cuda)
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor._backward_hooks
        and not tensor.__dict__
        and not tensor.is_nested
    )


@contextlib.contextmanager
def explained_pickling(obj: object) -> Iterator[None]:
    """Say in the message of an error from pickling ``obj`` which part of it is at fault."""
    try:
        yield
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        where = _find_unpicklable(obj)
        if not where:
            raise
        message = f"{where} cannot be saved: {error}. Remove it, or replace it by something that can be pickled."
        raise type(error)(message) from error


class _Token:
    """Stands for a storage while a plain tensor is pickled."""

    __slots__ = ("persistent_id",)

    def __init__(self, persistent_id: tuple[Any, ...]) -> None:
        self.persistent_id = persistent_id


class _Pickler(pickle.Pickler):
    """Pickles tensors by reference to their storages, as ``torch.save`` does."""

    def __init__(
        self, file: io.BytesIO, staged: Mapping[int, StagedStorage], pause: Callable[[], None] | None = None
    ) -> None:
        super().__init__(file, protocol=2)
        self.storages: list[torch.UntypedStorage | StagedStorage] = []
        self._staged = staged
        self._pause = pause
        self._keys: dict[int, str] = {}
        self._dtypes: dict[int, torch.dtype] = {}

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        kind = type(obj)
        if kind is _Token:
            token: _Token = obj
            return token.persistent_id
        if kind is torch.storage.TypedStorage:
            storage_type = getattr(torch, obj._pickle_storage_type())
            return self._refer(obj._untyped_storage, obj.dtype, storage_type, obj._size())
        if kind is torch.storage.UntypedStorage:
            return self._refer(obj, torch.uint8, torch.UntypedStorage, obj.nbytes())
        return None

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is StagedTensor:
            storage, offset, size, stride = obj.storage, obj.offset, obj.size, obj.stride
        elif kind is torch.Tensor and is_plain(obj):
            # The general way through Tensor.__reduce_ex__ takes more than twice the time and gives the same bytes.
            storage, offset, size, stride = obj.untyped_storage(), obj.storage_offset(), obj.size(), obj.stride()
        else:
            return NotImplemented
        if self._pause is not None:
            self._pause()
        dtype = obj.dtype
        numel = storage.nbytes() // dtype.itemsize
        token = _Token(self._refer(storage, dtype, STORAGE_TYPES[dtype], numel))
        args: tuple[Any, ...] = (token, offset, tuple(size), stride, obj.requires_grad, OrderedDict())
        return torch._utils._rebuild_tensor_v2, args

    def _refer(
        self, storage: torch.UntypedStorage | StagedStorage, dtype: torch.dtype, kind: Any, numel: int
    ) -> tuple[Any, ...]:
        if not isinstance(storage, StagedStorage):
            storage = self._staged.get(storage.data_ptr(), storage)
        if isinstance(storage, StagedStorage):
            identity, location = id(storage), storage.location
            address = identity if storage.size else 0
        else:
            identity, location = storage._cdata, torch.serialization.location_tag(storage)
            address = storage.data_ptr()
        if address != 0 and self._dtypes.setdefault(address, dtype) != dtype:
            raise RuntimeError(
                f"Two tensors that share their memory have different types ({self._dtypes[address]} and {dtype}), "
                "which a file cannot express. Clone one of them."
            )
        key = self._keys.get(identity)
        if key is None:
            key = self._keys[identity] = str(len(self.storages))
            self.storages.append(storage)
        return "storage", kind, key, location, numel


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: Archive) -> None:
        super().__init__(io.BytesIO(archive.pickled))
        self._storages = archive.storages
        self._typed: dict[str, torch.storage.TypedStorage] = {}

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        _, kind, key, _, _ = pid
        if key not in self._typed:
            storage = self._storages[int(key)]
            if isinstance(storage, StagedStorage):
                storage = _storage_over(storage.data)
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind._dtype  # the public one warns
            self._typed[key] = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        return self._typed[key]


def _storage_over(data: memoryview) -> torch.UntypedStorage:
    """Return a storage that uses the memory of ``data``."""
    if not data:
        return torch.UntypedStorage(0)
    return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()


def _storage_types() -> dict[torch.dtype, Any]:
    names = torch.storage._dtype_to_storage_type_map()
    return {dtype: getattr(torch, name) for dtype, name in names.items() if not name.startswith("Q")}


STORAGE_TYPES: Mapping[torch.dtype, Any] = _storage_types()
"""The class of storages that stands for each of the older types of numbers in a pickle."""


def _find_unpicklable(obj: object) -> str:
    """Return the place of the first thing that cannot be pickled, such as ``["hyper_parameters"]["fn"]``."""
    if isinstance(obj, Mapping):
        items: Any = obj.items()
    elif isinstance(obj, Sequence) and not isinstance(obj, (str, bytes)):
        items = enumerate(obj)
    else:
        return ""
    for key, value in items:
        try:
            _Pickler(io.BytesIO(), {}).dump(value)
        except (TypeError, AttributeError, pickle.PicklingError):
            return f"[{key!r}]{_find_unpicklable(value)}"
    return ""


class _ZipWriter:
    """Writes records one after the other, then the directory; nothing is ever gone back to."""

    def __init__(self, write: Callable[[Buffer], Any], alignment: int) -> None:
        self._write = write
        self._alignment = alignment
        self._position = 0
        self._directory: list[bytes] = []
        self._names_crc = 0
        self._data_crc = 0

    def record(self, name: str, data: Buffer) -> None:
        path = f"{_ROOT}/{name}".encode()
        offset, size = self._position, len(data)
        is_large = size >= _ZIP64 or offset >= _ZIP64
        self._put(_local_header(path, size, offset, self._alignment))
        crc = 0
        view = memoryview(data)
        for start in range(0, size, _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            crc = zlib.crc32(chunk, crc)
            self._put(chunk)
        if size:
            self._put(struct.pack("<4sIQQ" if is_large else "<4sIII", b"PK\x07\x08", crc, size, size))
        self._directory.append(_directory_entry(path, size, offset, crc))
        self._names_crc = zlib.crc32(path, self._names_crc)
        self._data_crc = zlib.crc32(crc.to_bytes(4, "little"), self._data_crc)

    def fingerprint(self) -> bytes:
        """Return a short text that depends on the names and the content of all records so far."""
        return f"{self._names_crc:020d}{self._data_crc:020d}".encode()

    def close(self) -> int:
        start, count = self._position, len(self._directory)
        directory = b"".join(self._directory)
        self._put(directory)
        end = self._position
        self._put(
            struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, len(directory), start)
            + struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1)
            + struct.pack(
                "<4sHHHHIIH",
                b"PK\x05\x06",
                0,
                0,
                min(count, 0xFFFF),
                min(count, 0xFFFF),
                min(len(directory), _ZIP64),
                min(start, _ZIP64),
                0,
            )
        )
        return self._position

    def _put(self, data: Buffer) -> None:
        self._write(data)
        self._position += len(data)


def _local_header(path: bytes, size: int, offset: int, alignment: int) -> bytes:
    """Return the header in front of a record, padded so that the data behind it is aligned."""
    zip64 = b""
    if size >= _ZIP64:
        zip64 += struct.pack("<QQ", size, 0)
    if offset >= _ZIP64:
        zip64 += struct.pack("<Q", offset)
    if zip64:
        zip64 = struct.pack("<HH", 1, len(zip64)) + zip64
    padding = -(offset + 30 + len(path) + len(zip64) + 4) % alignment
    extra = zip64 + b"FB" + struct.pack("<H", padding) + b"Z" * padding
    fixed = struct.pack("<4s5H3I2H", b"PK\x03\x04", 0, _flags(size), 0, 0, 0, 0, 0, 0, len(path), len(extra))
    return fixed + path + extra


def _directory_entry(path: bytes, size: int, offset: int, crc: int) -> bytes:
    zip64 = b""
    if size >= _ZIP64:
        zip64 += struct.pack("<QQ", size, size)
    if offset >= _ZIP64:
        zip64 += struct.pack("<Q", offset)
    if zip64:
        zip64 = struct.pack("<HH", 1, len(zip64)) + zip64
    short_size, short_offset, flags = min(size, _ZIP64), min(offset, _ZIP64), _flags(size)
    fixed = struct.pack("<4s6H3I", b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc, short_size, short_size)
    fixed += struct.pack("<5H2I", len(path), len(zip64), 0, 0, 0, 0, short_offset)
    return fixed + path + zip64


def _flags(size: int) -> int:
    return _UTF8_NAME | _CHECKSUM_FOLLOWS_DATA if size else _UTF8_NAME
