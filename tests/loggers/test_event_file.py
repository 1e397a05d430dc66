from __future__ import annotations

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c as reference
from tensorboard.summary.writer.record_writer import RecordWriter

from levin.loggers.event_file import EventFile, crc32c, frame


def test_known_checksums():
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


@given(st.binary(max_size=300))
def test_small_checksums_equal_those_of_tensorboard(data):
    assert crc32c(data) == reference(data)


@settings(max_examples=10, deadline=None)
@given(st.integers(4000, 40000), st.integers(0, 2**32))
def test_large_checksums_equal_those_of_tensorboard(size, seed):
    data = random.Random(seed).randbytes(size)
    assert crc32c(data) == reference(data)


@pytest.mark.parametrize("size", [0, 89, 5000])
def test_a_record_equals_that_of_tensorboard(tmp_path, size):
    data = os.urandom(size)
    with open(tmp_path / "record", "wb") as file:
        RecordWriter(file).write(data)
    assert frame(data) == (tmp_path / "record").read_bytes()


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
