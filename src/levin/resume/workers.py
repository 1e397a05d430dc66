"""Starting the workers of a loader so that they record their states, at the start of an epoch or in the middle.

This is how a loader with workers goes on after its first ``n`` batches, as if it had made them:

1. The generators of this process are set to what they were when the workers were started, so that the loader draws the
   seed that it gave to its workers then.
2. The loader is made to start its workers with a sampler that holds its indices back (:class:`HeldSampler`), with a
   ``worker_init_fn`` that sets each worker to its state after its last batch that was seen, and with a ``collate_fn``
   that records its state after each batch from now on.
3. Workers that live for several epochs are told to begin the epoch that was under way, from the states of the generators
   at its start.
4. The sampler is opened: the first ``n`` indices are left out, and the worker whose turn it is gets the next one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

from torch.utils.data import DataLoader, IterableDataset

from levin.resume.sampler_state import HeldSampler
from levin.resume.worker_state import RecordingCollate, RestoringInit, WorkerStateLog
from levin.utilities.types import Batch, StateDict

# Stands for the state of a worker that was too large for its memory.
LOST = "lost"


class Workers:
    """The workers of one iterator, and their recorded states.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
        started_at: The states of the generators when the workers were started.
        states: The states that the workers were started with.
    """

    def __init__(
        self,
        loader: DataLoader[object],
        lookahead: int,
        started_at: StateDict,
        states: Mapping[int, StateDict] | None = None,
    ) -> None:
        self.num_workers: int = loader.num_workers
        self.started_at: StateDict = started_at
        self.offset: int = 0
        self._states: Mapping[int, StateDict] = states or {}
        # Workers that gave their last batch of this epoch before they were started again.
        self._ended: set[int] = {
            worker for worker, state in self._states.items() if state.get("ended") and not state.get("left")
        }
        self._made_before: list[int] = [0] * loader.num_workers
        self._log: WorkerStateLog = WorkerStateLog(loader.num_workers, (loader.prefetch_factor or 2) + lookahead + 3)

    def next_epoch(self) -> Workers:
        """Return the same workers in an epoch that begins now; call it when they are idle."""
        workers = copy.copy(self)
        workers._made_before = [self._log.count(worker) for worker in range(self.num_workers)]
        workers._ended = set()
        workers.offset = 0
        return workers

    def num_made(self, worker: int) -> int:
        """Return how many batches of this epoch ``worker`` has made."""
        return self._log.count(worker) - self._made_before[worker]

    def states(self, num_taken: int) -> list[object]:
        """Return the state of each worker after the first ``num_taken`` batches, which they made in turns."""
        turns = [(worker - self.offset) % self.num_workers for worker in range(self.num_workers)]
        return self.states_after([len(range(turn, num_taken, self.num_workers)) for turn in turns])

    def states_after(self, counts: list[int]) -> list[object]:
        """Return the state of each worker after so many batches of this epoch; None if it has made none at all."""
        states: list[object] = []
        for worker, count in enumerate(counts):
            total = self._made_before[worker] + count
            recorded = self._log.read(worker, total) if total else None
            if recorded is not None:
                # Written by our own worker a moment ago; the state of an epoch before is none to go on from.
                states.append({**pickle.loads(recorded), **({} if count else {"left": True})})
            else:
                states.append(LOST if total else self._states.get(worker))
        return states

    def release(self, iterator: Any, held: HeldSampler, offset: int) -> None:
        """Give the workers their first indices, as the iterator does itself when it is made.

        Args:
            iterator: The loader's iterator.
            held: The sampler that it was made with.
            offset: The worker that gets the first index.
        """
        self.offset = offset % self.num_workers
        for _ in range(self.offset):
            next(iterator._worker_queue_idx_cycle)
        if self._ended:
            # A worker is at the end of its data when it can make no batch, as of these no samples.
            turns = [(self.offset + turn) % self.num_workers for turn in range(self.num_workers)]
            indices = held.stream.indices
            held.stream.indices = chain([[] if worker in self._ended else next(indices) for worker in turns], indices)
        held.stream.is_open = True
        for _ in range(iterator._prefetch_factor * self.num_workers):
            iterator._try_put_index()
        iterator._index_sampler = held.sampler

    @contextmanager
    def recording(self, loader: DataLoader[object], held: HeldSampler) -> Iterator[None]:
        """Let an iterator that is made inside start workers that record, and take its indices from ``held``."""
        batch_size = loader.batch_size if isinstance(loader.dataset, IterableDataset) else None
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        attributes = vars(loader)
        kept = {key: attributes[key] for key in ("collate_fn", "worker_init_fn", name)}
        attributes["collate_fn"] = RecordingCollate(kept["collate_fn"], self._log, batch_size)
        if self._states:
            attributes["worker_init_fn"] = RestoringInit(kept["worker_init_fn"], self._states, kept["collate_fn"])
        attributes[name] = held
        try:
            yield
        finally:
            attributes.update(kept)


def start_workers(
    loader: DataLoader[Any], lookahead: int, epoch_start: StateDict, held: HeldSampler
) -> tuple[Workers, Iterator[Batch]]:
    """Begin an epoch of a loader with workers; they wait for :meth:`Workers.release`.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
        epoch_start: The present states of the generators.
        held: The loader's sampler.
    """
    workers = _living(loader)
    if workers is not None:
        iterator = cast(Any, loader._iterator)
        iterator._index_sampler = held
        iter(loader)
        # The workers have finished what they had to do, and have nothing new yet.
        return workers.next_epoch(), iterator
    workers = Workers(loader, lookahead, epoch_start)
    return workers, _start(loader, workers, held)


def restart_workers(
    loader: DataLoader[Any], lookahead: int, epoch_start: StateDict, started_at: StateDict, states: Mapping[int, StateDict],
    held: HeldSampler, set_back: Callable[[StateDict], None],
) -> tuple[Workers, Iterator[Batch]]:  # fmt: skip
    """Begin an epoch again that was under way; the workers wait for :meth:`Workers.release`.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
        epoch_start: The states of the generators when the epoch began.
        started_at: Their states when the workers were started, in this or an earlier epoch.
        states: The states that the workers get.
        held: The loader's sampler.
        set_back: Sets the generators to states like ``epoch_start``.
    """
    loader._iterator = None
    workers = Workers(loader, lookahead, started_at, states)
    set_back(started_at)
    iterator = _start(loader, workers, held)
    if loader.persistent_workers and started_at is not epoch_start:
        set_back(epoch_start)
        iterator._reset(loader)
    return workers, iterator


def _start(loader: DataLoader[Any], workers: Workers, held: HeldSampler) -> Any:
    with workers.recording(loader, held):
        iterator: Any = iter(loader)
    iterator._levin_workers = workers
    return iterator


def _living(loader: DataLoader[object]) -> Workers | None:
    """Return the workers of an earlier epoch that are still there and record; end those that do not."""
    if not loader.persistent_workers or loader._iterator is None:
        return None
    workers: Workers | None = getattr(loader._iterator, "_levin_workers", None)
    if workers is None:
        loader._iterator = None
    return workers
