"""Weights alone, as safetensors: ``levin export CHECKPOINT FILE``, and such files read."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from levin.checkpoint.folder import consolidate
from levin.checkpoint.layout import is_sharded
from levin.checkpoint.reading import load
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.filesystem import atomic_open
from levin.utilities.packages import require_package
from levin.utilities.types import PathLike

ALIASES = "levin_aliases"
"""Entry of a file's metadata: names of one tensor under which a file, which holds it once, does not have it."""


def export_weights(checkpoint: PathLike, output: PathLike, key: str = "state_dict", prefix: str = "") -> list[str]:
    """Write the weights of a checkpoint as safetensors; the file is whole or not there.

    Args:
        checkpoint: A file, or the folder of a sharded checkpoint.
        output: A path or URL.
        key: Entry of the checkpoint that holds them; that of a Fabric has the user's name.
        prefix: Only names that begin with it, which is left out of them: ``"net."`` for the weights of ``self.net``.

    Returns:
        The names that were written.

    Raises:
        ValueError: There are no such weights.
        ModuleNotFoundError: The package safetensors is not installed.

    Example:
        >>> export_weights("best.ckpt", "best.safetensors", prefix="net.")  # doctest: +SKIP
    """
    library = _safetensors()
    tree = consolidate(checkpoint) if is_sharded(checkpoint) else load(checkpoint, "cpu")
    weights = tree.get(key) if isinstance(tree, dict) else None
    if not isinstance(weights, dict):
        keys = list(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(f"{os.fspath(checkpoint)!r} has no weights under {key!r}, received {keys}. Name another key.")
    found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    tensors, aliases = _without_aliases({name: value for name, value in found.items() if isinstance(value, Tensor)})
    if not tensors:
        raise ValueError(
            f"No weight of {os.fspath(checkpoint)!r} begins with {prefix!r}. Its names are {list(weights)[:10]}."
        )
    with atomic_open(output) as file:
        file.write(library.torch.save(tensors, {"format": "pt", ALIASES: json.dumps(aliases)}))
    return [*tensors, *aliases]


def load_weights(path: PathLike) -> dict[str, Tensor]:
    """Return the weights in a file of safetensors, for ``module.load_state_dict``.

    Args:
        path: A local path.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedCheckpointError: It is damaged, or none of that kind.
        ModuleNotFoundError: The package safetensors is not installed.

    Example:
        >>> model.load_state_dict(load_weights("best.safetensors"))  # doctest: +SKIP
    """
    library = _safetensors()
    try:
        with library.safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
            aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
    except library.SafetensorError as error:
        raise DamagedCheckpointError(f"{os.fspath(path)!r} is damaged, or no file of safetensors: {error}") from error
    return {**weights, **{name: weights[other] for name, other in aliases.items()}}


def main(arguments: Sequence[str]) -> int:
    """Run ``levin export``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="levin export",
        description="Write the weights of a checkpoint as safetensors.",
        epilog="Example: levin export best.ckpt model.safetensors --prefix model.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file, or the folder of a sharded checkpoint")
    parser.add_argument("output", metavar="FILE", help="for example model.safetensors")
    parser.add_argument("--key", default="state_dict", help="the entry that holds the weights")
    parser.add_argument("--prefix", default="", help="only names that begin so, without that")
    options = parser.parse_args(list(arguments))
    if os.path.exists(options.output):
        parser.error(f"{options.output!r} is there already; remove it, or choose another name")
    try:
        names = export_weights(options.checkpoint, options.output, options.key, options.prefix)
    except (OSError, ValueError, ImportError, pickle.UnpicklingError) as error:
        print(f"FAILED  {error}")
        return 1
    print(f"written  {options.output}: {len(names)} tensors")
    return 0


def _without_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, in memory of its own, and the other names of those that have several."""
    kept: dict[str, Tensor] = {}
    names: dict[tuple[object, ...], str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in names:
            aliases[name] = names[place]
        else:
            names[place] = name
            kept[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return kept, aliases


def _safetensors() -> Any:
    require_package("safetensors", "A file of safetensors")
    importlib.import_module("safetensors.torch")
    return importlib.import_module("safetensors")
