"""Whether output can be drawn in place, and how foreign text gets past a bar that is."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from levin.utilities.interactive import ipython_shell

_ERASE_BELOW = "\r\x1b[J"


def draws_in_place(file: object) -> bool:
    """Return whether a line written to ``file`` can be overwritten: a terminal or a notebook, not a log file."""
    if is_notebook() or "PYCHARM_HOSTED" in os.environ:
        return True
    return bool(file is not None and hasattr(file, "isatty") and file.isatty() and os.environ.get("TERM") != "dumb")


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    return type(ipython_shell()).__name__ in ("ZMQInteractiveShell", "Shell")


def real_stream(file: object) -> Any:
    """Return the stream behind ``file`` when that is a redirected one, else ``file``."""
    return file.stream if isinstance(file, StreamAboveBars) else file


class StreamAboveBars:
    """Stands in for a terminal's stream: whole lines go above the bars, prompts into their place.

    Args:
        stream: The real one; all other attributes are its own.
        redirection: Knows the bars.
    """

    def __init__(self, stream: TextIO, redirection: Redirection) -> None:
        self.stream: TextIO = stream
        self._redirection: Redirection = redirection
        self._pending: str = ""
        self._pid: int = os.getpid()

    def write(self, text: str) -> int:
        """Write ``text`` as soon as its line is complete."""
        lines, newline, self._pending = (self._pending + text).rpartition("\n")
        if newline and os.getpid() == self._pid:
            self._redirection.write_above(self.stream, lines + newline)
        elif newline:
            # In a forked worker: the bar belongs to the parent, which will draw it again.
            self.stream.write(_ERASE_BELOW + lines + newline)
            self.stream.flush()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of ``lines``."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Write what is pending, complete or not."""
        pending, self._pending = self._pending, ""
        if os.getpid() == self._pid:
            self._redirection.on_flush(self, bool(pending))
        self.stream.write(pending)
        self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Redirection:
    """Redirects standard output, standard error and the log handlers that write there, where they are terminals.

    Without it, a printed line continues the line of the bar.

    Args:
        write_above: Writes lines to a stream, above the bars.
        clear: Takes the bars off the screen until they are drawn again.
    """

    def __init__(self, write_above: Callable[[TextIO, str], None], clear: Callable[[], None]) -> None:
        self.write_above: Callable[[TextIO, str], None] = write_above
        self._clear: Callable[[], None] = clear
        self._streams: dict[str, StreamAboveBars] = {}
        self._handlers: list[tuple[logging.StreamHandler[Any], StreamAboveBars]] = []
        self._last_flushed: StreamAboveBars | None = None

    def start(self) -> None:
        """Redirect. Does nothing when it is on already."""
        if self._streams or is_notebook():
            return
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if draws_in_place(stream):
                self._streams[name] = StreamAboveBars(stream, self)
                setattr(sys, name, self._streams[name])
        for handler in _stream_handlers():
            for redirected in self._streams.values():
                if handler.stream is redirected.stream:
                    handler.setStream(redirected)
                    self._handlers.append((handler, redirected))

    def on_flush(self, flushed: StreamAboveBars, has_pending: bool) -> None:
        """Make room for a prompt: ``input`` and the debugger flush both streams and then write past them.

        Args:
            flushed: The redirected stream that is flushed.
            has_pending: Whether a part of a line is about to be written, as other prompts are.
        """
        is_prompt = flushed is self._streams.get("stdout") and self._last_flushed is self._streams.get("stderr")
        self._last_flushed = flushed
        if is_prompt or has_pending:
            self._clear()

    def stop(self) -> None:
        """Put everything back that nobody else has replaced since."""
        for handler, redirected in self._handlers:
            if handler.stream is redirected:
                handler.setStream(redirected.stream)
        for name, redirected in self._streams.items():
            redirected.flush()
            if getattr(sys, name) is redirected:
                setattr(sys, name, redirected.stream)
        self._streams, self._handlers, self._last_flushed = {}, [], None


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    handlers = [handler for log in loggers if isinstance(log, logging.Logger) for handler in log.handlers]
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


class NoStream(io.StringIO):
    """A stream that writes nothing."""

    def write(self, text: str) -> int:
        """Forget ``text``."""
        return len(text)
