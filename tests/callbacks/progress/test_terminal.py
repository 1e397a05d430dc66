"""Foreign text beside a bar, and what can be drawn over."""

from __future__ import annotations

import io
import logging
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from levin.callbacks.progress import terminal as module
from levin.callbacks.progress.terminal import NoStream, Redirection, StreamAboveBars, draws_in_place, real_stream
from tests.callbacks.progress.screen import Terminal


@pytest.mark.parametrize(
    ("file", "environment", "shell", "expected"),
    [
        (Terminal(), {"TERM": "xterm"}, None, True),
        (Terminal(), {}, None, True),
        (Terminal(), {"TERM": "dumb"}, None, False),
        (io.StringIO(), {"TERM": "xterm"}, None, False),
        (None, {"TERM": "xterm"}, None, False),
        (object(), {"TERM": "xterm"}, None, False),
        (io.StringIO(), {"PYCHARM_HOSTED": "1"}, None, True),
        (io.StringIO(), {}, "ZMQInteractiveShell", True),
        (io.StringIO(), {}, "Shell", True),
        (io.StringIO(), {}, "TerminalInteractiveShell", False),
    ],
)
def test_what_can_be_drawn_over(
    file: Any, environment: dict[str, str], shell: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TERM", "PYCHARM_HOSTED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "ipython_shell", lambda: None if shell is None else type(shell, (), {})())
    assert draws_in_place(file) is expected


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two terminals, a redirection of them that is begun by hand, and what it is told; ``use`` takes them, see ``conftest``."""
    monkeypatch.setenv("TERM", "xterm")
    out, err, told = Terminal(), Terminal(), []

    def above(stream: Any, text: str) -> None:
        told.append(("out" if stream is out else "err", text))

    redirection = Redirection(above, lambda: told.append("clear"))
    patch = pytest.MonkeyPatch()

    def use() -> None:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)

    yield SimpleNamespace(out=out, err=err, told=told, redirection=redirection, use=use)
    patch.undo()


def test_whole_lines_go_above_the_bars(streams: Any) -> None:
    streams.use()
    streams.redirection.start()
    begun = sys.stdout
    streams.redirection.start()
    assert sys.stdout is begun and real_stream(begun) is streams.out and real_stream(streams.err) is streams.err
    assert sys.stdout.isatty() and sys.stdout.write("one\ntwo\nth") == 10
    sys.stdout.write("ree\n")
    sys.stderr.writelines(["a", "b\n", "c\n"])
    assert streams.told == [("out", "one\ntwo\n"), ("out", "three\n"), ("err", "ab\nc\n")]
    assert streams.out.getvalue() == streams.err.getvalue() == ""
    sys.stdout.write("end")
    streams.redirection.stop()
    assert streams.out.getvalue() == "end" and (sys.stdout, sys.stderr) == (streams.out, streams.err)


def test_a_prompt_takes_the_place_of_the_bars(streams: Any) -> None:
    streams.use()
    streams.redirection.start()
    sys.stdout.flush()
    sys.stderr.flush()
    sys.stderr.flush()
    assert streams.told == []
    sys.stdout.flush()  # after that of the other stream, as `input` does it
    assert streams.told == ["clear"]
    sys.stdout.flush()
    assert streams.told == ["clear"]
    sys.stderr.write("Name? ")
    assert streams.err.getvalue() == ""
    sys.stderr.flush()
    assert streams.told == ["clear", "clear"] and streams.err.getvalue() == "Name? "
    streams.redirection.stop()


def test_a_forked_process_writes_past_the_bars_of_its_parent(streams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.use()
    streams.redirection.start()
    monkeypatch.setattr(os, "getpid", lambda: -1)
    sys.stdout.write("begun ")
    assert streams.out.getvalue() == ""
    sys.stdout.write("and ended\nthen")
    sys.stdout.flush()
    assert streams.out.getvalue() == "\r\x1b[Jbegun and ended\nthen"
    assert streams.told == []
    monkeypatch.undo()
    streams.redirection.stop()


def test_log_handlers_write_above_the_bars_too(streams: Any) -> None:
    streams.use()
    log = logging.getLogger("tests.terminal")
    handlers = [logging.StreamHandler(stream) for stream in (streams.err, streams.out, io.StringIO())]
    other = handlers[2].stream
    for handler in handlers:
        log.addHandler(handler)
    try:
        streams.redirection.start()
        assert [real_stream(handler.stream) for handler in handlers] == [streams.err, streams.out, other]
        assert [isinstance(handler.stream, StreamAboveBars) for handler in handlers] == [True, True, False]
        log.warning("said")
        assert streams.told[:2] == [("err", "said\n"), ("out", "said\n")] and other.getvalue() == "said\n"
        # What somebody else replaces meanwhile stays.
        own = io.StringIO()
        handlers[1].setStream(own)
        sys.stdout = own
        streams.redirection.stop()
        assert [handler.stream for handler in handlers] == [streams.err, own, other]
        assert sys.stdout is own and sys.stderr is streams.err
    finally:
        for handler in handlers:
            log.removeHandler(handler)


def test_files_and_notebooks_are_left_alone(streams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streams.use()
    file = io.StringIO()
    sys.stderr = file
    streams.redirection.start()
    assert isinstance(sys.stdout, StreamAboveBars) and sys.stderr is file
    streams.redirection.stop()
    monkeypatch.setattr(module, "is_notebook", lambda: True)
    streams.redirection.start()
    assert sys.stdout is streams.out
    assert NoStream().write("text") == 4
