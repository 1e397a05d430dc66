"""``levin inspect FILE``: what a checkpoint holds, without running anything that is in it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pickle import UnpicklingError
from typing import Any

import torch

from levin.checkpoint.layout import OWN_KEY
from levin.checkpoint.reading import load

Section = tuple[str, list[tuple[str, str]]]


def describe(checkpoint: Mapping[str, Any]) -> Iterator[Section]:
    """Yield the sections of the report on a checkpoint: a title, and rows of name and value.

    Example:
        >>> dict(describe({"epoch": 3, "global_step": 70, "state_dict": {"layer.bias": torch.zeros(4)}}))["weights"]
        [('layer', '4 numbers, 16 bytes, float32'), ('in all', '4 numbers, 16 bytes')]
    """
    writer = "levin" if OWN_KEY in checkpoint else "Lightning or another program"
    yield (
        "run",
        [
            ("epoch", str(checkpoint.get("epoch", "-"))),
            ("step", str(checkpoint.get("global_step", "-"))),
            ("written by", writer),
            ("layout", f"Lightning {checkpoint.get('pytorch-lightning_version', '-')}"),
            ("holds", ", ".join(map(str, checkpoint))),
        ],
    )
    for title, key in (("hyper-parameters", "hyper_parameters"), ("data", "datamodule_hyper_parameters")):
        hparams = checkpoint.get(key)
        if isinstance(hparams, Mapping) and hparams:
            yield title, [(str(name), _short(value)) for name, value in hparams.items()]
    yield "weights", list(_layers(checkpoint.get("state_dict", {})))
    optimizers = checkpoint.get("optimizer_states") or []
    if optimizers:
        yield "optimizers", [(str(index), _groups(state)) for index, state in enumerate(optimizers)]
    callbacks = checkpoint.get("callbacks") or {}
    if callbacks:
        yield "callbacks", [(str(key), _short(state)) for key, state in callbacks.items()]


def main(arguments: Sequence[str]) -> int:
    """Print the report on each file; the status is 1 where one cannot be read. This is ``levin inspect FILE...``."""
    parser = argparse.ArgumentParser(
        prog="levin inspect",
        description="Say what checkpoints hold: step, epoch, sizes by layer, hyper-parameters, who wrote it. "
        "Nothing that is in a file is run.",
        epilog="Example: levin inspect best.ckpt",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a checkpoint file, or its URL")
    status = 0
    for path in parser.parse_args(arguments).files:
        print(path)
        try:
            checkpoint = load(path, map_location="cpu", weights_only=True)
            sections = list(describe(checkpoint if isinstance(checkpoint, Mapping) else {}))
        except (ValueError, OSError, UnpicklingError) as error:
            print(f"  cannot be read: {error}")
            status = 1
            continue
        for title, rows in sections:
            print(f"  {title}")
            for name, value in rows:
                print(f"    {name:<28} {value}")
    return status


def _layers(state: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    sizes: dict[str, list[torch.Tensor]] = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            sizes.setdefault(str(key).rpartition(".")[0] or "(module)", []).append(value)
    for layer, tensors in sizes.items():
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        yield layer, f"{_amount(tensors)}, {kinds}"
    yield "in all", _amount([tensor for tensors in sizes.values() for tensor in tensors])


def _amount(tensors: Sequence[torch.Tensor]) -> str:
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    size = f"{num_bytes} bytes" if num_bytes < 10_000 else f"{num_bytes / 1e6:,.2f} MB"
    return f"{sum(tensor.numel() for tensor in tensors):,} numbers, {size}"


def _groups(state: object) -> str:
    groups = state.get("param_groups", []) if isinstance(state, Mapping) else []
    return "; ".join(f"lr {group.get('lr', '-')}, {len(group.get('params', []))} parameters" for group in groups)


def _short(value: object, limit: int = 90) -> str:
    text = f"tensor of {list(value.shape)}" if isinstance(value, torch.Tensor) else " ".join(repr(value).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
