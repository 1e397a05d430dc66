"""Files that are written past the page cache hold what was written, wherever the system can and cannot do so."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from levin.utilities import direct
from levin.utilities.atomic import atomic_open
from levin.utilities.direct import DirectFile

fcntl = pytest.importorskip("fcntl")
BUFFER = direct._BUFFER_BYTES
SIZES = [0, 1, BUFFER - 1, BUFFER, BUFFER + 1, 2 * BUFFER + 4096, 3 * BUFFER + 17]


def written(folder, pieces):
    path = folder / "file"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        file = DirectFile(descriptor)
        for piece in pieces:
            assert file.write(piece) == len(piece)
        assert file.tell() == sum(map(len, pieces))
        file.finish()
    finally:
        os.close(descriptor)
    return path.read_bytes()


def pieces_of(data, *sizes):
    """Cut ``data``, as read-only bytes and as memory that can be written to."""
    start = 0
    for number, size in enumerate(sizes):
        piece = data[start : start + size]
        yield piece if number % 2 else memoryview(bytearray(piece))
        start += size
    yield memoryview(bytearray(data[start:]))


@pytest.mark.parametrize("size", SIZES)
def test_the_content_is_what_was_written(tmp_path, size):
    data = (os.urandom(4099) * (size // 4099 + 1))[:size]
    assert written(tmp_path, [data]) == data
    assert written(tmp_path, list(pieces_of(data, 10, 70_000, 1, 100_000, BUFFER))) == data


def test_memory_that_begins_with_a_page_is_written_from_where_it_is(tmp_path, monkeypatch):
    sources = []
    write = os.writev

    def watched(descriptor, pieces):
        sources.extend((ctypes.addressof(ctypes.c_char.from_buffer(piece)), len(piece)) for piece in pieces)
        return write(descriptor, pieces)

    monkeypatch.setattr(os, "writev", watched)
    memory = memoryview(mmap.mmap(-1, 3 * BUFFER))
    memory[:] = os.urandom(len(memory))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    # The first page, then large memory; an odd rest; what is no longer at a page of the file; and at one again.
    pieces = [
        bytes(4096),
        memory[:BUFFER],
        memory[BUFFER : 2 * BUFFER + 17],
        memory[2 * BUFFER :],
        bytes(4079),
        memory[:BUFFER],
    ]
    assert written(tmp_path, pieces) == b"".join(pieces)
    if (address, BUFFER) in sources:  # not every file system can
        assert (address + BUFFER, BUFFER) in sources
        assert sources.count((address, BUFFER)) == 2


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system cannot do without the page cache")
def test_large_pieces_go_past_the_page_cache_and_the_rest_through_it(tmp_path, monkeypatch):
    modes = []
    write = os.writev

    def watched(descriptor, pieces):
        modes.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return write(descriptor, pieces)

    monkeypatch.setattr(os, "writev", watched)
    data = bytes(2 * BUFFER + 5)
    assert written(tmp_path, [data]) == data
    can_be_direct = modes[0]  # not every file system can
    assert modes == [can_be_direct, can_be_direct, False]
    modes.clear()
    written(tmp_path, [bytes(1000)])
    assert modes == [False]


def test_a_system_that_refuses_is_written_to_in_the_usual_way(tmp_path, monkeypatch):
    def refuse(descriptor, command, argument=0):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    data = os.urandom(BUFFER) + b"rest"
    assert written(tmp_path, [data]) == data


def test_a_system_that_refuses_late_or_stops_in_the_middle_is_written_to_in_the_usual_way(tmp_path, monkeypatch):
    write, sizes = os.writev, []

    def odd(descriptor, pieces):
        is_direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
        if is_direct and sizes:
            raise OSError(errno.EINVAL, "Invalid argument")
        sizes.append(sum(map(len, pieces)))
        if len(sizes) == 2:
            pieces = [pieces[0][:1000]]
        return write(descriptor, pieces)

    monkeypatch.setattr(os, "writev", odd)
    data = os.urandom(BUFFER) + os.urandom(BUFFER) + b"rest"
    assert written(tmp_path, [data]) == data
    assert len(sizes) == 4


def test_an_error_of_the_disk_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor, pieces):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(OSError, match="No space left on device"), atomic_open(tmp_path / "file") as file:
        file.write(bytes(BUFFER))
        raise AssertionError("the error came too late")
    assert list(tmp_path.iterdir()) == []
