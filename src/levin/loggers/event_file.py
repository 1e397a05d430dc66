"""TensorBoard's event files, written directly.

TensorBoard's own writer hands every record to a thread that opens the file anew for it. Here a record is one system
call in the caller's thread, so what was logged is on its way to the disk when the call returns, for a fraction of the
price.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from typing import Optional

from tensorboard.compat.proto.event_pb2 import Event, SourceMetadata
from tensorboard.summary.writer.record_writer import RecordWriter

from levin.loggers.append_file import AppendFile


class EventFile:
    """An event file in a local directory; has the methods of TensorBoard's ``EventFileWriter``.

    Args:
        log_dir: The directory; it is created.
        filename_suffix: Text at the end of the file's name.
    """

    def __init__(self, log_dir: str, filename_suffix: str = "") -> None:
        self._log_dir: str = log_dir
        self._suffix: str = filename_suffix
        self._file: Optional[AppendFile] = None
        self.reopen()

    def get_logdir(self) -> str:
        """Return the directory."""
        return self._log_dir

    def add_event(self, event: Event) -> None:
        """Write one ``Event``.

        Raises:
            OSError: The file is closed.
        """
        if self._file is None:
            raise OSError(f"The event file in {self._log_dir!r} is closed. Call reopen() to go on in a new one.")
        RecordWriter(self._file).write(event.SerializeToString())

    def flush(self) -> None:
        """Do nothing: every event is written at once."""

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def reopen(self) -> None:
        """Begin a new file if this one is closed."""
        if self._file is not None:
            return
        os.makedirs(self._log_dir, exist_ok=True)
        now = time.time()
        stem = os.path.join(self._log_dir, f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}")
        for number in itertools.count():
            with contextlib.suppress(FileExistsError):
                self._file = AppendFile(f"{stem}.{number}{self._suffix}", is_new=True)
                break
        source = SourceMetadata(writer="levin.loggers.event_file")
        self.add_event(Event(wall_time=now, file_version="brain.Event:2", source_metadata=source))
