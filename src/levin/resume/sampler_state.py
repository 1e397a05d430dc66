"""The samplers of a DataLoader: their state when an epoch begins, and the indices that they give.

An order of samples is not saved. The samplers are set to what they were when the epoch began and asked again, without
loading anything. That is exact for samplers that draw when they are asked for the first index, or in ``iter()``, from
the global generators or from generators that they hold. Of those that torch does not ship a checksum of the indices is
kept, so that it is seen, and said, when the same states give another order.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from levin.data.combined import is_stateful
from levin.data.loaders import known_length
from levin.data.samplers import UnrepeatedDistributedSampler
from levin.resume.held_generators import find_generators, read_generators, write_generators
from levin.utilities.types import StateDict

_KNOWN = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    UnrepeatedDistributedSampler,
)


def index_sampler(loader: DataLoader[object]) -> Any:
    """Return what gives the loader the indices of its batches (or of its samples, if it does not batch)."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def innermost(sampler: object) -> object:
    """Return the sampler that a batch sampler, or a wrapper for several ranks, draws from."""
    return list(_nested(sampler))[-1]


def _nested(sampler: object) -> Iterator[object]:
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)


def is_known(sampler: object) -> bool:
    """Return whether ``sampler`` is one of torch's, which give the same order from the same states."""
    return type(sampler) in _KNOWN or (type(sampler) is BatchSampler and type(sampler.sampler) in _KNOWN)


def draws_globally(sampler: object) -> bool:
    """Return whether the order of ``sampler`` comes from global generators: not that of one of torch's with a fixed seed."""
    return type(innermost(sampler)) not in (SequentialSampler, DistributedSampler, UnrepeatedDistributedSampler)


def shape_of(loader: DataLoader[object]) -> StateDict:
    """Return the settings of ``loader`` that must be the same for an exact resume."""
    sampler = index_sampler(loader)
    inner = getattr(sampler, "sampler", sampler)
    return {
        "batch_size": loader.batch_size if isinstance(loader.batch_size, int) else getattr(sampler, "batch_size", None),
        "num_replicas": getattr(inner, "num_replicas", 1),
        "num_samples": known_length(inner),
    }


class SamplerState:
    """Reads and sets the generators that a loader and its samplers hold, and the samplers' own ``state_dict``.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: DataLoader[object]) -> None:
        sampler = index_sampler(loader)
        self._owners: StateDict = {"generator": loader.generator, "sampler": sampler}
        # What the data set holds is kept with the data set, in the process that loads the samples.
        self._leave_out: set[int] = {id(loader.dataset)}
        # Torch's own samplers hold one generator at most: while it is the same, there is nothing to search.
        self._inner: object = innermost(sampler) if is_known(sampler) else None
        self._found: tuple[object, dict[Any, object]] | None = None
        self._stateful: dict[int, Any] = {
            depth: nested for depth, nested in enumerate(_nested(sampler)) if is_stateful(nested)
        }

    def read(self) -> StateDict:
        """Return the present state."""
        return {
            "generators": read_generators(self._find()),
            "own": {depth: copy.deepcopy(sampler.state_dict()) for depth, sampler in self._stateful.items()},
        }

    def _find(self) -> dict[Any, object]:
        if self._inner is None:
            return find_generators(self._owners, self._leave_out)
        generator = getattr(self._inner, "generator", None)
        if self._found is None or self._found[0] is not generator:
            self._found = generator, find_generators(self._owners, self._leave_out)
        return self._found[1]

    def write(self, state: Mapping[str, Any]) -> None:
        """Set what :meth:`read` returned."""
        for depth, own in state["own"].items():
            if depth in self._stateful:
                self._stateful[depth].load_state_dict(copy.deepcopy(own))
        write_generators(self._owners, state["generators"], self._leave_out)


class IndexStream(Iterator[Any]):
    """The indices of one epoch, which a loader takes from its sampler one batch after the other.

    Args:
        indices: The sampler's iterator.
        is_checked: Whether to keep a checksum of the indices.
    """

    def __init__(self, indices: Iterator[object], is_checked: bool) -> None:
        self.indices: Iterator[object] = indices
        self.is_open: bool = True
        self.is_checked: bool = is_checked
        self.num_taken: int = 0
        self.checksum: int = 0

    def __next__(self) -> object:
        if not self.is_open:
            raise StopIteration
        index = next(self.indices)
        self.num_taken += 1
        if self.is_checked:
            self.checksum = zlib.crc32(repr(index).encode(), self.checksum)
        return index

    def draw_order(self) -> None:
        """Take the first index and keep it for later: with it, samplers draw the order of the whole epoch."""
        self.indices = chain(list(islice(self.indices, 1)), self.indices)

    def skip(self, num_indices: int) -> None:
        """Go on without giving the next indices out."""
        self.is_open = True
        for _ in islice(self, num_indices):
            pass

    def state(self) -> StateDict:
        """Return what shows whether the indices are the same when they are drawn again."""
        return {"num_taken": self.num_taken, "checksum": self.checksum} if self.is_checked else {}


class HeldSampler(Sampler[Any]):
    """Stands in for a sampler while workers are started, and gives nothing until its stream is opened.

    A loader with workers sends them indices as soon as it is made. In the middle of an epoch that is too early: the
    indices that were seen must be left out, and the worker whose turn it is must get the first one.

    Args:
        sampler: The sampler.
        is_checked: See :class:`IndexStream`.
    """

    def __init__(self, sampler: object, is_checked: bool) -> None:
        self.sampler: Any = sampler
        self.is_checked: bool = is_checked
        self.stream: IndexStream = IndexStream(iter(()), is_checked)

    def __iter__(self) -> IndexStream:
        # `iter` of the sampler is called when the loader calls it: some samplers draw there.
        self.stream = IndexStream(iter(self.sampler), self.is_checked)
        self.stream.is_open = False
        return self.stream

    def __len__(self) -> int:
        return len(self.sampler)
