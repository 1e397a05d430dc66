from __future__ import annotations

import pytest

from tests.callbacks.progress.screen import Terminal


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("one\rtwo\nthree", ["two", "three"]),
        ("long line\rnew", ["new"[:3] + "g line"]),
        ("a\nb\x1b[Ac", ["ac", "b"]),
        ("a\n\nb\x1b[2A\rX", ["X", "b"]),
        ("a\nb\x1b[1A\x1b[2K\rc", ["c", "b"]),
        ("abc\r\x1b[K", []),
        ("a\nb\nc\x1b[2A\r\x1b[J", []),
        ("\x1b[?25l\x1b[1;31mred\x1b[0m\x1b[?25h", ["red"]),
        ("\n\nx", ["x"]),
        ("a\x1b[Bb", ["a", " b"]),
    ],
)
def test_a_terminal_shows(written: str, seen: list[str]) -> None:
    terminal = Terminal()
    terminal.write(written)
    assert terminal.screen == seen
    assert terminal.isatty()
    assert terminal.getvalue() == written
