"""What a thread is doing, seen from another one."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

_IS_3_11 = sys.version_info[:2] == (3, 11)
_CALL = re.compile(r'  File "(.*)", line (\d+|\?+) in (.*)')
_ESCAPED = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


class Call(NamedTuple):
    """A function that is under way."""

    filename: str
    line: int
    """The line it is at, 0 where that is not known."""
    name: str


class ThreadCalls:
    """Tells, when called, what the thread is doing that has made this.

    CPython 3.11 makes the object of a frame when it is asked for. That may begin a collection of garbage, which may let the thread go
    on and leave the frame; the object then shows whatever came into its place, or the process ends. So there the calls are written as
    text by what writes them when a process crashes: a hundred at most, and those of the main thread alone, which does not end before.
    """

    def __init__(self) -> None:
        self._thread_id: int = threading.get_ident()
        self._state: Any = None
        if _IS_3_11 and threading.current_thread() is threading.main_thread():
            # A prototype of its own: what `ctypes.pythonapi` hands out is one for the whole program.
            self._state = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyThreadState_Get", ctypes.pythonapi))()

    def __call__(self) -> list[Call]:
        """Return the calls that the thread is in, the innermost first; none of a thread that has ended."""
        if _IS_3_11:
            return [] if self._state is None else _written(self._state)
        frame, frames = sys._current_frames().get(self._thread_id), []
        while frame is not None:
            frames.append((frame, frame.f_lineno))
            frame = frame.f_back
        return calls_in(frames)


def calls_in(frames: Iterable[tuple[FrameType, int | None]]) -> list[Call]:
    """Return the calls of frames, as ``traceback.walk_stack`` gives those of the present thread."""
    return [Call(frame.f_code.co_filename, line or 0, frame.f_code.co_name) for frame, line in frames]


def _written(state: Any) -> list[Call]:
    with (
        open(os.memfd_create("levin-stacks"), "r+b")
        if hasattr(os, "memfd_create")
        else tempfile.TemporaryFile() as file
    ):
        # No other thread runs while it writes.
        write = ctypes.PYFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(("_Py_DumpTraceback", ctypes.pythonapi))
        write(file.fileno(), state)
        file.seek(0)
        lines = file.read().decode("ascii", "replace").splitlines()
    return [
        Call(_unescaped(found[1]), int(found[2]) if found[2].isdigit() else 0, _unescaped(found[3]))
        for found in map(_CALL.fullmatch, lines)
        if found is not None
    ]


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: chr(int(found[1] or found[2] or found[3], 16)), text)
