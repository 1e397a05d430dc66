"""What a thread is doing, seen from another one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import pytest

import levin
from levin.utilities.stacks import Call, ThreadCalls, calls_in

SOURCE = """
def waits(looked):
    looked.wait(60)

def deep(n, looked):
    deep(n - 1, looked) if n else waits(looked)
"""


def calls_seen_by_another(filename: str, depth: int) -> list[Call]:
    """Return what another thread sees of this one while it waits in functions of a file of that name."""
    functions: dict = {}
    exec(compile(SOURCE, filename, "exec"), functions)
    calls, seen, looked = ThreadCalls(), [], threading.Event()

    def look() -> None:
        while not seen or not any(call.name == "waits" for call in seen) or seen[0].name != "wait":
            seen[:] = calls()
        looked.set()

    thread = threading.Thread(target=look)
    thread.start()
    functions["deep"](depth, looked)
    thread.join()
    return seen


def test_calls_of_a_thread_that_waits_are_seen_from_another():
    filename = "/h\xe4user/\u65e5 a.py"
    own = [call for call in calls_seen_by_another(filename, 2) if call.filename == filename]
    assert own == [Call(filename, 3, "waits"), *[Call(filename, 6, "deep")] * 3]


def test_of_a_deep_stack_the_innermost_calls_are_seen():
    calls = calls_seen_by_another("deep.py", 300)
    assert [call.name for call in calls if call.filename == "deep.py"][:90] == ["waits", *["deep"] * 89]


def test_calls_of_the_present_thread_are_those_of_its_frames():
    look = ThreadCalls()
    seen, found = look(), calls_in(traceback.walk_stack(sys._getframe()))
    seen = seen[[call.name for call in seen].index("test_calls_of_the_present_thread_are_those_of_its_frames") :]
    assert [call.name for call in seen[:20]] == [call.name for call in found[:20]]
    assert seen[0].line == found[0].line


def test_the_line_of_a_function_without_lines_is_0():
    def look() -> list[Call]:
        return calls()

    calls = ThreadCalls()
    look.__code__ = look.__code__.replace(co_linetable=b"")
    assert [call.line for call in look() if call.name == "look"] == [0]
    assert calls_in([(sys._getframe(), None)]) == [Call(__file__, 0, sys._getframe().f_code.co_name)]


def test_prototypes_of_the_program_stay_as_they_are():
    before = ctypes.pythonapi.PyThreadState_Get.restype
    assert ThreadCalls()()
    assert ctypes.pythonapi.PyThreadState_Get.restype is before


def test_of_a_thread_that_has_ended_no_calls_are_seen():
    made: list[ThreadCalls] = []
    thread = threading.Thread(target=lambda: made.append(ThreadCalls()))
    thread.start()
    thread.join()
    assert made[0]() == []


PROGRAM = """
import gc, sys, threading, time
from levin.utilities.stacks import ThreadCalls

class Lets:
    def __init__(self):
        self.me = self

    def __del__(self):
        time.sleep(0)  # another thread goes on

def look():
    for n in range(40000):
        gc.set_threshold(3 + n % 40)
        Lets()
        assert all(call.name in NAMES for call in calls()), calls()
    print("looked")

def deep(n):
    return deep(n - 1) + len(str(n)) + deep(n - 1) if n else 1

NAMES = {"<module>", "deep", "__del__", "start", "wait", "is_set", "is_alive", "__enter__", "__exit__", "_wait_for_tstate_lock"}
sys.setswitchinterval(1e-5)
calls = ThreadCalls()
thread = threading.Thread(target=look)
thread.start()
while thread.is_alive():
    deep(6)
"""


@pytest.mark.slow
def test_looking_at_a_thread_while_garbage_is_collected_ends_no_process():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode, result.stdout) == (0, "looked\n"), result.stderr


def test_frames_of_another_thread_are_walked_in_one_place():
    files = Path(levin.__file__).parent.rglob("*.py")
    assert [file.name for file in files if "_current_frames" in file.read_text(encoding="utf-8")] == ["stacks.py"]
