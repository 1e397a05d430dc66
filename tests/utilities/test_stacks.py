"""What a thread is doing, seen from another one."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import levin
from levin.utilities.stacks import Call, calls_in, calls_of

SOURCE = """
def waits(started, go):
    started.set()
    go.wait()

def deep(n, started, go):
    deep(n - 1, started, go) if n else waits(started, go)
"""


def calls_while_waiting(filename: str, run: Callable[[dict, threading.Event, threading.Event], None]) -> list[Call]:
    functions: dict = {}
    exec(compile(SOURCE, filename, "exec"), functions)
    started, go = threading.Event(), threading.Event()
    thread = threading.Thread(target=run, args=(functions, started, go))
    thread.start()
    try:
        assert started.wait(60)
        while not (calls := calls_of(thread.ident)) or calls[0].name not in ("wait", "__enter__"):
            pass
        return calls
    finally:
        go.set()
        thread.join()
        assert calls_of(thread.ident) == []


def test_calls_of_a_thread_that_waits_are_seen_from_another():
    calls = calls_while_waiting("/h\xe4user/\u65e5 a.py", lambda functions, *args: functions["deep"](2, *args))
    own = [call for call in calls if call.filename == "/h\xe4user/\u65e5 a.py"]
    deep = Call("/h\xe4user/\u65e5 a.py", 7, "deep")
    assert own == [Call("/h\xe4user/\u65e5 a.py", 4, "waits"), deep, deep, deep]
    assert calls[-1].name == "_bootstrap"


def test_of_a_deep_stack_the_innermost_calls_are_seen():
    calls = calls_while_waiting("deep.py", lambda functions, *args: functions["deep"](300, *args))
    assert [call.name for call in calls if call.filename == "deep.py"][:3] == ["waits", "deep", "deep"]
    assert 90 < len(calls) <= 100


def test_calls_of_the_present_thread_are_those_of_its_frames():
    seen, found = calls_of(threading.get_ident()), calls_in(traceback.walk_stack(sys._getframe()))
    assert seen[0].name == "calls_of"
    assert [call.name for call in seen[1:20]] == [call.name for call in found[:19]]
    assert seen[1].line == found[0].line


def test_no_file_holds_frames_of_another_thread():
    files = Path(levin.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "_current_frames" in file.read_text(encoding="utf-8")] == []
