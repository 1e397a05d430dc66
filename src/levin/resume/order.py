"""The order in which all ranks together go through a data set, so that another number of ranks can go on in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from levin.data.samplers import UnrepeatedDistributedSampler
from levin.resume.rng_states import GlobalGenerators, State, bytes_tensor


def describe_order(loader: DataLoader[Any]) -> State | None:
    """Return what :func:`list_order` needs beside the states of the generators; None for samplers it does not know."""
    if type(loader.batch_sampler) is not BatchSampler or loader.batch_sampler.sampler is not loader.sampler:
        return None
    return _describe(loader.sampler, type(loader.sampler))


def _describe(sampler: Any, kind: type) -> State | None:
    if kind in (DistributedSampler, UnrepeatedDistributedSampler):
        names = ("shuffle", "seed", "epoch")
        return {
            "kind": "distributed", "total": len(sampler.dataset), **{name: getattr(sampler, name) for name in names}
        }  # fmt: skip
    if kind is SequentialSampler:
        return {"kind": "sequential", "total": len(sampler)}
    if kind is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source):
        return {"kind": "random", "total": len(sampler)}
    return None


def complete_order(order: State, state: Mapping[str, Any]) -> State:
    """Return ``order`` with the states of the generators that its random order came from.

    Args:
        order: From :func:`describe_order`.
        state: What the loader's tracker saved.
    """
    if order["kind"] != "random" or "globals" in order or "generator" in order:
        return order
    generators = state["begun"]["sampler"].get("generators", {})
    own = {path: saved for path, (kind, saved) in generators.items() if kind == "torch"}
    if own:
        # The loader's generator is the sampler's, too, if the loader made the sampler; it draws a seed for workers first.
        draws_seed = ("generator",) in own
        saved = own[("generator",)] if draws_seed else next(iter(own.values()))
        return {**order, "generator": saved[1], "draws_seed": draws_seed}
    if state["first"]:
        return {**order, "globals": state["first"], "draws_seed": False}
    return {**order, "globals": state["begun"]["globals"], "draws_seed": True}


def list_order(order: State) -> list[int]:
    """Return the indices of the whole epoch in the order of a completed description, each once."""
    total = order["total"]
    if order["kind"] == "sequential" or (order["kind"] == "distributed" and not order["shuffle"]):
        return list(range(total))
    if order["kind"] == "distributed":
        generator = torch.Generator()
        generator.manual_seed(order["seed"] + order["epoch"])
        return torch.randperm(total, generator=generator).tolist()
    if "generator" in order:
        own = torch.Generator()
        own.set_state(bytes_tensor(order["generator"]))
        if order["draws_seed"]:
            _draw_seed(own)
        return list(RandomSampler(range(total), generator=own))
    generators = GlobalGenerators()
    present = generators.read()
    generators.write(order["globals"])
    try:
        if order["draws_seed"]:
            _draw_seed(None)
        return list(RandomSampler(range(total)))
    finally:
        generators.write(present)


def _draw_seed(generator: torch.Generator | None) -> None:
    """Draw what torch's DataLoader draws when it begins an epoch."""
    torch.empty((), dtype=torch.int64).random_(generator=generator)


def left_for_rank(order: list[int], num_seen: int, rank: int, size: int) -> list[int]:
    """Return the indices that are left of an epoch for one of ``size`` ranks.

    Example:
        >>> left_for_rank([5, 1, 4, 2, 3, 0], 2, rank=1, size=3)
        [2]
    """
    return order[num_seen:][rank::size]
