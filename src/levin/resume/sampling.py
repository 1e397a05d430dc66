"""What a loader's samplers are like at the start of an epoch, and going again through what they drew.

An order of samples is not saved: the samplers are set to what they were when the epoch began and asked again, without
loading anything.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
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
from levin.data.samplers import UnrepeatedDistributedSampler
from levin.resume.rng_states import (
    ALL,
    TORCH,
    GlobalGenerators,
    Path,
    State,
    find_generators,
    read_generators,
    write_generators,
)

# Samplers that use no generator but torch's, and that at the start of the iteration only.
_KNOWN = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    UnrepeatedDistributedSampler,
)
_SCALARS = (bool, int, float, str, type(None))
_MAX_HISTORY = 4096
# A sampler that takes numbers from `random` in the middle of an epoch shows it in its first batches.
_NUM_WATCHED = 16


def index_sampler(loader: DataLoader[Any]) -> Any:
    """Return what gives the loader the indices of its batches (or of its samples, if it does not batch)."""
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def is_known(sampler: Any) -> bool:
    """Return whether ``sampler`` is one whose use of random numbers is known."""
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) in _KNOWN


def generators_used(loader: DataLoader[Any]) -> tuple[str, ...]:
    """Return the names of the global generators that starting an epoch of ``loader`` may draw from."""
    return TORCH if is_known(index_sampler(loader)) else ALL


class SamplerState:
    """Reads and sets the generators and attributes of a loader's samplers.

    Attributes that never change (sizes, ranks, ...) belong to the user's settings; saved are those that have
    changed since this object was made, such as a counter of epochs or a list that is shuffled in place.

    Args:
        loader: The loader, before its first epoch.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        sampler = index_sampler(loader)
        self._owners: dict[str, Any] = {"generator": loader.generator, "sampler": sampler}
        self._leave_out: set[int] = {id(loader.dataset)}
        self._samplers: dict[Path, Any] = {} if is_known(sampler) else dict(_nested(sampler, loader.dataset))
        self._initial: dict[Path, Any] = {path: _fingerprint(value) for path, value in self._attributes()}

    def read(self) -> State:
        """Return the present state."""
        state: State = {}
        generators = find_generators(self._owners, self._leave_out)
        if generators:
            state["generators"] = read_generators(generators)
        own = {path: copy.deepcopy(obj.state_dict()) for path, obj in self._samplers.items() if is_stateful(obj)}
        if own:
            state["own"] = own
        changed = {
            path: _packed(value) for path, value in self._attributes() if _fingerprint(value) != self._initial.get(path)
        }
        if changed:
            state["attributes"] = changed
        return state

    def write(self, state: Mapping[str, Any]) -> None:
        """Set what :meth:`read` returned."""
        for path, own in state.get("own", {}).items():
            if path in self._samplers:
                self._samplers[path].load_state_dict(copy.deepcopy(own))
        for (*owner, name), value in state.get("attributes", {}).items():
            if tuple(owner) in self._samplers:
                vars(self._samplers[tuple(owner)])[name] = _unpacked(value)
        write_generators(self._owners, state.get("generators", {}), self._leave_out)

    def _attributes(self) -> Iterator[tuple[Path, Any]]:
        for path, sampler in self._samplers.items():
            for name, value in vars(sampler).items():
                if isinstance(value, _SCALARS) or _is_array(value):
                    yield (*path, name), value


def _nested(sampler: Any, dataset: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if not hasattr(sampler, "__dict__") or sampler is dataset:
        return
    yield path, sampler
    for name, value in vars(sampler).items():
        if isinstance(value, Sampler) or name in ("sampler", "batch_sampler"):
            yield from _nested(value, dataset, (*path, name))


def _is_array(value: Any) -> bool:
    if isinstance(value, torch.Tensor) or type(value).__name__ == "ndarray":
        return True
    return isinstance(value, (list, tuple)) and all(isinstance(item, (int, float)) for item in value)


def _fingerprint(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return hash(tuple(value))
    if isinstance(value, torch.Tensor):
        return hash(tuple(value.flatten().tolist()))
    return zlib.crc32(value.tobytes()) if type(value).__name__ == "ndarray" else value


def _packed(value: Any) -> Any:
    if type(value).__name__ == "ndarray":
        return ("ndarray", value.dtype.str, value.shape, value.tobytes())
    return copy.deepcopy(value)


def _unpacked(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 4 and value[0] == "ndarray":
        import numpy

        return numpy.frombuffer(value[3], dtype=value[1]).reshape(value[2]).copy()
    return copy.deepcopy(value)


class Steps(Iterator[Any]):
    """Goes through the indices that a sampler gives, batch by batch.

    Samplers draw when they are asked for the first batch, or in ``iter()``; then going through them again from the
    same states is exact. One that goes on drawing from a global generator gets in between other draws of the run. For
    samplers that are not known, this is watched: the states before such a step are kept, and used when going again.

    Args:
        indices: The sampler's iterator.
        is_watched: Whether to watch it.
        history: What was kept when these steps were gone through before.
    """

    def __init__(self, indices: Iterator[Any], is_watched: bool, history: Mapping[str, Any] | None = None) -> None:
        self.indices: Iterator[Any] = indices
        self.is_open: bool = True
        self.num_taken: int = 0
        self.history: dict[int, State] = dict((history or {}).get("states", {}))
        self.is_incomplete: bool = bool((history or {}).get("is_incomplete", False))
        self.checksum: int = 0
        self._num_replayed: int = (history or {}).get("num_taken", 0)
        self._is_watched: bool = is_watched
        self._watches_python: bool = True
        self._globals: GlobalGenerators = GlobalGenerators()

    def __next__(self) -> Any:
        if not self.is_open:
            raise StopIteration
        number = self.num_taken
        if not self._is_watched:
            item = next(self.indices)
        elif number < self._num_replayed:
            item = self._again(number)
        elif number == 0:
            item = next(self.indices)
        else:
            item = self._watched(number)
        self.num_taken = number + 1
        if self._is_watched:
            self.checksum = zlib.crc32(repr(item).encode(), self.checksum)
        return item

    def skip(self, num_steps: int) -> bool:
        """Go on without giving the indices out. Returns False if there are not that many."""
        return all(next(self, self) is not self for _ in range(num_steps))

    def stop_replaying(self) -> None:
        """Take the following steps from the present states of the generators, not from those that were kept."""
        self._num_replayed = self.num_taken

    def state(self) -> State:
        """Return what going again through these steps needs."""
        if not self._is_watched:
            return {}
        return {
            "states": self.history,
            "num_taken": self.num_taken,
            "checksum": self.checksum,
            "is_incomplete": self.is_incomplete,
        }

    def _again(self, number: int) -> Any:
        states = self.history.get(number)
        if states is None:
            return next(self.indices)
        present = self._globals.read()
        self._globals.write(states)
        try:
            return next(self.indices)
        finally:
            self._globals.write(present)

    def _watched(self, number: int) -> Any:
        names = ALL if self._watches_python else ("torch", "numpy")
        before = self._globals.read(names)
        item = next(self.indices)
        after = self._globals.read(names)
        drawn = {name: state for name, state in before.items() if after.get(name) != state}
        if drawn:
            if len(self.history) < _MAX_HISTORY:
                self.history[number] = drawn
            else:
                self.is_incomplete = True
        elif number >= _NUM_WATCHED and "python" not in self._drawn_names():
            self._watches_python = False
        return item

    def _drawn_names(self) -> set[str]:
        return {name for states in self.history.values() for name in states}


class Gate(Sampler[Any]):
    """Stands in for a sampler while an iterator is made, so that nothing is taken from it before it is wanted.

    Args:
        sampler: The sampler.
        is_open: Whether indices may be taken at once.
        is_watched: See :class:`Steps`.
        history: See :class:`Steps`.
    """

    def __init__(self, sampler: Any, is_open: bool, is_watched: bool, history: Mapping[str, Any] | None = None) -> None:
        self.sampler: Any = sampler
        self.is_open: bool = is_open
        self.is_watched: bool = is_watched
        self.history: Mapping[str, Any] | None = history
        self.steps: Steps | None = None

    def __iter__(self) -> Steps:
        # `iter` of the sampler is called when the loader calls it: some samplers draw there.
        self.steps = Steps(iter(self.sampler), self.is_watched, self.history)
        self.steps.is_open = self.is_open
        return self.steps

    def __len__(self) -> int:
        return len(self.sampler)


class _Rest(Sampler[Any]):
    """A sampler without its first samples, which another number of processes has seen already."""

    def __init__(self, sampler: Any, num_seen: int) -> None:
        self.sampler: Any = sampler
        self.num_seen: int = num_seen

    def __iter__(self) -> Iterator[Any]:
        for number, index in enumerate(self.sampler):
            if number >= self.num_seen:
                yield index

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.num_seen)


def without_samples(sampler: BatchSampler, num_seen: int) -> BatchSampler:
    """Return a batch sampler like ``sampler`` that leaves out the first ``num_seen`` samples."""
    return BatchSampler(_Rest(sampler.sampler, num_seen), sampler.batch_size, sampler.drop_last)


def begun_now(indices: Iterator[Any]) -> Iterator[Any]:
    """Return an iterator like ``indices`` whose first item is drawn at once: many samplers draw their order with it."""
    return chain(list(islice(indices, 1)), indices)


def samples_seen(num_global: int, sampler: Any) -> int:
    """Return how many of its own samples a process leaves out when all processes together have seen ``num_global``."""
    if not isinstance(sampler, DistributedSampler):
        return num_global
    return max(0, -(-(num_global - sampler.rank) // sampler.num_replicas))


def shape_of(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the settings of ``loader`` that must be the same for an exact resume."""
    sampler = index_sampler(loader)
    inner = getattr(sampler, "sampler", sampler)
    return {
        "batch_size": loader.batch_size if isinstance(loader.batch_size, int) else getattr(sampler, "batch_size", None),
        "num_replicas": getattr(inner, "num_replicas", 1),
        "num_workers": loader.num_workers,
        "num_samples": _length(inner),
    }


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None
