"""What a thread is doing, seen from another one."""

from __future__ import annotations

import faulthandler
import os
import re
import tempfile
from collections.abc import Iterable
from types import FrameType
from typing import IO, NamedTuple

_CALL = re.compile(r'  File "(.*)", line (\d+|\?+) in (.*)')
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


class Call(NamedTuple):
    """A function that is under way."""

    filename: str
    line: int
    """The line it is at, 0 where that is not known."""
    name: str


def calls_of(thread_id: int) -> list[Call]:
    """Return the calls that a thread is in, the innermost first: a hundred at most, none of a thread that has ended.

    The frames of a thread that is running are no objects to be held: CPython 3.11 lets ``f_back`` point to memory of other
    things once the thread has gone on. ``faulthandler`` makes none, and looks while all threads stand still.

    Args:
        thread_id: Of ``threading.get_ident()``.
    """
    with _scratch() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        text = file.read().decode("ascii", "replace")
    # "Thread 0x00007f (most recent call first):", then its calls
    for block in re.split(r"^(?:Current thread|Thread) 0x", text, flags=re.MULTILINE)[1:]:
        header, *lines = block.splitlines()
        if int(header.split()[0], 16) == thread_id:
            return [
                Call(_unescaped(found[1]), int(found[2]) if found[2].isdigit() else 0, _unescaped(found[3]))
                for found in map(_CALL.fullmatch, lines)
                if found is not None
            ]
    return []


def calls_in(frames: Iterable[tuple[FrameType, int | None]]) -> list[Call]:
    """Return the calls of frames of the present thread, as ``traceback.walk_stack`` gives them."""
    return [Call(frame.f_code.co_filename, line or 0, frame.f_code.co_name) for frame, line in frames]


def _scratch() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("levin-stacks"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1] or found[2] or found[3], 16)), text)
