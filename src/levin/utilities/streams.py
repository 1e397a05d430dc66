"""The terminal's streams for the time of a call."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lenient_streams() -> Iterator[None]:
    """Let names that the terminal cannot encode be written with a question mark for each such character.

    A bar or a table may not end a run because of the name of a metric. The streams are as they were afterwards.
    """
    raising = [
        (stream, stream.errors)
        for stream in (sys.stdout, sys.stderr)
        if isinstance(stream, io.TextIOWrapper)
        and stream.errors in ("strict", "surrogateescape")  # the second in the locales C and POSIX
        and not stream.encoding.lower().startswith("utf")
    ]
    for stream, _ in raising:
        stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream, errors in raising:
            stream.reconfigure(errors=errors)
