"""Starting the workers of a loader so that they record their states, at the start of an epoch or in the middle."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch.utils.data import DataLoader, IterableDataset

from levin.resume.sampling import Gate, Steps, index_sampler
from levin.resume.worker_state import Ledger, RecordingCollate, RestoringInit

State = dict[str, Any]
# Stands for the state of a worker that was too large for its memory.
LOST = "lost"


class Workers:
    """The workers of one iterator, and their recorded states.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
        birth: The states of the generators when the workers were started.
        states: The states that they were started with.
    """

    def __init__(
        self, loader: DataLoader[Any], lookahead: int, birth: State, states: Mapping[int, State] | None = None
    ) -> None:
        self.num_workers: int = loader.num_workers
        self.birth: State = birth
        self.offset: int = 0
        self.steps: Steps | None = None
        self._states: Mapping[int, State] = states or {}
        self._begun: list[int] = [0] * loader.num_workers
        self._ledger: Ledger = Ledger(loader.num_workers, (loader.prefetch_factor or 2) + lookahead + 3)

    def begin_epoch(self) -> None:
        """Remember what the workers have made so far; call it when they are idle."""
        self._begun = [self._ledger.count(worker) for worker in range(self.num_workers)]
        self.offset = 0

    def num_made(self, worker: int) -> int:
        """Return how many batches of this epoch ``worker`` has made."""
        return self._ledger.count(worker) - self._begun[worker]

    def states(self, num_taken: int) -> list[Any]:
        """Return the state of each worker after the first ``num_taken`` batches, which they made in turns."""
        return self.states_after(
            [
                max(0, -(-(num_taken - (worker - self.offset) % self.num_workers) // self.num_workers))
                for worker in range(self.num_workers)
            ]
        )

    def states_after(self, counts: list[int]) -> list[Any]:
        """Return the state of each worker after so many batches of this epoch; None if it has made none at all."""
        states: list[Any] = []
        for worker, count in enumerate(counts):
            total = self._begun[worker] + count
            recorded = self._ledger.read(worker, total) if total else None
            if recorded is not None:
                # Written by our own worker a moment ago.
                states.append(pickle.loads(recorded))
            else:
                states.append(LOST if total else self._states.get(worker))
        return states

    @contextmanager
    def recording(self, loader: DataLoader[Any], sampler: Any) -> Iterator[None]:
        """Let an iterator that is made inside start workers that record, and take its indices from ``sampler``."""
        batch_size = loader.batch_size if isinstance(loader.dataset, IterableDataset) else None
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        attributes = vars(loader)
        kept = {key: attributes[key] for key in ("collate_fn", "worker_init_fn", name)}
        attributes["collate_fn"] = RecordingCollate(kept["collate_fn"], self._ledger, batch_size)
        if self._states:
            attributes["worker_init_fn"] = RestoringInit(kept["worker_init_fn"], self._states, kept["collate_fn"])
        attributes[name] = sampler
        try:
            yield
        finally:
            attributes.update(kept)


def start_workers(
    loader: DataLoader[Any], lookahead: int, begun: State, is_watched: bool
) -> tuple[Workers, Iterator[Any]]:
    """Begin an epoch of a loader with workers.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
        begun: The present states of the generators.
        is_watched: Whether the sampler is watched.
    """
    sampler = index_sampler(loader)
    workers = _living(loader)
    if workers is not None:
        gate = Gate(sampler, is_open=False, is_watched=is_watched)
        return workers, _begin_again(loader, workers, gate, 0)
    workers = Workers(loader, lookahead, begun)
    gate = Gate(sampler, is_open=True, is_watched=is_watched)
    with workers.recording(loader, gate if is_watched else sampler):
        iterator: Any = iter(loader)
    iterator._levin_workers = workers
    iterator._index_sampler = sampler
    workers.steps = gate.steps
    return workers, iterator


def resume_workers(
    loader: DataLoader[Any],
    lookahead: int,
    begun: State,
    birth: State | None,
    states: Mapping[int, State],
    gate: Gate,
    num_skipped: int,
    set_back: Any,
    skips: bool = True,
) -> tuple[Workers, Iterator[Any]]:
    """Go on in the middle of an epoch of a loader with workers.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
        begun: The states of the generators when the epoch began.
        birth: Their states when the workers were started, in this or an earlier epoch.
        states: The states that the workers get.
        gate: The sampler, closed.
        num_skipped: How many batches are left out; the worker whose turn it is follows from it.
        set_back: Sets the generators to states like ``begun``.
        skips: Whether the sampler gives the indices of those batches.
    """
    birth = begun if birth is None else birth
    loader._iterator = None
    workers = Workers(loader, lookahead, birth, states)
    # The workers' seed comes from the generators as they were when the workers were started.
    set_back(birth)
    with workers.recording(loader, gate):
        iterator: Any = iter(loader)
    iterator._levin_workers = workers
    if loader.persistent_workers and birth is not begun:
        set_back(begun)
        iterator._reset(loader)
    _open_gate(iterator, workers, gate, num_skipped, skips)
    return workers, iterator


def _living(loader: DataLoader[Any]) -> Workers | None:
    """Return the workers of an earlier epoch that are still there and record; end those that do not."""
    if not loader.persistent_workers or loader._iterator is None:
        return None
    workers: Workers | None = getattr(loader._iterator, "_levin_workers", None)
    if workers is None:
        loader._iterator = None
    return workers


def _begin_again(loader: DataLoader[Any], workers: Workers, gate: Gate, num_skipped: int) -> Iterator[Any]:
    iterator = cast(Any, loader._iterator)
    iterator._index_sampler = gate
    iter(loader)
    # The workers have finished what they had to do, and have nothing new yet.
    workers.begin_epoch()
    _open_gate(iterator, workers, gate, num_skipped, skips=True)
    return cast("Iterator[Any]", iterator)


def _open_gate(iterator: Any, workers: Workers, gate: Gate, num_skipped: int, skips: bool) -> None:
    """Give the workers their first indices, as the iterator does itself when it is made."""
    steps = gate.steps
    assert steps is not None
    steps.is_open = True
    if skips:
        steps.skip(num_skipped)
    workers.steps = steps
    workers.offset = num_skipped % workers.num_workers
    for _ in range(workers.offset):
        next(iterator._worker_queue_idx_cycle)
    for _ in range(iterator._prefetch_factor * workers.num_workers):
        iterator._try_put_index()
    iterator._index_sampler = gate.sampler
