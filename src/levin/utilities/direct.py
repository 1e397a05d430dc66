"""Writing a large file without the page cache.

A checkpoint written the usual way is copied into the page cache, where it takes the place of data that training reads,
costs several times the processor time of the copy itself, and may have to wait for the dirty pages of others. Here the
pieces are gathered in one aligned buffer, which goes to the disk as it is (``O_DIRECT``); large pieces that begin with a
page, in memory and in the file, are not even copied into the buffer.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os

_BUFFER_BYTES = 4 * 2**20
_PAGE_BYTES = 4096
# From here on a piece is worth a call of the system.
_LARGE_BYTES = 2**18
# A slice assignment holds the interpreter while it copies; below this that is shorter than the call that does not.
_LONG_COPY_BYTES = 2**16


class DirectFile(io.RawIOBase):
    """A new file that is written from its beginning to its end.

    Files of less than 4 MiB, and those on systems that cannot do without the page cache, are written through it.

    Args:
        descriptor: Of an open file, at its beginning; it stays open.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryFile() as plain, DirectFile(plain.fileno()) as file:
        ...     _ = file.write(b"content")
        ...     file.finish()
        ...     plain.seek(0), plain.read()
        (0, b'content')
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._is_direct: bool | None = None  # not known until the first full buffer
        memory = mmap.mmap(-1, _BUFFER_BYTES)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._buffer = memoryview(memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._size = 0
        self._position = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._position

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]  # what is written here
        """Append ``data``.

        Raises:
            OSError: The disk is full, and so on; it may be about bytes of earlier calls.
        """
        view = memoryview(data).cast("B")
        start, end = self._write_uncopied(view), len(view)
        while start < end:
            count = min(end - start, _BUFFER_BYTES - self._size)
            if count >= _LONG_COPY_BYTES and not view.readonly:
                source = ctypes.addressof(ctypes.c_char.from_buffer(view, start))
                ctypes.memmove(self._address + self._size, source, count)
            else:
                self._buffer[self._size : self._size + count] = view[start : start + count]
            start += count
            self._size += count
            if self._size == _BUFFER_BYTES:
                self._choose()
                self._put()
        self._position += end
        return end

    def _write_uncopied(self, view: memoryview) -> int:
        """Write the whole pages of ``view`` from where they are, if that is possible; return how many bytes that were."""
        size = len(view) - len(view) % _PAGE_BYTES
        if size < _LARGE_BYTES or self._size % _PAGE_BYTES or view.readonly:
            return 0
        if ctypes.addressof(ctypes.c_char.from_buffer(view)) % _PAGE_BYTES:
            return 0
        self._choose()
        if not self._is_direct:
            return 0
        self._put(view[:size])
        return size

    def _choose(self) -> None:
        if self._is_direct is None:
            self._is_direct = self._set_direct(True)

    def finish(self) -> None:
        """Write what is left in the buffer, and wait until all of the file is on the disk.

        Raises:
            OSError: The disk is full, and so on.
        """
        if self._is_direct and self._size:
            self._be_buffered()  # the rest of a file has no size that could be written directly
        self._put()
        os.fsync(self._descriptor)

    def _put(self, more: memoryview | None = None) -> None:
        """Write what is in the buffer, and ``more`` after it."""
        pieces = [self._buffer[: self._size]] if self._size else []
        self._size = 0
        if more is not None:
            pieces.append(more)
        while pieces:
            try:
                written = _write(self._descriptor, pieces)
                while pieces and written >= len(pieces[0]):
                    written -= len(pieces.pop(0))
                if written:
                    pieces[0] = pieces[0][written:]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._be_buffered()  # the system wants another alignment, or stopped in the middle

    def _be_buffered(self) -> None:
        self._set_direct(False)
        self._is_direct = False

    def _set_direct(self, is_direct: bool) -> bool:
        """Switch to writing with or without the page cache; return whether that is possible."""
        if not hasattr(os, "O_DIRECT"):
            return False
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        flags = flags | os.O_DIRECT if is_direct else flags & ~os.O_DIRECT
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
        except OSError:
            return False
        return True


def _write(descriptor: int, pieces: list[memoryview]) -> int:
    if hasattr(os, "writev"):
        return os.writev(descriptor, pieces)
    return os.write(descriptor, pieces[0])
