"""The command line of the interpreter, in parts."""

from __future__ import annotations

import pytest

from levin.utilities.command_line import parse_command_line


@pytest.mark.parametrize(
    ("line", "options", "kind", "target", "arguments"),
    [
        ("train.py -m --lr 1", "", "file", "train.py", "-m --lr 1"),
        ("-u -X dev train.py", "-u -X dev", "file", "train.py", ""),
        ("-uXdev -Werror train.py -c x", "-uXdev -Werror", "file", "train.py", "-c x"),
        ("-IW error -m app.train fast", "-IW error", "-m", "app.train", "fast"),
        ("-mapp.train", "", "-m", "app.train", ""),
        ("-Om app.train -X", "-O", "-m", "app.train", "-X"),
        ("-Ecprint(1) a", "-E", "-c", "print(1)", "a"),
        ("--check-hash-based-pycs never - a", "--check-hash-based-pycs never", "file", "-", "a"),
        ("--version -q", "--version -q", "prompt", "", ""),
        ("--check-hash-based-pycs", "--check-hash-based-pycs", "prompt", "", ""),
        ("", "", "prompt", "", ""),
    ],
)
def test_options_are_told_from_the_program_and_its_arguments(line, options, kind, target, arguments):
    assert parse_command_line(line.split()) == (options.split(), kind, target, arguments.split())
