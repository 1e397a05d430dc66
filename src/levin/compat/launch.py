"""``levin SCRIPT`` and ``levin -m MODULE``: a program written for Lightning, started with the alias in place.

The process becomes a plain ``python SCRIPT`` whose environment installs the alias. So ``__main__``, ``sys.argv``, pickled
functions and debuggers are what they are without levin, and what the program starts inherits the same environment.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from levin.compat import inherited_environment
from levin.utilities.command_line import parse_command_line
from levin.utilities.exceptions import did_you_mean


def run_program(words: Sequence[str], commands: Iterable[str] = ()) -> NoReturn:
    """Turn this process into Python running the program.

    Args:
        words: ``SCRIPT [args]`` or ``-m MODULE [args]``.
        commands: What may have been meant by a script that is not there.

    Raises:
        SystemExit: ``-m`` without a module, a script that is not there, or a Python that reads no environment (``-E``,
            ``-I``) and so cannot be told.
    """
    if words[0] == "-m" and len(words) < 2:
        raise SystemExit("levin: -m must be followed by a module. Write `python -m levin -m MODULE`.")
    if words[0] != "-m" and not os.path.exists(words[0]):
        meant = did_you_mean(words[0], commands)
        raise SystemExit(
            f"levin: {words[0]!r} is neither a command nor a script that exists.{meant} See `levin --help`."
        )
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise SystemExit(
            "levin: the import alias is passed on through PYTHONPATH and site, which -E, -I and -S switch off. "
            "Leave the option out, or call levin.compat.install() at the top of the program."
        )
    command = [sys.executable, *parse_command_line(sys.orig_argv[1:]).options, *words]
    environment = {**os.environ, **inherited_environment()}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":
        # There, exec returns to the shell at once and loses the exit status.
        raise SystemExit(subprocess.call(command, env=environment))
    os.execve(sys.executable, command, environment)
