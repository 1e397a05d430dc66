from __future__ import annotations

import os

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from levin.loggers.append_file import AppendFile
from levin.loggers.event_file import EventFile


@pytest.mark.parametrize("size", [0, 89, 5000])
def test_a_record_equals_that_of_tensorboard(tmp_path, size):
    event = Event(step=1, file_version="x" * size)
    with open(tmp_path / "record", "wb") as file:
        RecordWriter(file).write(event.SerializeToString())
    events = EventFile(str(tmp_path / "log"))
    events.add_event(event)
    events.close()
    (name,) = os.listdir(tmp_path / "log")
    assert (tmp_path / "log" / name).read_bytes().endswith((tmp_path / "record").read_bytes())


def test_files_do_not_overwrite_each_other(tmp_path):
    first = EventFile(str(tmp_path / "new"), filename_suffix=".sfx")
    second = EventFile(str(tmp_path / "new"), filename_suffix=".sfx")
    names = os.listdir(tmp_path / "new")
    assert len(names) == 2
    assert all(name.startswith("events.out.tfevents.") and name.endswith(".sfx") for name in names)
    first.flush()
    assert first.get_logdir() == str(tmp_path / "new")
    first.close()
    first.close()
    with pytest.raises(OSError, match="reopen"):
        first.add_event(Event(step=1))
    first.reopen()
    first.reopen()
    assert len(os.listdir(tmp_path / "new")) == 3
    first.close()
    second.close()


def test_who_may_read_a_log_is_left_to_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        AppendFile(str(tmp_path / "log")).close()
    finally:
        os.umask(before)
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o664
