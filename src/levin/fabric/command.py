"""``levin fabric run SCRIPT``: the settings of a script's Fabric from the command line, and its processes by torchrun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from levin.accelerators import AcceleratorRegistry
from levin.checkpoint.folder import main as consolidate
from levin.launchers import torchrun
from levin.precision.choose import PRECISIONS
from levin.strategies import StrategyRegistry

ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "tpu", "auto")
_NOT_OF_SCRIPTS = ("spawn", "fork", "notebook", "xla", "tpu", "offload")


def main(arguments: Sequence[str]) -> int:
    """Run ``levin fabric run`` or ``levin fabric consolidate``; return the exit status."""
    words = list(arguments)
    if words[:1] == ["consolidate"]:
        return consolidate(words[1:])
    if words[:1] == ["run"]:
        words = words[1:]
    options = make_parser().parse_args(words)
    settings = {
        name: getattr(options, name) for name in ("accelerator", "strategy", "devices", "num_nodes", "precision")
    }
    given = {f"LT_{name.upper()}": str(value) for name, value in settings.items() if value is not None}
    os.environ.update(given, LT_CLI_USED="1")
    num_processes = count_processes(options.accelerator or "cpu", options.devices, options.strategy)
    place = {
        "nproc-per-node": num_processes,
        "nnodes": options.num_nodes,
        "node-rank": options.node_rank,
        "master-addr": options.main_address,
        "master-port": options.main_port,
    }
    flags = [f"--{name}={value}" for name, value in place.items()]
    return torchrun.main([*flags, options.script, *options.script_args])


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``levin fabric run``."""
    strategies = [name for name in StrategyRegistry if not any(word in name for word in _NOT_OF_SCRIPTS)]
    parser = argparse.ArgumentParser(
        prog="levin fabric run",
        description="Start a script that uses Fabric, in as many processes as its devices need.",
        epilog="Example: levin fabric run --devices 2 train.py --lr 0.1",
    )
    parser.add_argument("--accelerator", choices=ACCELERATORS, help="the hardware")
    parser.add_argument("--strategy", choices=[*strategies, "dp"], help="how processes work together")
    parser.add_argument("--devices", default="1", help="how many (2), which (0,1), -1 for all, or auto")
    parser.add_argument("--num-nodes", "--num_nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--node-rank", "--node_rank", type=int, default=0, help="index of this machine")
    parser.add_argument("--main-address", "--main_address", default="127.0.0.1", help="where rank 0 listens")
    parser.add_argument("--main-port", "--main_port", type=int, default=29400, help="its port")
    parser.add_argument("--precision", choices=[*PRECISIONS, "64", "32", "16", "bf16"], help="the number format")
    parser.add_argument("script", help="the program")
    parser.add_argument("script_args", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def count_processes(accelerator: str, devices: str, strategy: str | None = None) -> int:
    """Return how many processes one machine needs.

    Args:
        accelerator: One of :data:`ACCELERATORS`.
        devices: As for Fabric; ``"auto"`` is one.
        strategy: ``"dp"`` uses all devices from one process.

    Raises:
        ValueError: The accelerator starts its processes itself.

    Example:
        >>> count_processes("cpu", "2")
        2
    """
    if accelerator == "tpu":
        raise ValueError("accelerator='tpu' starts its processes itself. Run the script with fabric.launch(your_fn).")
    if strategy == "dp" or devices == "auto":
        return 1
    kind = AcceleratorRegistry.get_class("cuda" if accelerator in ("gpu", "auto") else accelerator)
    if accelerator == "auto" and not kind.is_available():
        kind = AcceleratorRegistry.get_class("cpu")
    return len(kind.get_parallel_devices(kind.parse_devices(devices)))
