"""The folder of a sharded checkpoint, turned into one file: ``levin consolidate DIR``."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Sequence

from levin.checkpoint.io import atomic_save
from levin.checkpoint.layout import META_FILE, folder_name, is_zero
from levin.checkpoint.reading import load
from levin.checkpoint.verify import verify
from levin.checkpoint.zero import consolidate_zero
from levin.utilities.filesystem import exists, is_folder
from levin.utilities.types import PathLike, StateDict

VERSION_KEY = "pytorch-lightning_version"
"""What a Trainer's checkpoints have, and a Fabric's have not."""


def consolidate(folder: PathLike, weights_only: bool | None = None) -> StateDict:
    """Read a sharded checkpoint, of any number of processes, into one tree on the CPU.

    Args:
        folder: Local or remote. Holds the files of ``torch.distributed.checkpoint`` and ``meta.pt``, or is one of
            DeepSpeed, which gives weights in single precision and no states of optimizers.
        weights_only: For ``meta.pt``, as for :func:`levin.checkpoint.load`.

    Returns:
        For a folder that a Trainer wrote, what its file would hold: ``state_dict``, ``optimizer_states`` and the rest.
        Else the keys that the user gave.

    Raises:
        ValueError: It is no complete sharded checkpoint, or is damaged.
        pickle.UnpicklingError: It refers to classes that have no place in a sharded checkpoint.

    Example:
        >>> checkpoint = consolidate("epoch=3-step=400.ckpt")  # doctest: +SKIP
    """
    folder = folder_name(folder)
    if not is_folder(folder):
        raise ValueError(
            f"{folder!r} is no folder. Give the folder of a sharded checkpoint; a file needs no consolidation."
        )
    if is_zero(folder):
        return consolidate_zero(folder, weights_only)
    verify(folder)
    meta = load(f"{folder}/{META_FILE}", "cpu", weights_only)
    from levin.checkpoint.shards import read_shards  # torch.distributed.checkpoint takes long to import

    shards = read_shards(folder)
    if VERSION_KEY not in meta:
        return {**shards, **meta}
    weights = shards.pop("model") if "model" in shards else shards.pop("state_dict", None)
    if weights is None:
        raise ValueError(f"{folder!r} has neither 'model' nor 'state_dict', so there are no weights in it.")
    numbers = sorted(int(match[1]) for key in shards if (match := re.fullmatch(r"optimizer_(\d+)", key)))
    optimizers = [_with_numbers(shards.pop(f"optimizer_{number}")) for number in numbers]
    checkpoint = {**meta, **shards, "state_dict": weights}
    if optimizers or "optimizer_states" not in checkpoint:
        checkpoint["optimizer_states"] = optimizers
    return checkpoint


def main(arguments: Sequence[str]) -> int:
    """Write the one file of the folder named in ``arguments``; return 0 when that went well, else 1.

    This is the command ``levin consolidate DIR``.
    """
    parser = argparse.ArgumentParser(
        prog="levin consolidate",
        description="Turn the folder of a sharded checkpoint into one file that any Trainer reads.",
        epilog="Example: levin consolidate step=100.ckpt --output_file whole.ckpt",
    )
    parser.add_argument("folder", metavar="DIR", help="a path or URL; holds .metadata, *.distcp and meta.pt")
    parser.add_argument("--output_file", "--output-file", metavar="FILE", help="by default DIR.consolidated")
    options = parser.parse_args(list(arguments))
    output = options.output_file or f"{options.folder.rstrip('/')}.consolidated"
    try:
        if exists(output):
            raise FileExistsError(f"{output!r} is there already; remove it, or choose another --output_file")
        atomic_save(consolidate(options.folder), output)
    except (OSError, ValueError, pickle.UnpicklingError) as error:
        print(f"FAILED  {error}")
        return 1
    print(f"written  {output}")
    return 0


def _with_numbers(state: StateDict) -> StateDict:
    """Return the state of an optimizer with numbers in the place of the parameters' names, as an optimizer gives it."""
    numbers: dict[str, int] = {}
    groups = []
    for group in state["param_groups"]:
        names = [str(name) for name in group["params"]]
        groups.append({**group, "params": [numbers.setdefault(name, len(numbers)) for name in names]})
    states = {numbers[str(name)]: value for name, value in state.get("state", {}).items() if str(name) in numbers}
    return {"state": dict(sorted(states.items())), "param_groups": groups}
