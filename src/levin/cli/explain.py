"""``levin explain SCRIPT``: the loop of a program's fit, which stops before the first batch."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from levin.compat import install
from levin.trainer import Trainer
from levin.utilities.rank_zero import rank_zero_only


def main(arguments: Sequence[str]) -> int:
    """Run a program as far as its first ``Trainer.fit``, and print what that would do. This is ``levin explain``."""
    parser = argparse.ArgumentParser(
        prog="levin explain",
        description="Say what a program's Trainer.fit will call, with file and line; nothing is trained, logged or saved.",
        usage="levin explain SCRIPT [...]\n       levin explain -m MODULE [...]\n       levin explain fit [...]",
        epilog="Examples: levin explain train.py --lr 0.1\n          levin explain fit --config config.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "program", metavar="SCRIPT", help="a program for Lightning or levin; `fit`: that of `levin fit`"
    )
    words = list(arguments)
    if not words or words[0] in ("-h", "--help"):
        parser.parse_args(words)
    setattr(Trainer, "fit", _explained)  # noqa: B010  # in this process nothing is trained
    try:
        _run(words)
    except _Explained as explained:
        _show(str(explained))
        return 0
    sys.stderr.write(f"levin explain: {' '.join(words)} never called `Trainer.fit`.\n")
    return 1


class _Explained(BaseException):
    """Carries the explanation out of the program."""


def _explained(
    trainer: Trainer, model: Any, *args: Any, ckpt_path: object = None, weights_only: object = None, **kwargs: Any
) -> None:
    raise _Explained(trainer.explain(model, *args[:3], **kwargs))


@rank_zero_only
def _show(text: str) -> None:
    print(text, end="")


def _run(words: Sequence[str]) -> None:
    """Run a script, a module, or ``levin fit``, as its own command line would."""
    install()
    if words[0] == "fit":
        from levin.cli.commands import fit

        fit(words[1:])
    elif words[0] == "-m" and len(words) > 1:
        sys.argv = list(words[1:])
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif os.path.isfile(words[0]):
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")
    else:
        raise SystemExit(f"levin explain: {words[0]!r} is no script that exists. See `levin explain --help`.")
