"""``levin fit``, ``validate``, ``test`` and ``predict``: runs of any module and data module, without a program."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

EXAMPLES = {
    "fit": "levin fit --model project.Net --model.lr=0.1 --data project.Data --trainer.max_epochs=3",
    "validate": "levin validate --config config.yaml --ckpt_path best.ckpt",
    "test": "levin test --config config.yaml --ckpt_path best.ckpt",
    "predict": "levin predict --config config.yaml --ckpt_path best.ckpt --data.batch_size=64",
}


def run(subcommand: str, words: Sequence[str]) -> int:
    """Run a subcommand of :class:`LightningCLI` with these words."""
    from levin.cli.lightning_cli import LightningCLI

    epilogs = {name: {"epilog": f"Example: {example}"} for name, example in EXAMPLES.items()}
    with _command_line(["levin", subcommand, *words]):
        LightningCLI(parser_kwargs=epilogs)
    return 0


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Let ``words`` be those of the process, and classes of the working directory be imported."""
    before, path = sys.argv, sys.path[:]
    sys.argv = words
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.argv, sys.path[:] = before, path


fit, validate, test, predict = (functools.partial(run, subcommand) for subcommand in EXAMPLES)
