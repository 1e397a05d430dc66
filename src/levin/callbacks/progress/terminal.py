"""Whether output can be drawn in place, and how foreign text gets past a bar that is."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

_ERASE_BELOW = "\r\x1b[J"
WriteAbove = Callable[[TextIO, str], None]


def draws_in_place(file: Any) -> bool:
    """Return whether a line written to ``file`` can be overwritten: a terminal or a notebook, not a log file."""
    if is_notebook() or "PYCHARM_HOSTED" in os.environ:
        return True
    return bool(file is not None and hasattr(file, "isatty") and file.isatty() and os.environ.get("TERM") != "dumb")


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")


def bypassed(file: Any) -> Any:
    """Return the stream behind ``file`` when that is a redirected one, else ``file``."""
    return file.stream if isinstance(file, RedirectedStream) else file


def _write_over(stream: TextIO, text: str) -> None:
    stream.write(_ERASE_BELOW + text)
    stream.flush()


def _ignore(_: RedirectedStream) -> None:
    pass


class RedirectedStream:
    """Stands in for a terminal's stream and hands whole lines to ``write_above``.

    Text without a newline waits until it is flushed; that is how prompts (``input``, the debugger) appear.

    Args:
        stream: The real one; all other attributes are its own.
        write_above: Called with the real stream and the text.
        on_flush: Called when it is flushed with nothing to write.
    """

    def __init__(self, stream: TextIO, write_above: WriteAbove, on_flush: Callable[[RedirectedStream], None]) -> None:
        self.stream: TextIO = stream
        self._write_above: WriteAbove = write_above
        self._on_flush: Callable[[RedirectedStream], None] = on_flush
        self._pending: str = ""
        self._pid: int = os.getpid()
        self.is_flushed: bool = False

    def write(self, text: str) -> int:
        """Write ``text`` above the bar, as soon as its line is complete."""
        if os.getpid() != self._pid:
            self._become_worker()
        self.is_flushed = False
        lines, newline, rest = (self._pending + text).rpartition("\n")
        self._pending = rest
        if newline:
            self._write_above(self.stream, lines + newline)
        return len(text)

    def _become_worker(self) -> None:
        """In a forked process: write over the bar, which belongs to the parent and which that will draw again."""
        self._pid, self._pending = os.getpid(), ""
        self._write_above = _write_over
        self._on_flush = _ignore

    def writelines(self, lines: Any) -> None:
        """Write each of ``lines``."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is pending, complete or not."""
        if os.getpid() != self._pid:
            self._become_worker()
        text, self._pending = self._pending, ""
        if text:
            self._write_above(self.stream, text)
        else:
            self._on_flush(self)
        self.is_flushed = True
        self.stream.flush()

    def finish(self) -> None:
        """Write what is pending to the real stream."""
        text, self._pending = self._pending, ""
        if text:
            self.stream.write(text)
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Redirection:
    """Redirects standard output, standard error and the log handlers that write there, where they are terminals.

    Without it, a printed line continues the line of the bar.

    Args:
        write_above: Writes text to a stream so that the bar is not in its way.
    """

    def __init__(self, write_above: WriteAbove) -> None:
        self._write_above: WriteAbove = write_above
        self._streams: dict[str, RedirectedStream] = {}
        self._handlers: list[tuple[logging.StreamHandler[Any], RedirectedStream]] = []

    def start(self) -> None:
        """Redirect. Does nothing when it is on already."""
        if self._streams or is_notebook():
            return
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if not isinstance(stream, RedirectedStream) and draws_in_place(stream):
                self._streams[name] = RedirectedStream(stream, self._write_above, self._clear_for_prompt)
                setattr(sys, name, self._streams[name])
        for handler in _stream_handlers():
            for redirected in self._streams.values():
                if handler.stream is redirected.stream:
                    handler.setStream(redirected)
                    self._handlers.append((handler, redirected))

    def _clear_for_prompt(self, flushed: RedirectedStream) -> None:
        """Clear the bar when ``input`` or the debugger is about to write its prompt past us.

        Both flush standard error and then standard output, with nothing to write.
        """
        stdout, stderr = self._streams.get("stdout"), self._streams.get("stderr")
        if stdout is not None and flushed is stdout and stderr is not None and stderr.is_flushed:
            stderr.is_flushed = False
            self._write_above(stdout.stream, "")

    def stop(self) -> None:
        """Put everything back that nobody else has replaced since."""
        for name, redirected in self._streams.items():
            redirected.finish()
            if getattr(sys, name) is redirected:
                setattr(sys, name, redirected.stream)
        for handler, redirected in self._handlers:
            if handler.stream is redirected:
                handler.setStream(redirected.stream)
        self._streams, self._handlers = {}, []


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for log in loggers if isinstance(log, logging.Logger) for handler in log.handlers]
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


class NoStream:
    """A stream that writes nothing."""

    encoding: str = "utf-8"

    def write(self, text: str) -> int:
        """Forget ``text``."""
        return len(text)

    def flush(self) -> None:
        """Do nothing."""

    def isatty(self) -> bool:
        """Return False."""
        return False
