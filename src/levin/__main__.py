"""The ``levin`` command."""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Sequence
from typing import Optional

from levin import __version__

COMMANDS = {
    "fit": ("levin.cli.commands:fit", "train: --model CLASS --data CLASS, --config FILE"),
    "validate": ("levin.cli.commands:validate", "run one validation of it"),
    "test": ("levin.cli.commands:test", "run its test"),
    "predict": ("levin.cli.commands:predict", "predict on every batch"),
    "env": ("levin.cli.env", "say what the machine offers, what would be selected"),
    "explain": ("levin.cli.explain", "say what a script's fit will call, and stop before it"),
    "report": ("levin.report.command", "write one HTML page about runs: curves, settings, differences"),
    "inspect": ("levin.checkpoint.describe", "say what checkpoints hold, and run nothing in them"),
    "migrate": ("levin.codemod.command", "rewrite imports of Lightning to imports of levin"),
    "verify": ("levin.checkpoint.verify", "say which checkpoints are intact"),
    "upgrade": (
        "levin.checkpoint.upgrade_file",
        "rewrite checkpoints of older Lightning versions",
    ),
    "consolidate": ("levin.checkpoint.folder", "turn the folder of a sharded checkpoint into one file"),
    "export": ("levin.checkpoint.safetensors_files", "write the weights of a checkpoint as safetensors"),
    "fabric": ("levin.fabric.command", "run a script that uses Fabric"),
    "plan": ("levin.planning", "say what each process of a run on many will need, without them"),
    "launch": ("levin.launchers.torchrun", "run a script in several processes, by torchrun"),
}
"""Name of a command -> the module whose ``main(words)`` runs it, or the function itself, and what it does.

Only the one that is asked for loads.
"""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; by default those of the process.

    Returns:
        The exit status.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        module, _, function = COMMANDS[words[0]][0].partition(":")
        status: int = getattr(importlib.import_module(module), function or "main")(words[1:])
        return status
    if words and (words[0] == "-m" or not words[0].startswith("-")):
        from levin.compat.launch import run_program

        run_program(words, COMMANDS)
    parser = argparse.ArgumentParser(
        prog="levin",
        usage="levin COMMAND|SCRIPT|-m MODULE [...]",
        epilog="SCRIPT and MODULE are programs written for Lightning; they run on levin as they are.\n"
        "Each command has its own --help, with an example: levin fit --help.",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=18),
    )
    parser.add_argument("--version", action="version", version=f"levin {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text)
    parser.parse_args(words)
    parser.print_help()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
