"""A file to which whole records are added."""

from __future__ import annotations

import os
import weakref


class AppendFile:
    """A local file to which records are added at once: all of one, or none; closed when nobody holds it any more.

    Args:
        path: Where it is.
        is_new: Whether there must be no file of that name yet.

    Raises:
        FileExistsError: There is one.
    """

    def __init__(self, path: str, is_new: bool = False) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0) | (os.O_EXCL if is_new else 0)
        self._descriptor: int = os.open(path, flags, 0o666)
        self.close: weakref.finalize[..., AppendFile] = weakref.finalize(self, os.close, self._descriptor)

    def write(self, record: bytes) -> None:
        """Add ``record``; where that fails, the file is as it was."""
        size = os.fstat(self._descriptor).st_size
        try:
            while record:
                record = record[os.write(self._descriptor, record) :]
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
