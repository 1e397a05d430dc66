"""``levin env``: what the machine offers, which versions there are, and what a Trainer would select."""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Iterator, Sequence

import torch

from levin.utilities.packages import versions_of
from levin.utilities.processors import count_processors

PACKAGES = [
    "torch",
    "torchmetrics",
    "numpy",
    "fsspec",
    "rich",
    "tqdm",
    "jsonargparse",
    "tensorboard",
    "wandb",
    "mlflow",
    "comet-ml",
    "matplotlib",
    "omegaconf",
    "lightning",
    "pytorch-lightning",
]


def describe() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield the sections of the report: a title, and rows of name and value."""
    from levin import __version__
    from levin.engine import build_engine

    yield (
        "versions",
        [("levin", __version__), ("python", platform.python_version()), *versions_of(PACKAGES, absent="-")],
    )
    processors = f"{count_processors()} of {os.cpu_count()}, torch uses {torch.get_num_threads()} threads"
    yield "machine", [("system", platform.platform()), ("processors", processors), *_devices()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = build_engine()
    environment = engine.strategy.environment
    found = (
        "none, which one process does not need"
        if environment is None
        else f"{type(environment).__name__}, by its variables"
    )
    yield (
        "selected by Trainer()",
        [
            ("accelerator", f"{type(engine.accelerator).__name__}: the first of tpu, mps, cuda and cpu that is there"),
            ("devices", f"{engine.num_devices}: all of them; one process on the CPU"),
            ("strategy", f"{type(engine.strategy).__name__}: ddp for several devices, else one device"),
            ("precision", f"{engine.strategy.precision.precision}: unless precision= says otherwise"),
            ("environment", found),
        ],
    )


def main(arguments: Sequence[str]) -> int:
    """Print the report. This is the command ``levin env``."""
    argparse.ArgumentParser(
        prog="levin env",
        description="Say what the machine offers, which versions there are, and what a Trainer would select.",
        epilog="Example: levin env > environment.txt",
    ).parse_args(arguments)
    for title, rows in describe():
        print(title)
        for name, value in rows:
            print(f"  {name:<18} {value}")
    return 0


def _devices() -> Iterator[tuple[str, str]]:
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}",
            f"{found.name}, {found.total_memory / 2**30:.1f} GiB, capability {found.major}.{found.minor}",
        )
    if not torch.cuda.is_available():
        yield "cuda", "no"
    yield "mps", "yes" if torch.backends.mps.is_available() else "no"
    yield "distributed", "yes" if torch.distributed.is_available() else "no"
