"""Samplers for many ranks and for predictions."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import chain, cycle, islice
from typing import Any, cast

from torch.utils.data import BatchSampler, Sampler
from torch.utils.data.distributed import DistributedSampler

UNSPLIT = "pass use_distributed_sampler=False to the Trainer or to fabric.setup_dataloaders"
"""The way out for loaders that cannot be split."""


class UnrepeatedDistributedSampler(DistributedSampler[Any]):
    """Splits the data between ranks without repeating samples to make the parts equal."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.total_size = len(cast("Sized", self.dataset))
        self.num_samples = len(range(self.rank, self.total_size, self.num_replicas))
        self.drop_last = False

    def __iter__(self) -> Iterator[object]:
        import torch

        indices = list(range(self.total_size))
        if self.shuffle:
            generator = torch.Generator()
            generator.manual_seed(self.seed + self.epoch)
            indices = torch.randperm(self.total_size, generator=generator).tolist()
        return iter(indices[self.rank : self.total_size : self.num_replicas])


class _SampledIndices:
    """The indices of a user's sampler as a dataset, of which the length alone is asked for."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        try:
            return len(self.sampler)
        except TypeError:
            raise TypeError(
                f"The sampler {type(self.sampler).__name__} must have a length to be split between ranks. Define __len__, "
                f"or {UNSPLIT}."
            ) from None


class DistributedSamplerWrapper(DistributedSampler[Any]):
    """Splits what a user's own sampler draws between ranks."""

    def __init__(self, sampler: object, *args: object, **kwargs: object) -> None:
        super().__init__(_SampledIndices(sampler), *args, **{**kwargs, "shuffle": False})  # type: ignore[arg-type]

    @property
    def sampler(self) -> Any:
        """The user's sampler."""
        source: Any = self.dataset
        return source.sampler

    def __iter__(self) -> Iterator[object]:
        # As many as it really draws: its length may be an estimate.
        drawn = list(self.sampler)
        lacking = -len(drawn) % self.num_replicas
        return islice(chain(drawn, islice(cycle(drawn), lacking)), self.rank, None, self.num_replicas)


class UnrepeatedSamplerWrapper(DistributedSamplerWrapper, UnrepeatedDistributedSampler):
    """Splits what a user's own sampler draws between ranks without repeating any of it."""

    def __iter__(self) -> Iterator[object]:
        return iter(list(self.sampler)[self.rank :: self.num_replicas])


class IndexBatchSampler(BatchSampler):
    """Draws batches from another batch sampler and remembers the indices of each.

    Args:
        batch_sampler: Where the batches come from.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self._batch_sampler = batch_sampler
        self.batch_size: int = getattr(batch_sampler, "batch_size", 1)
        self.drop_last: bool = getattr(batch_sampler, "drop_last", False)
        self.sampler: Sampler[object] = getattr(batch_sampler, "sampler", None)  # type: ignore[assignment]
        self.seen_batch_indices: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        self.seen_batch_indices = []
        for batch in self._batch_sampler:
            self.seen_batch_indices.append(list(batch))
            yield batch

    def __len__(self) -> int:
        return len(self._batch_sampler)
