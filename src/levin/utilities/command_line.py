"""The command line of the interpreter, in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Options of the interpreter whose value may be the next argument.
_WITH_VALUE = ("X", "W")
_LONG_WITH_VALUE = "--check-hash-based-pycs"


class CommandLine(NamedTuple):
    """A command line of the interpreter, in parts.

    Args:
        options: Of the interpreter, ``-m`` and the like left out.
        kind: ``"file"``, ``"-m"``, ``"-c"`` or ``"prompt"``.
        target: The file (or folder, or archive), module or program text.
        arguments: Of the program.
    """

    options: list[str]
    kind: str
    target: str
    arguments: list[str]


def parse_command_line(words: Sequence[str]) -> CommandLine:
    """Return the parts of a command line of the interpreter.

    Args:
        words: As in ``sys.orig_argv``, without the interpreter itself.

    Example:
        >>> parse_command_line(["-u", "-X", "dev", "train.py", "--lr", "1"])
        CommandLine(options=['-u', '-X', 'dev'], kind='file', target='train.py', arguments=['--lr', '1'])
        >>> parse_command_line(["-Om", "app.train", "fast"])
        CommandLine(options=['-O'], kind='-m', target='app.train', arguments=['fast'])
    """
    options: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            return CommandLine(options, "file", word, left)
        if word.startswith("--"):
            options += [word, left.pop(0)] if word == _LONG_WITH_VALUE and left else [word]
            continue
        for place, letter in enumerate(word[1:], 1):
            value = word[place + 1 :]
            if letter in ("m", "c"):
                options += [word[:place]] if place > 1 else []
                return CommandLine(options, f"-{letter}", value or left.pop(0), left)
            if letter in _WITH_VALUE:
                options += [word] if value else [word, left.pop(0)]
                break
        else:
            options.append(word)
    return CommandLine(options, "prompt", "", [])
