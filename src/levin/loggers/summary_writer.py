"""A SummaryWriter that writes at once instead of handing records to a thread. Imports TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from levin.loggers.event_file import EventFile


class DirectFileWriter(FileWriter):
    """torch's FileWriter on an :class:`~levin.loggers.event_file.EventFile`.

    Args:
        log_dir: Local directory.
        filename_suffix: Text at the end of the file's name.
    """

    def __init__(self, log_dir: str, filename_suffix: str = "") -> None:
        # Not super().__init__(), which starts the thread.
        self.event_writer: EventFile = EventFile(log_dir, filename_suffix)

    def add_values(self, values: Mapping[str, float], step: Optional[int] = None) -> None:
        """Write all ``values`` in one record.

        Args:
            values: Tag -> value.
            step: Position on the x-axis.
        """
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        # By the method that trackers such as ClearML listen to.
        self.add_event(Event(summary=summary), step)


class DirectSummaryWriter(SummaryWriter):
    """torch's SummaryWriter on a :class:`DirectFileWriter`; for local directories."""

    def _get_file_writer(self) -> Any:
        if self.all_writers is None or self.file_writer is None:
            directory = str(self.log_dir)
            writer: Any = DirectFileWriter(directory, self.filename_suffix)
            self.file_writer = writer
            self.all_writers = {directory: writer}  # type: ignore[assignment]  # declared as None there
            if self.purge_step is not None:
                writer.add_event(Event(step=self.purge_step, file_version="brain.Event:2"))
                writer.add_event(Event(step=self.purge_step, session_log=SessionLog(status=SessionLog.START)))
                self.purge_step = None
        return self.file_writer
