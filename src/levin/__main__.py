"""The ``levin`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Optional

from levin import __version__


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Args:
        arguments: Words of the command line; by default those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="levin", description="A training framework for PyTorch.")
    parser.add_argument("--version", action="version", version=f"levin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    verify = commands.add_parser("verify", help="say which checkpoints are intact, and what is wrong with the others")
    verify.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint file, or the folder of a sharded one")
    parsed = parser.parse_args(arguments)
    if parsed.command == "verify":
        from levin.checkpoint.verify import main as verify_files

        return verify_files(parsed.files)
    parser.print_help()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
