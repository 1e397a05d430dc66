"""How the place in a loader is kept and found again, for each kind of loader."""

from __future__ import annotations

import math
import pickle
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from levin.data.combined import is_stateful
from levin.data.generators import GlobalGenerators
from levin.data.sampling import (
    Gate,
    SamplerState,
    Steps,
    generators_used,
    index_sampler,
    is_known,
    samples_seen,
    shape_of,
    without_samples,
)
from levin.data.workers import Ledger, RecordingCollate, RestoringInit, WorkerState
from levin.utilities.rank_zero import rank_zero_warn

State = dict[str, Any]
_END: Any = object()


def tracker_for(loader: Any, lookahead: int = 0) -> Tracker:
    """Return the tracker for this kind of loader."""
    if is_stateful(loader):
        return StatefulTracker(loader, lookahead)
    if _is_plain(loader):
        if not isinstance(loader.dataset, IterableDataset):
            return IndexTracker(loader, lookahead)
        if is_stateful(loader.dataset):
            return IterableTracker(loader, lookahead)
    return ReplayTracker(loader, lookahead)


def _is_plain(loader: Any) -> bool:
    """Whether the batches of ``loader`` correspond to the indices of its sampler, one to one."""
    kind: Any = type(loader)
    return (
        isinstance(loader, DataLoader)
        and kind.__iter__ is DataLoader.__iter__
        and kind._get_iterator is DataLoader._get_iterator
        and {"sampler", "batch_sampler", "collate_fn"} <= vars(loader).keys()
    )


class Tracker(ABC):
    """Starts one loader, says where it is, and starts it there again.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
    """

    kind: str

    def __init__(self, loader: Any, lookahead: int) -> None:
        self.loader: Any = loader
        self.lookahead: int = lookahead
        self.follows_pulls: bool = lookahead > 0
        self.globals: GlobalGenerators = GlobalGenerators()
        self.begun: State = {}
        # The states before each of the last batches, the oldest first.
        self.befores: deque[Any] = deque(maxlen=lookahead + 1)

    @abstractmethod
    def start(self) -> Iterator[Any]:
        """Begin an epoch."""

    @abstractmethod
    def resume(self, state: State) -> Iterator[Any]:
        """Go on in the epoch that ``state`` was saved in; the global generators stay as they are."""

    @abstractmethod
    def state(self, num_done: int, in_flight: int) -> State:
        """Return what :meth:`resume` needs.

        Args:
            num_done: Batches of the epoch that are done with.
            in_flight: Batches taken but not done with.
        """

    def reopen(self, state: State) -> None:
        """Set everything to what it was when ``state`` was saved, after the end of an epoch."""

    def before_first(self) -> None:
        """Do what must be done right before the first batch is taken."""

    def followed(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yield from ``iterator``, keeping the state before each batch."""
        while True:
            before = self.before_pull()
            batch = next(iterator, _END)
            if batch is _END:
                return
            self.befores.append(before)
            self.after_pull()
            yield batch

    def before_pull(self) -> Any:
        """Return what taking the next batch again will need."""
        return None

    def after_pull(self) -> None:
        """Do what must be done with every batch taken."""

    def _last_befores(self, in_flight: int) -> list[Any]:
        return list(self.befores)[len(self.befores) - in_flight :] if in_flight else []


class StatefulTracker(Tracker):
    """For loaders with ``state_dict`` and ``load_state_dict``, which know best where they are."""

    kind = "stateful"

    def start(self) -> Iterator[Any]:
        self.begun = self.globals.read()
        return iter(self.loader)

    def resume(self, state: State) -> Iterator[Any]:
        entry = self.globals.read()
        self.begun = state["begun"]
        self.globals.write(self.begun)
        self.loader.load_state_dict(state["own"])
        iterator: Iterator[Any] = iter(self.loader)
        self.globals.write(entry)
        return iterator

    def reopen(self, state: State) -> None:
        self.loader.load_state_dict(state["own"])

    def state(self, num_done: int, in_flight: int) -> State:
        befores = self._last_befores(in_flight)
        return {"begun": self.begun, "own": befores[0] if befores else self.loader.state_dict()}

    def before_pull(self) -> Any:
        return self.loader.state_dict()


class ReplayTracker(Tracker):
    """For iterables that cannot say where they are: batches that were seen are made again and dropped."""

    kind = "replay"

    def __init__(self, loader: Any, lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.is_builtin: bool = isinstance(loader, (list, tuple, range, str))
        self.main: WorkerState = WorkerState(getattr(loader, "dataset", loader), getattr(loader, "collate_fn", None))

    def start(self) -> Iterator[Any]:
        self.begun = {} if self.is_builtin else {"globals": self.globals.read(), **self.main.read_own()}
        return iter(self.loader)

    def resume(self, state: State) -> Iterator[Any]:
        num_done = state["num_done"]
        if self.is_builtin:
            return islice(self.loader, num_done, None)
        if num_done:
            rank_zero_warn(
                f"{type(self.loader).__name__} cannot say where it is: its first {num_done} batches are read again and "
                "dropped. Give it `state_dict` and `load_state_dict` to go on at once, and exactly."
            )
        entry = self.globals.read()
        self.begun = state["begun"]
        self.main.write(self.begun)
        iterator = iter(self.loader)
        for _ in range(num_done):
            if next(iterator, _END) is _END:
                break
        taken = []
        for before in state["befores"]:
            self.globals.write(before)
            taken.append(next(iterator, _END))
        self.globals.write(entry)
        return chain((batch for batch in taken if batch is not _END), iterator)

    def state(self, num_done: int, in_flight: int) -> State:
        return {"begun": self.begun, "befores": self._last_befores(in_flight)}

    def before_pull(self) -> Any:
        return {} if self.is_builtin else self.globals.read()


class _LoaderTracker(Tracker):
    """What the trackers for PyTorch's DataLoader share."""

    def __init__(self, loader: DataLoader[Any], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.num_workers: int = loader.num_workers
        self.main: WorkerState = WorkerState(loader.dataset, loader.collate_fn)
        self.workers: Workers | None = None

    def before_pull(self) -> Any:
        # With workers, taking a batch draws nothing here that starting again would not draw.
        return None if self.num_workers else self.main.read()

    def _worker_states(self, num_taken: int, state: State) -> None:
        if self.workers is not None:
            state["workers"] = self.workers.states(num_taken)
            state["birth"] = self.workers.birth

    def _saved_worker_states(self, state: State) -> dict[int, State]:
        states = state.get("workers", [])
        if len(states) != self.num_workers:
            if states or self.num_workers:
                rank_zero_warn(
                    f"num_workers was {len(states)} when the checkpoint was saved, received {self.num_workers}. The "
                    "order of the samples goes on exactly; random augmentation goes on with other numbers."
                )
            return {}
        if any(worker == LOST for worker in states):
            rank_zero_warn(
                "The states of the loader's workers were too large to be saved. The order of the samples goes on "
                "exactly; random augmentation goes on with other numbers."
            )
        return {index: worker for index, worker in enumerate(states) if isinstance(worker, dict)}

    def _take_again(self, iterator: Iterator[Any], befores: list[Any]) -> Iterator[Any]:
        """Take the batches again that were in flight, each from the state it was taken from."""
        taken = []
        for before in befores:
            if before is None:
                break
            self.main.write(before)
            batch = next(iterator, _END)
            if batch is _END:
                break
            self.befores.append(before)
            taken.append(batch)
        return chain(taken, iterator) if taken else iterator


class IndexTracker(_LoaderTracker):
    """For DataLoaders whose sampler gives the indices of the batches."""

    kind = "index"

    def __init__(self, loader: DataLoader[Any], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.sampler: SamplerState = SamplerState(loader)
        self.is_watched: bool = not is_known(index_sampler(loader))
        self.names: tuple[str, ...] = generators_used(loader)
        self.first: State = {}
        self.steps: Steps | None = None
        # How many batches this process has not taken itself, because it went on after them.
        self.num_skipped: int = 0

    def start(self) -> Iterator[Any]:
        self.begun = {"globals": self.globals.read(self.names), "sampler": self.sampler.read()}
        self.first = {}
        self.num_skipped = 0
        self.steps = None
        if self.num_workers:
            self.workers, batches = start_workers(self.loader, self.lookahead, self.begun, self.is_watched)
            self.steps = self.workers.steps
            return batches
        iterator: Any = iter(self.loader)
        if self.is_watched:
            self.steps = iterator._sampler_iter = Steps(iterator._sampler_iter, is_watched=True)
        return cast("Iterator[Any]", iterator)

    def before_first(self) -> None:
        if not self.num_workers and self.num_skipped == 0:
            self.first = self.globals.read(self.names)

    def resume(self, state: State) -> Iterator[Any]:
        entry = self.globals.read()
        self.begun, self.first = state["begun"], state["first"]
        sampler, num_skipped = self._adapted(state)
        iterator = self._open(state, sampler, num_skipped)
        if self.num_workers == 0:
            iterator = self._take_again(iterator, state["befores"])
            self.main.write_own(state["now"]["main"])
        self._compare(state)
        self.globals.write(entry)
        return iterator

    def reopen(self, state: State) -> None:
        entry = self.globals.read()
        if self.num_workers and self.loader.persistent_workers and len(state.get("workers", [])) == self.num_workers:
            # The workers' states come from the end of that epoch, and they may have been ahead of it.
            self.begun = state["begun"]
            self._open(state, index_sampler(self.loader), state["num_done"])
        self.sampler.write(state["now"]["sampler"])
        self.main.write_own(state["now"]["main"])
        self.globals.write(entry)

    def state(self, num_done: int, in_flight: int) -> State:
        state: State = {
            "begun": self.begun,
            "first": self.first,
            "shape": shape_of(self.loader),
            "now": {"sampler": self.sampler.read(), "main": self.main.read_own()},
            "befores": self._last_befores(in_flight),
            "steps": {} if self.steps is None else self.steps.state(),
        }
        self._worker_states(num_done - self.num_skipped, state)
        return state

    def _open(self, state: State, sampler: Any, num_skipped: int) -> Iterator[Any]:
        """Begin the saved epoch again and go through the first ``num_skipped`` of its indices."""
        self.num_skipped = num_skipped
        loader = self.loader
        self.sampler.write(self.begun["sampler"])
        if self.num_workers:
            self.workers, batches = resume_workers(
                loader, self.lookahead, self.begun, state.get("birth"), self._saved_worker_states(state),
                Gate(sampler, is_open=False, is_watched=self.is_watched, history=state["steps"]), num_skipped,
                self._set_back,
            )  # fmt: skip
            self.steps = self.workers.steps
            return batches
        self._set_back(self.begun)
        iterator: Any = iter(loader)
        self.globals.write(self.first)
        if sampler is not index_sampler(loader):
            iterator._sampler_iter = iter(sampler)
        self.steps = Steps(iterator._sampler_iter, self.is_watched, state["steps"])
        self.steps.skip(num_skipped)
        # What follows is taken from the states that it was taken from, which include the sampler's draws.
        self.steps.stop_replaying()
        if self.is_watched:
            iterator._sampler_iter = self.steps
        return cast("Iterator[Any]", iterator)

    def _set_back(self, begun: State) -> None:
        self.sampler.write(begun["sampler"])
        self.globals.write(begun["globals"])

    def _adapted(self, state: State) -> tuple[Any, int]:
        """Return the sampler to go on with and how many batches to leave out, if settings changed since the save."""
        sampler, num_done = index_sampler(self.loader), state["num_done"]
        then, now = state["shape"], shape_of(self.loader)
        if then["num_samples"] != now["num_samples"] and then["num_replicas"] == now["num_replicas"]:
            rank_zero_warn(
                f"The sampler had {then['num_samples']} samples when the checkpoint was saved, received one with "
                f"{now['num_samples']}. Training goes on after {num_done} batches, in another order."
            )
        is_in_order = getattr(self.loader, "in_order", True)
        if self.num_workers > 1 and not is_in_order:
            rank_zero_warn(
                "A DataLoader with in_order=False gives batches in an order that depends on time, so that it is not known "
                f"which {num_done} were seen: the first ones are left out. Use in_order=True to resume exactly."
            )
        names = ("batch_size", "num_replicas")
        changed = [name for name in names if then[name] != now[name] and None not in (then[name], now[name])]
        if not changed:
            return sampler, num_done
        name = changed[0]
        rank_zero_warn(
            f"{name} was {then[name]} when the checkpoint was saved, received {now[name]}. The resumed run is not the "
            "unbroken one, but every sample is still seen once in this epoch."
        )
        num_samples = num_done * then["batch_size"] * then["num_replicas"]
        if type(sampler) is BatchSampler:
            return without_samples(sampler, samples_seen(num_samples, sampler.sampler)), 0
        return sampler, math.ceil(num_samples / (now["batch_size"] * now["num_replicas"]))

    def _compare(self, state: State) -> None:
        saved, steps = state["steps"], self.steps
        if not saved or steps is None:
            return
        is_same_place = steps.num_taken == saved["num_taken"]
        if saved["is_incomplete"] or (is_same_place and steps.checksum != saved["checksum"]):
            rank_zero_warn(
                f"{type(index_sampler(self.loader)).__name__} gives other indices than before the restart, so that the "
                "resumed run is not the unbroken one. Let it draw from a generator of its own, or all at the start."
            )


class IterableTracker(_LoaderTracker):
    """For DataLoaders over an iterable data set with ``state_dict`` and ``load_state_dict``."""

    kind = "iterable"

    def __init__(self, loader: DataLoader[Any], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.follows_pulls = lookahead > 0 or loader.num_workers > 0
        self._iterator: Any = None
        # The worker that gave each of the last batches.
        self._givers: deque[int] = deque(maxlen=lookahead + 2)
        self._taken: list[int] = [0] * loader.num_workers

    def start(self) -> Iterator[Any]:
        self.begun = {"globals": self.globals.read()}
        if self.num_workers:
            self.workers, iterator = start_workers(self.loader, self.lookahead, self.begun, is_watched=False)
            self._begin_following(-1)
        else:
            self.workers, iterator = None, iter(self.loader)
        self._iterator = iterator
        return iterator

    def resume(self, state: State) -> Iterator[Any]:
        entry = self.globals.read()
        iterator = self._open(state)
        if not self.num_workers:
            iterator = self._take_again(iterator, state["befores"])
        self.globals.write(entry)
        return iterator

    def reopen(self, state: State) -> None:
        entry = self.globals.read()
        if self.num_workers and self.loader.persistent_workers and len(state.get("workers", [])) == self.num_workers:
            self._open(state)
        elif not self.num_workers:
            self.main.write_own(state["main"])
        self.globals.write(entry)

    def state(self, num_done: int, in_flight: int) -> State:
        state: State = {"begun": self.begun, "befores": self._last_befores(in_flight)}
        if self.workers is not None:
            undone = list(self._givers)[len(self._givers) - in_flight :] if in_flight else []
            counts = [taken - undone.count(worker) for worker, taken in enumerate(self._taken)]
            state["workers"] = self.workers.states_after(counts)
            state["birth"] = self.workers.birth
            givers = list(self._givers)[: len(self._givers) - in_flight]
            state["giver"] = givers[-1] if givers else self.workers.num_workers - 1
            return state
        befores = self._last_befores(in_flight)
        if befores and befores[0] is not None:
            own = {key: value for key, value in befores[0].items() if key != "globals"}
            return {**state, "main": own, "is_ended": False}
        is_ended = bool(getattr(getattr(self._iterator, "_dataset_fetcher", None), "ended", False))
        return {**state, "main": self.main.read_own(), "is_ended": is_ended}

    def after_pull(self) -> None:
        if self.workers is None:
            return
        # Workers take turns, but for those that have come to their end.
        giver = (self._givers[-1] + 1) % self.num_workers
        while self.workers.num_made(giver) <= self._taken[giver]:
            giver = (giver + 1) % self.num_workers
        self._taken[giver] += 1
        self._givers.append(giver)

    def _begin_following(self, giver: int) -> None:
        self._taken = [0] * self.num_workers
        self._givers.clear()
        self._givers.append(giver)

    def _open(self, state: State) -> Iterator[Any]:
        self.begun = state["begun"]
        if self.num_workers:
            giver = state["giver"] if len(state["workers"]) == self.num_workers else -1
            self.workers, iterator = resume_workers(
                self.loader, self.lookahead, self.begun, state.get("birth"), self._saved_worker_states(state),
                Gate(index_sampler(self.loader), is_open=False, is_watched=False), giver + 1,
                lambda begun: self.globals.write(begun["globals"]), skips=False,
            )  # fmt: skip
            self._begin_following(giver)
        else:
            self.globals.write(self.begun["globals"])
            self.main.write_own(state["main"])
            iterator = iter(()) if state["is_ended"] else iter(self.loader)
        self._iterator = iterator
        return iterator


# ---------------------------------------------------------------- starting workers

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
