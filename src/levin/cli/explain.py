"""``levin explain SCRIPT``: the loop of a program's call of the Trainer, which stops before the first batch."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, Optional

from levin.cli import commands
from levin.compat import install
from levin.trainer import Trainer
from levin.trainer.entry import begin_named
from levin.utilities.rank_zero import rank_zero_only
from levin.utilities.states import TrainerFn, TrainerStatus

METHODS = tuple(commands.EXAMPLES)
_passed_over: dict[str, None] = {}  # the methods that were called before the one to explain, in order


def main(arguments: Sequence[str]) -> int:
    """Run a program as far as one of its calls of the Trainer, and print what that would do. This is ``levin explain``."""
    parser = argparse.ArgumentParser(
        prog="levin explain",
        description="Say what a program's Trainer.fit (validate, test, predict) will call, with file and line; "
        "nothing is trained, logged or saved.",
        usage="levin explain [--call METHOD] SCRIPT [...]\n       levin explain [--call METHOD] -m MODULE [...]\n"
        "       levin explain fit [...]",
        epilog="Examples: levin explain train.py --lr 0.1\n          levin explain --call test train.py\n"
        "          levin explain fit --config config.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--call", choices=METHODS, help="explain the first call of this method, and pass over those of the others"
    )
    parser.add_argument(
        "program",
        metavar="SCRIPT",
        help=f"a program for Lightning or levin; or {', '.join(METHODS)}: that of `levin fit` ...",
    )
    words = list(arguments)
    # What follows the program is the program's.
    num_own = 0 if not words else 2 if words[0] == "--call" else int(words[0].startswith("--call="))
    own, words = words[:num_own], words[num_own:]
    if not words or words[0] in ("-h", "--help"):
        parser.parse_args([*own, *words])
    wanted: Optional[str] = parser.parse_args([*own, "-"]).call
    for name in METHODS:
        setattr(Trainer, name, _explained(getattr(Trainer, name), is_wanted=wanted in (None, name)))
    found: Optional[str] = None
    try:
        _run(words)
    except _Explained as explained:
        found = str(explained)
    finally:
        if found is None and _passed_over:
            names = ", ".join(f"Trainer.{name}" for name in _passed_over)
            sys.stderr.write(f"levin explain: {names} were passed over, so what they would have made is not there.\n")
    if found is not None:
        _show(found)
        return 0
    method = f"`Trainer.{wanted}`" if wanted else "a method of the Trainer that runs"
    sys.stderr.write(f"levin explain: {' '.join(words)} never called {method}.\n")
    return 1


class _Explained(BaseException):
    """Carries the explanation out of the program."""


def _explained(method: Callable[..., Any], is_wanted: bool) -> Callable[..., Any]:
    """Return what stands for a method of the Trainer in this process, in which nothing is trained.

    One that is passed over attaches module and data, so that a call after it can do without them.
    """
    fn = TrainerFn(method.__name__)

    @functools.wraps(method)
    def explained(trainer: Trainer, *args: Any, **kwargs: Any) -> Optional[list[Any]]:
        if is_wanted:
            raise _Explained(trainer.explain(*args, fn=fn.value, **kwargs))
        begin_named(trainer, fn, inspect.signature(method).bind(trainer, *args, **kwargs).arguments)
        trainer.state.status = TrainerStatus.FINISHED
        _passed_over[fn.value] = None
        return None if fn == TrainerFn.FITTING else []

    return explained


@rank_zero_only
def _show(text: str) -> None:
    print(text, end="")


def _run(words: Sequence[str]) -> None:
    """Run a script, a module, or ``levin fit``, as its own command line would."""
    install()
    if words[0] in METHODS:
        commands.run(words[0], words[1:])
    elif words[0] == "-m" and len(words) > 1:
        sys.argv = list(words[1:])
        sys.path.insert(0, os.getcwd())
        if importlib.util.find_spec(words[1].partition(".")[0]) is None:
            raise SystemExit(f"levin explain: there is no module {words[1]!r}. See `levin explain --help`.")
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif os.path.isfile(words[0]):
        sys.argv = list(words)
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")
    else:
        raise SystemExit(f"levin explain: {words[0]!r} is no script that exists. See `levin explain --help`.")
