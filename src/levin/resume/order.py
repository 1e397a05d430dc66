"""The order in which all ranks together go through a data set, so that another number of ranks can go on in it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from levin.data.samplers import UnrepeatedDistributedSampler
from levin.resume.sampler_state import innermost
from levin.utilities.rng_states import bytes_tensor, tensor_bytes

Order = dict[str, Any]


def describe_order(loader: DataLoader[object]) -> Order | None:
    """Return what :func:`list_order` needs to list the epoch whose order is drawn next; None if only the sampler knows.

    Returns:
        The number of samples, with the seed or the state of the generator that their order is drawn with.
    """
    batch_sampler = loader.batch_sampler
    if type(batch_sampler) is not BatchSampler or batch_sampler.sampler is not loader.sampler:
        return None
    sampler: Any = loader.sampler
    kind: object = type(sampler)
    if kind in (DistributedSampler, UnrepeatedDistributedSampler):
        order = {"total": len(sampler.dataset)}
        return {**order, "seed": sampler.seed + sampler.epoch} if sampler.shuffle else order
    if kind is SequentialSampler:
        return {"total": len(sampler)}
    if kind is not RandomSampler or sampler.replacement or sampler.num_samples != len(sampler.data_source):
        return None
    if sampler.generator is not None:
        return {"total": len(sampler), "generator": tensor_bytes(sampler.generator.get_state())}
    return {"total": len(sampler), "seed": _next_seed()}


def _next_seed() -> int:
    """Return the seed that torch's RandomSampler is about to draw from the global generator, without drawing it."""
    generator = torch.Generator()
    generator.set_state(torch.get_rng_state())
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


def list_order(order: Order) -> list[int]:
    """Return the indices of the whole epoch in the order that :func:`describe_order` has described, each once."""
    if "seed" not in order and "generator" not in order:
        return list(range(order["total"]))
    generator = torch.Generator()
    if "seed" in order:
        generator.manual_seed(order["seed"])
    else:
        generator.set_state(bytes_tensor(order["generator"]))
    return torch.randperm(order["total"], generator=generator).tolist()


class Rest(Sampler[int]):
    """What is left for one rank of an epoch that other ranks, or batches of another size, have begun.

    Args:
        order: Of the epoch; None to ask the sampler again, which is in the state that it drew its order in.
        sampler: The sampler of this rank.
        num_seen: Samples that all ranks together have seen.

    Example:
        >>> list(Rest({"total": 6}, SequentialSampler(range(6)), num_seen=2))
        [2, 3, 4, 5]
    """

    def __init__(self, order: Order | None, sampler: object, num_seen: int) -> None:
        self.order: Order | None = order
        self.sampler: Any = innermost(sampler)
        self.num_seen: int = num_seen
        self.rank: int = getattr(sampler, "rank", 0)
        self.num_replicas: int = getattr(sampler, "num_replicas", 1)

    def __iter__(self) -> Iterator[int]:
        whole = self.sampler if self.order is None else list_order(self.order)
        return islice(iter(whole), self.num_seen + self.rank, None, self.num_replicas)

    def __len__(self) -> int:
        total = len(self.sampler) if self.order is None else self.order["total"]
        return len(range(self.num_seen + self.rank, total, self.num_replicas))
