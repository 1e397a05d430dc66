"""A file that is written whole holds what was written, and an error of the disk is told by the write that meets it."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from levin.checkpoint import atomic_save, load
from levin.utilities.filesystem import atomic_open

PIECES = [b"", b"a", os.urandom(70_000), memoryview(bytearray(os.urandom(100_001))), bytes(4096)]


def test_the_content_is_what_was_written(tmp_path):
    with atomic_open(tmp_path / "file") as file:
        for piece in PIECES:
            assert file.write(piece) == len(piece)
        assert file.tell() == sum(map(len, PIECES))
    assert (tmp_path / "file").read_bytes() == b"".join(PIECES)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux, which lists open files")
def test_a_file_is_closed_whether_it_was_written_or_not(tmp_path):
    def write(piece):
        with atomic_open(tmp_path / "file") as file:
            file.write(piece)

    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        write(b"a")
        with pytest.raises(TypeError):
            write(None)
    assert os.listdir("/proc/self/fd") == before


def test_a_system_that_stops_in_the_middle_is_asked_for_the_rest(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:1000]))
    tree = {"weights": torch.rand(10_000)}
    atomic_save(tree, tmp_path / "file")
    assert torch.equal(load(tmp_path / "file")["weights"], tree["weights"])


def test_an_error_of_the_disk_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left on device"), atomic_open(tmp_path / "file") as file:
        file.write(bytes(4096))
        raise AssertionError("the error came too late")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_writes", range(14))
def test_a_disk_that_is_full_after_any_write_is_an_error_of_the_disk(tmp_path, monkeypatch, num_writes):
    write, left = os.write, [num_writes]

    def limited(descriptor, data):
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    with pytest.raises(OSError, match="No space left on device") as caught:
        atomic_save({"weights": torch.rand(10_000)}, tmp_path / "file")
    assert caught.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
