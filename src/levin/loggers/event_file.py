"""TensorBoard's event files, written directly.

TensorBoard's own writer hands every record to a thread that opens the file anew for it. Here a record is one system
call in the caller's thread, so what was logged is on its way to the disk when the call returns, for a fraction of the
price.

A record is ``length (8 bytes) | crc(length) | data | crc(data)``, little-endian, where ``data`` is a serialized
``Event`` and ``crc`` the masked CRC-32C.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Optional

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78
_ALL_ONES = 0xFFFFFFFF
_MANY_BYTES = 4096
"""From this size on the checksum is computed with numpy."""
_NUM_LANES = 256
_HEADER = struct.Struct("<Q")
_CRC = struct.Struct("<I")


@lru_cache(maxsize=1)
def _table() -> tuple[int, ...]:
    entries = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        entries.append(value)
    return tuple(entries)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) checksum of ``data``.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    if len(data) >= _MANY_BYTES:
        return _crc32c_of_many(data)
    table = _table()
    crc = _ALL_ONES
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ _ALL_ONES


def _crc32c_of_many(data: bytes) -> int:
    """Compute the checksums of 256 stretches side by side and join them.

    Without the ones at the start and at the end the checksum is linear: crc(a | b) = crc(a | zeros) xor crc(zeros | b).
    """
    import numpy as np

    table = np.array(_table(), dtype=np.uint32)
    length = -(-len(data) // _NUM_LANES)
    # Zeros in front leave a checksum that starts at zero as it is.
    padded = np.zeros(length * _NUM_LANES, dtype=np.uint8)
    padded[len(padded) - len(data) :] = np.frombuffer(data, dtype=np.uint8)
    first = len(padded) - len(data)
    padded[first : first + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.reshape(_NUM_LANES, length).T).astype(np.uint32)
    crc = np.zeros(_NUM_LANES, dtype=np.uint32)
    for column in columns:
        crc = table[(crc ^ column) & 0xFF] ^ (crc >> 8)
    shift = _shift_by(length, table)
    while len(crc) > 1:
        crc = _apply(shift, crc[0::2]) ^ crc[1::2]
        shift = _apply(shift, shift)
    return int(crc[0]) ^ _ALL_ONES


def _shift_by(num_bytes: int, table: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Return what ``num_bytes`` zero bytes make of a checksum, as the images of its 32 bits."""
    import numpy as np

    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    result, power = bits, table[bits & 0xFF] ^ (bits >> 8)
    while num_bytes:
        if num_bytes & 1:
            result = _apply(power, result)
        power = _apply(power, power)
        num_bytes >>= 1
    return result


def _apply(images: npt.NDArray[np.uint32], values: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    import numpy as np

    is_set = (values[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    joined: npt.NDArray[np.uint32] = np.bitwise_xor.reduce(is_set * images, axis=1)
    return joined


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ALL_ONES


def frame(data: bytes) -> bytes:
    """Return ``data`` as one record."""
    header = _HEADER.pack(len(data))
    return b"".join((header, _CRC.pack(_masked(crc32c(header))), data, _CRC.pack(_masked(crc32c(data)))))


class EventFile:
    """An event file in a local directory; has the methods of TensorBoard's ``EventFileWriter``.

    Args:
        log_dir: The directory; it is created.
        filename_suffix: Text at the end of the file's name.
    """

    def __init__(self, log_dir: str, filename_suffix: str = "") -> None:
        self._log_dir: str = log_dir
        self._suffix: str = filename_suffix
        self._descriptor: Optional[int] = None
        self._close: Optional[weakref.finalize[..., EventFile]] = None
        self.reopen()

    def get_logdir(self) -> str:
        """Return the directory."""
        return self._log_dir

    def add_event(self, event: Any) -> None:
        """Write one ``Event``.

        Raises:
            OSError: The disk is full, or the file was closed.
        """
        if self._descriptor is None:
            raise OSError(f"The event file in {self._log_dir!r} is closed. Call reopen() to go on in a new one.")
        data = frame(event.SerializeToString())
        while data:
            data = data[os.write(self._descriptor, data) :]

    def flush(self) -> None:
        """Do nothing: every event is written at once."""

    def close(self) -> None:
        """Close the file."""
        if self._close is not None:
            self._close()
        self._descriptor = self._close = None

    def reopen(self) -> None:
        """Begin a new file if this one is closed."""
        if self._descriptor is not None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata

        os.makedirs(self._log_dir, exist_ok=True)
        now = time.time()
        stem = os.path.join(self._log_dir, f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}")
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        for number in itertools.count():
            try:
                self._descriptor = os.open(f"{stem}.{number}{self._suffix}", flags, 0o666)
                break
            except FileExistsError:
                continue
        self._close = weakref.finalize(self, os.close, self._descriptor)
        source = SourceMetadata(writer="levin.loggers.event_file")
        self.add_event(Event(wall_time=now, file_version="brain.Event:2", source_metadata=source))
