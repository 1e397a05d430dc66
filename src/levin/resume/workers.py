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
import math
import pickle
from collections import Counter, deque
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


def _is_at_end(state: Any) -> bool:
    """Whether the worker gave its last batch of the epoch that the state goes on in."""
    return bool(state) and state != LOST and bool(state.get("ended")) and not state.get("left")


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
        # The states of workers that have made no batch of this epoch.
        self._states: Mapping[int, Any] = states or {}
        self._made_before: list[int] = [0] * loader.num_workers
        self._lookahead: int = lookahead
        self._expect(first=0)
        self._log: WorkerStateLog = WorkerStateLog(loader.num_workers, (loader.prefetch_factor or 2) + lookahead + 3)

    def _expect(self, first: int) -> None:
        """Expect the next batch from worker ``first``."""
        self.offset: int = first % self.num_workers
        # Of an iterable data set: the worker that gave each of the last batches, and how many each has given.
        self._givers: deque[int] = deque([first - 1], maxlen=self._lookahead + 2)
        self._num_given: list[int] = [0] * self.num_workers

    def next_epoch(self, loader: DataLoader[object]) -> Workers:
        """Begin another epoch of ``loader``, and return the same workers in it."""
        iterator = cast(Any, loader._iterator)
        # How many batches each was asked for; one that is known to be at its end, for one that it could not make.
        waiting = Counter(task[0] for task in iterator._task_info.values())
        num_asked = [
            given + (waiting[worker] if is_active else math.inf)
            for worker, (given, is_active) in enumerate(zip(self._num_given, iterator._workers_status))
        ]
        # Before they begin, they do all of that.
        iter(loader)
        workers, num_made = copy.copy(self), [self._num_made(worker) for worker in range(self.num_workers)]
        states = self._states_after(num_made)
        for worker, state in enumerate(states):
            if state == LOST:
                continue
            state = state or {}
            # One that made less than it was asked for came to its end, of which no batch tells.
            ends = num_asked[worker] > num_made[worker] and not _is_at_end(state)
            states[worker] = {**state, "left": True, "num_ended": state.get("num_ended", 0) + ends}
        workers._states = dict(enumerate(states))
        workers._made_before = [self._log.count(worker) for worker in range(self.num_workers)]
        workers._expect(first=0)
        iterator._levin_workers = workers
        return workers

    def _num_made(self, worker: int) -> int:
        return self._log.count(worker) - self._made_before[worker]

    def note_given(self) -> None:
        """Find the worker that gave a batch of an iterable data set."""
        # Workers take turns, but for those that have come to their end.
        giver = (self._givers[-1] + 1) % self.num_workers
        while self._num_made(giver) <= self._num_given[giver]:
            giver = (giver + 1) % self.num_workers
        self._num_given[giver] += 1
        self._givers.append(giver)

    def states_before(self, num_in_flight: int) -> tuple[list[object], int]:
        """Return the state of each worker of an iterable data set before the last batches, and who gave the one before."""
        givers = list(self._givers)
        num_known = len(givers) - num_in_flight  # at least one: the deque is longer than what may be in flight
        counts = [given - givers[num_known:].count(worker) for worker, given in enumerate(self._num_given)]
        return self._states_after(counts), givers[num_known - 1]

    def states(self, num_taken: int) -> list[object]:
        """Return the state of each worker after the first ``num_taken`` batches, which they made in turns."""
        turns = [(worker - self.offset) % self.num_workers for worker in range(self.num_workers)]
        return self._states_after([len(range(turn, num_taken, self.num_workers)) for turn in turns])

    def _states_after(self, counts: list[int]) -> list[Any]:
        """Return the state of each worker after so many batches of this epoch; None if it is a new one."""
        states: list[object] = []
        for worker, count in enumerate(counts):
            if not count:
                states.append(self._states.get(worker))
                continue
            recorded = self._log.read(worker, self._made_before[worker] + count)
            # Written by our own worker a moment ago.
            states.append(LOST if recorded is None else pickle.loads(recorded))
        return states

    def release(self, iterator: Any, held: HeldSampler, first: int) -> None:
        """Give the workers their first indices, as the iterator does itself when it is made.

        Args:
            iterator: The loader's iterator.
            held: The sampler that it was made with.
            first: The worker that gets the first index.
        """
        self._expect(first)
        for _ in range(self.offset):
            next(iterator._worker_queue_idx_cycle)
        ended = {worker for worker, state in self._states.items() if _is_at_end(state)}
        if ended:
            # A worker is at the end of its data when it can make no batch, as of these no samples.
            turns = [(self.offset + turn) % self.num_workers for turn in range(self.num_workers)]
            indices = held.stream.indices
            held.stream.indices = chain([[] if worker in ended else next(indices) for worker in turns], indices)
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
    loader: DataLoader[object], lookahead: int, epoch_start: StateDict, held: HeldSampler
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
        return workers.next_epoch(loader), iterator
    workers = Workers(loader, lookahead, epoch_start)
    return workers, _start(loader, workers, held)


def restart_workers(
    loader: DataLoader[object], lookahead: int, epoch_start: StateDict, started_at: StateDict, states: Mapping[int, StateDict],
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
    if loader.persistent_workers and started_at is not epoch_start and not isinstance(loader.dataset, IterableDataset):
        # A sampler draws for this epoch; iterating a data set twice would use up the place that it was set to.
        set_back(epoch_start)
        iterator._reset(loader)
    return workers, iterator


def _start(loader: DataLoader[object], workers: Workers, held: HeldSampler) -> Any:
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
