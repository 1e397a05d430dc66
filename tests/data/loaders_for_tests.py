"""Data sets and samplers that use random numbers in every way there is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

SIZE = 23


class Augmented(Dataset):
    """Samples with noise from the given sources."""

    def __init__(self, sources: str = "", size: int = SIZE):
        self.sources = sources
        self.size = size
        self.own = [numpy.random.default_rng(5), random.Random(6)]
        if "g" in sources:  # PyTorch cannot send one to a spawned worker
            self.own.append(torch.Generator().manual_seed(7))
        self.legacy = {"state": numpy.random.RandomState(8)}
        self.lazy = None
        self.loaded = []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = 0.0
        if "t" in self.sources:
            noise += torch.rand(()).item()
        if "p" in self.sources:
            noise += random.random() + random.gauss(0, 1)
        if "n" in self.sources:
            noise += numpy.random.rand() + numpy.random.randn()
        if "o" in self.sources:
            noise += self.own[0].random() + self.own[1].random() + self.legacy["state"].randn()
        if "g" in self.sources:
            noise += torch.rand((), generator=self.own[2]).item()
        if "l" in self.sources:
            if self.lazy is None:
                info = get_worker_info()
                self.lazy = numpy.random.default_rng(0 if info is None else info.seed)
            noise += self.lazy.random()
        info = get_worker_info()
        worker = -1 if info is None else info.id
        return index, noise, worker


class EagerPython(Sampler):
    def __iter__(self) -> Iterator[int]:
        order = list(range(SIZE))
        random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SIZE


class LazyGlobals(Sampler):
    """Draws each index when it is asked for, from all three global generators."""

    def __iter__(self) -> Iterator[int]:
        for number in range(SIZE):
            if number % 3 == 0:
                yield random.randrange(SIZE)
            elif number % 3 == 1:
                yield int(torch.randint(SIZE, ()))
            else:
                yield int(numpy.random.randint(SIZE))

    def __len__(self) -> int:
        return SIZE


class Blind(Sampler):
    """Shuffles the same list again in every epoch, and counts the epochs, but cannot say where it is."""

    def __init__(self) -> None:
        self.order = list(range(SIZE))
        self.epoch = 0
        self.rng = random.Random(3)

    def __iter__(self) -> Iterator[int]:
        self.rng.shuffle(self.order)
        self.epoch += 1
        return iter([(index + self.epoch) % SIZE for index in self.order])

    def __len__(self) -> int:
        return SIZE


class InPlace(Blind):
    def state_dict(self):
        return {"order": self.order, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.order, self.epoch = state["order"], state["epoch"]


class Buckets(Sampler):
    """A batch sampler of its own kind, with batches of several sizes."""

    def __init__(self) -> None:
        self.rng = numpy.random.default_rng(9)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.rng.permutation(SIZE).tolist()
        while order:
            size = int(self.rng.integers(1, 5))
            yield order[:size]
            order = order[size:]

    def __len__(self) -> int:
        return SIZE // 4


SAMPLERS: dict[str, Callable[[Dataset], dict[str, Any]]] = {
    "sequential": lambda data: {},
    "shuffle": lambda data: {"shuffle": True},
    "shuffle_generator": lambda data: {"shuffle": True, "generator": torch.Generator().manual_seed(1)},
    "replacement": lambda data: {"sampler": RandomSampler(data, replacement=True, num_samples=90)},
    "replacement_generator": lambda data: {
        "sampler": RandomSampler(data, replacement=True, num_samples=90, generator=torch.Generator().manual_seed(2))
    },
    "weighted": lambda data: {"sampler": WeightedRandomSampler(torch.arange(1.0, SIZE + 1), 30)},
    "subset": lambda data: {"sampler": SubsetRandomSampler(range(3, SIZE))},
    "batch_sampler": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 3, drop_last=True)},
    "plain_list": lambda data: {"sampler": [5, 4, 3, 2, 1, 0] * 4},
    "eager_python": lambda data: {"sampler": EagerPython()},
    "lazy_globals": lambda data: {"sampler": LazyGlobals()},
    "in_place": lambda data: {"sampler": InPlace()},
    "blind": lambda data: {"sampler": Blind()},
    "buckets": lambda data: {"batch_sampler": Buckets()},
    "no_batches": lambda data: {"sampler": SequentialSampler(data), "batch_size": None},
}


# Those that give the same order when they are set to what they were at the start of the epoch.
RESUMABLE = sorted(set(SAMPLERS) - {"lazy_globals", "blind"})


def noisy_collate(samples: Any) -> Any:
    return [samples, random.random(), torch.rand(()).item()]


def noisy_init(worker: int) -> None:
    random.seed(worker + random.randrange(1000))


@dataclass(frozen=True)
class Config:
    sampler: str = "shuffle"
    sources: str = "tpn"
    batch_size: int = 3
    num_workers: int = 0
    persistent: bool = False
    prefetch: int = 2
    collates: bool = False
    inits: bool = False
    context: str | None = None

    def make(self) -> DataLoader:
        """Return a new loader, as a new process would make it."""
        data = Augmented(self.sources)
        arguments: dict[str, Any] = {"batch_size": self.batch_size, **SAMPLERS[self.sampler](data)}
        if "batch_sampler" in arguments:
            del arguments["batch_size"]
        if self.num_workers:
            arguments.update(persistent_workers=self.persistent, prefetch_factor=self.prefetch)
            if self.inits:
                arguments.update(worker_init_fn=noisy_init)
        arguments["collate_fn"] = noisy_collate if self.collates else as_is
        return DataLoader(data, num_workers=self.num_workers, multiprocessing_context=self.context, **arguments)


def as_is(samples: Any) -> Any:
    return samples


class Stream(IterableDataset):
    """Numbers, split between workers; remembers where it is."""

    def __init__(self, sizes: list[int], noise: bool = True, resets: bool = False):
        self.sizes = sizes
        self.noise = noise
        self.resets = resets
        self.start = 0
        self.made = 0

    def __iter__(self):
        info = get_worker_info()
        worker = 0 if info is None else info.id
        size = self.sizes[worker % len(self.sizes)]
        first, self.start = self.start, 0
        for number in range(first, size):
            self.made = number + 1
            yield worker, number, (random.random() if self.noise else 0.0)
        if self.resets:
            self.made = 0


class StatefulStream(Stream):
    def state_dict(self):
        return {"made": self.made}

    def load_state_dict(self, state):
        self.start = self.made = state["made"]


class EagerStream(StatefulStream):
    """Takes note of where it is when it is asked for an iterator, not when that is asked for its first item."""

    def __iter__(self):
        first, self.start = self.start, 0
        return self.numbers(first)

    def numbers(self, first: int) -> Iterator[tuple[int, int, float]]:
        self.start = first
        yield from super().__iter__()


class ContinuingStream(StatefulStream):
    """Goes on where it is in every iteration, and starts again only after its end."""

    def __iter__(self):
        info = get_worker_info()
        worker = 0 if info is None else info.id
        while self.made < self.sizes[worker % len(self.sizes)]:
            self.made += 1
            yield worker, self.made, (random.random() if self.noise else 0.0)
        self.made = 0

    def load_state_dict(self, state):
        self.made = state["made"]


class CountingStream(StatefulStream):
    """Gives other numbers in every epoch, by a counter that is part of its state."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.epoch = 0
        self.goes_on = False

    def __iter__(self):
        self.epoch += not self.goes_on
        self.goes_on = False
        for worker, number, noise in super().__iter__():
            yield worker, number + 100 * self.epoch, noise

    def state_dict(self):
        return {"made": self.made, "epoch": self.epoch}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.epoch = state["epoch"]
        self.goes_on = state["made"] > 0
