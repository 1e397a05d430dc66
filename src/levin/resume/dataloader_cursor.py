"""How the place in PyTorch's DataLoader is kept and found again, over a map-style and over an iterable data set."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from levin.data.loaders import known_length
from levin.resume.cursors import Cursor
from levin.resume.order import Order, Rest, describe_order
from levin.resume.sampler_state import (
    HeldSampler,
    IndexStream,
    SamplerState,
    draws_globally,
    index_sampler,
    innermost,
    is_known,
    shape_of,
)
from levin.resume.worker_state import WorkerState
from levin.resume.workers import LOST, Workers, restart_workers, start_workers
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.rng_states import PROCESS
from levin.utilities.types import Batch, StateDict


@dataclass
class _Epoch:
    """An epoch of a loader that has begun.

    Args:
        start: The states of the generators, and of the sampler, when it began.
        iterator: Gives its batches.
        workers: Load them, if there are such.
        stream: The indices, of a map-style data set.
        order_drawn_at: The global generators right before the first index was taken.
        order: Lists the order that was drawn then.
        shared: How much was done before, of an epoch that went on with another number of ranks or other batches.
        num_skipped: Batches that this process has not taken itself, because it went on after them.
    """

    start: StateDict
    iterator: Any = None
    workers: Workers | None = None
    stream: IndexStream | None = None
    order_drawn_at: StateDict = field(default_factory=dict)
    order: Order | None = None
    shared: StateDict | None = None
    num_skipped: int = 0


class _LoaderCursor(Cursor):
    """What the cursors for PyTorch's DataLoader share."""

    def __init__(self, loader: DataLoader[object], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.num_workers: int = loader.num_workers
        self.main: WorkerState = WorkerState(loader.dataset, loader.collate_fn)
        self.epoch: _Epoch = _Epoch({})
        # Iterating a data set moves it on; a state loaded meanwhile would count for its next iteration.
        self._left_out: set[str] = {"dataset"} if isinstance(loader.dataset, IterableDataset) else set()

    def start(self) -> Iterator[Batch]:
        """Begin an epoch; where that fails, nothing is drawn and the epoch before is still the present one."""
        epoch = _Epoch(self._read_start())
        try:
            self._begin(epoch)
        except BaseException:  # as when a signal to all processes ends a worker that is being started
            self._set_back(epoch.start)
            raise
        self.epoch = epoch
        return cast("Iterator[Batch]", epoch.iterator)

    @abstractmethod
    def _read_start(self) -> StateDict:
        """Return the states that an epoch which begins now begins with."""

    @abstractmethod
    def _begin(self, epoch: _Epoch) -> None:
        """Make the iterator of a new epoch."""

    @abstractmethod
    def _set_back(self, states: StateDict) -> None:
        """Set the generators to what :meth:`_read_start` returned."""

    @override
    def opened(self) -> object:
        return self.epoch.iterator

    def before_pull(self) -> object:
        """Return the states of this process; None with workers."""
        # With workers, taking a batch draws nothing here that starting again would not draw.
        return None if self.num_workers else self.main.read()

    def _has_lasting_workers(self, state: StateDict) -> bool:
        """Whether workers that live on have states of ``state``, from the end of its epoch."""
        lasts = self.num_workers and self.loader.persistent_workers
        return bool(lasts and len(state.get("worker_states", [])) == self.num_workers)

    def _start_workers(self, epoch: _Epoch, is_checked: bool) -> HeldSampler:
        held = HeldSampler(index_sampler(self.loader), is_checked)
        epoch.workers, epoch.iterator = start_workers(self.loader, self.lookahead, epoch.start, held)
        return held

    def _restart_workers(self, epoch: _Epoch, state: StateDict, held: HeldSampler) -> None:
        epoch.workers, epoch.iterator = restart_workers(
            self.loader, self.lookahead, epoch.start, state.get("workers_started_at", epoch.start),
            self._saved_worker_states(state), held, self._set_back,
        )  # fmt: skip

    def _saved_worker_states(self, state: StateDict) -> dict[int, StateDict]:
        states = state.get("worker_states", [])
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

    def _set_before(self, before: StateDict) -> None:
        self.main.write({key: state for key, state in before.items() if key not in self._left_out})


class IndexCursor(_LoaderCursor):
    """For DataLoaders whose sampler gives the indices of the batches."""

    kind = "index"

    def __init__(self, loader: DataLoader[object], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.sampler: SamplerState = SamplerState(loader)
        self.is_checked: bool = not is_known(index_sampler(loader))
        # Which global generators an epoch is begun with: torch's samplers draw from torch's alone, if from any, and
        # workers get their seed from it.
        draws = self.num_workers > 0 or draws_globally(index_sampler(loader))
        self.names: tuple[str, ...] = PROCESS if self.is_checked else ("torch",) if draws else ()

    def before_first(self) -> None:
        """Keep the states from which the sampler draws its order."""
        self._note_order(self.epoch)

    def resume(self, state: StateDict) -> Iterator[Batch]:
        """Go on after the indices of the batches that were seen, without loading them."""
        iterator = self._reopen(state, *self._rest_of_epoch(state))
        if self.num_workers == 0:
            iterator = self.take_again(iterator, state["in_flight_states"], self._set_before)
            self.main.write_own(state["at_save"]["main"])
        self._compare(state["indices"])
        return iterator

    def leave(self, state: StateDict) -> None:
        """Set the sampler, the data set and persistent workers to what they were when the epoch was left."""
        if self._has_lasting_workers(state):
            # They may have been ahead of the end of that epoch.
            self._reopen(state, index_sampler(self.loader), state["num_done"])
        self.sampler.write(state["at_save"]["sampler"])
        self.main.write_own(state["at_save"]["main"])

    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return the states when the epoch began, and those of the workers after the batches that are done with."""
        epoch = self.epoch
        state: StateDict = {
            "epoch_start": epoch.start,
            "order_drawn_at": epoch.order_drawn_at,
            "order": epoch.order,
            "shape": shape_of(self.loader),
            "shared_epoch": epoch.shared,
            "at_save": {"sampler": self.sampler.read(), "main": self.main.read_own()},
            "in_flight_states": self.in_flight_states(num_in_flight),
            "indices": {} if epoch.stream is None else epoch.stream.state(),
        }
        if epoch.workers is not None:
            state["worker_states"] = epoch.workers.states(num_done - epoch.num_skipped)
            state["workers_started_at"] = epoch.workers.started_at
        return state

    def _read_start(self) -> StateDict:
        return {"globals": self.rng.read(self.names), "sampler": self.sampler.read()}

    def _begin(self, epoch: _Epoch) -> None:
        if self.num_workers:
            self._release(epoch, self._start_workers(epoch, self.is_checked))
        else:
            epoch.iterator = iter(self.loader)
            self._put_stream(epoch, IndexStream(epoch.iterator._sampler_iter, self.is_checked))

    def _set_back(self, states: StateDict) -> None:
        self.sampler.write(states["sampler"])
        self.rng.write(states["globals"])

    def _note_order(self, epoch: _Epoch) -> None:
        if not epoch.order_drawn_at:
            epoch.order_drawn_at, epoch.order = self.rng.read(self.names), describe_order(self.loader)

    def _put_stream(self, epoch: _Epoch, stream: IndexStream) -> None:
        """Let the iterator, which loads in this process, take its indices from ``stream``."""
        epoch.iterator._sampler_iter = stream if self.is_checked else stream.indices
        epoch.stream = stream

    def _release(self, epoch: _Epoch, held: HeldSampler) -> None:
        """Let the workers begin after the batches that are left out."""
        assert epoch.workers is not None
        self._note_order(epoch)
        epoch.stream = held.stream
        epoch.stream.skip(epoch.num_skipped)
        epoch.workers.release(epoch.iterator, held, epoch.num_skipped)

    def _reopen(
        self, state: StateDict, sampler: Iterable[object], num_skipped: int, shared_epoch: StateDict | None = None
    ) -> Iterator[Batch]:
        """Begin the saved epoch again and go through the first ``num_skipped`` indices of ``sampler``."""
        self.epoch = epoch = _Epoch(
            state["epoch_start"], order_drawn_at=state["order_drawn_at"], order=state["order"], shared=shared_epoch,
            num_skipped=num_skipped,
        )  # fmt: skip
        if self.num_workers:
            held = HeldSampler(sampler, self.is_checked)
            self._restart_workers(epoch, state, held)
            self._release(epoch, held)
            return cast("Iterator[Batch]", epoch.iterator)
        self._set_back(epoch.start)
        epoch.iterator = iter(self.loader)
        self.rng.write(epoch.order_drawn_at)
        stream = IndexStream(epoch.iterator._sampler_iter, self.is_checked)
        if sampler is not index_sampler(self.loader):
            stream.indices = iter(sampler)
        if epoch.order_drawn_at and (state["num_done"] or not state["in_flight_states"]):
            # Otherwise the first batch in flight is taken again from the states that its order was drawn from.
            stream.draw_order()
        stream.skip(num_skipped)
        self._put_stream(epoch, stream)
        return cast("Iterator[Batch]", epoch.iterator)

    def _rest_of_epoch(self, state: StateDict) -> tuple[Iterable[object], int, StateDict | None]:
        """Return the sampler to go on with, how many batches to leave out, and what was done under other settings."""
        sampler, num_done = index_sampler(self.loader), state["num_done"]
        then, now = state["shape"], shape_of(self.loader)
        if then["num_samples"] != now["num_samples"] and then["num_replicas"] == now["num_replicas"]:
            rank_zero_warn(
                f"The sampler had {then['num_samples']} samples when the checkpoint was saved, received one with "
                f"{now['num_samples']}. Training goes on after {num_done} batches, in another order."
            )
        if self.num_workers > 1 and not getattr(self.loader, "in_order", True):
            rank_zero_warn(
                "A DataLoader with in_order=False gives batches in an order that depends on time, so that it is not known "
                f"which {num_done} were seen: the first ones are left out. Use in_order=True to resume exactly."
            )
        before: StateDict | None = state["shared_epoch"]
        changed = [
            name for name in ("batch_size", "num_replicas") if then[name] != now[name] and then[name] and now[name]
        ]
        if not changed and before is None:
            return sampler, num_done, None
        order = state["order"] if before is None else before["order"]
        is_exact = type(sampler) is BatchSampler and (
            order is not None or not isinstance(innermost(sampler), DistributedSampler)
        )
        if changed:
            name = changed[0]
            rank_zero_warn(
                f"{name} was {then[name]} when the checkpoint was saved, received {now[name]}. The resumed run is not the "
                f"unbroken one, {'but every sample is still seen once in' if is_exact else 'and some samples may be left out of'} "
                "this epoch."
            )
        num_seen, num_done_before = (0, 0) if before is None else (before["num_seen"], before["num_done"])
        num_seen += (num_done - num_done_before) * then["batch_size"] * then["num_replicas"]
        if not is_exact:
            return sampler, math.ceil(num_seen / (now["batch_size"] * now["num_replicas"])), before
        rest = BatchSampler(Rest(order, sampler.sampler, num_seen), sampler.batch_size, sampler.drop_last)
        num_left = known_length(rest)
        self.num_left = None if math.isinf(num_left) else int(num_left)
        return rest, 0, {"order": order, "num_seen": num_seen, "num_done": num_done}

    def _compare(self, saved: StateDict) -> None:
        """Say so if the sampler gave other indices than before."""
        indices = {} if self.epoch.stream is None else self.epoch.stream.state()
        # Another number of them was drawn where settings changed, which is told of already.
        if not saved or indices == saved or indices.get("num_taken") != saved["num_taken"]:
            return
        kind = type(innermost(index_sampler(self.loader))).__name__
        rank_zero_warn(
            f"{kind} gives other indices than before the restart, so that the resumed run is not the unbroken one. Let it "
            "draw its order at the start of an epoch, and give it `state_dict` and `load_state_dict` if it keeps more from "
            "epoch to epoch than random generators."
        )


class IterableCursor(_LoaderCursor):
    """For DataLoaders over an iterable data set with ``state_dict`` and ``load_state_dict``."""

    kind = "iterable"

    def __init__(self, loader: DataLoader[object], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.follows_pulls = lookahead > 0 or loader.num_workers > 0

    def resume(self, state: StateDict) -> Iterator[Batch]:
        """Go on through the data set's own state."""
        iterator = self._reopen(state)
        if not self.num_workers:
            iterator = self.take_again(iterator, state["in_flight_states"], self._set_before)
            if not state["in_flight_states"] and not state["is_ended"]:
                self.unread = state["at_save"]
        return iterator

    def leave(self, state: StateDict) -> None:
        """Set the data set, or persistent workers, to what they were when the epoch was left."""
        if self._has_lasting_workers(state):
            self._reopen(state)
        elif not self.num_workers:
            self.main.write_left(state.get("at_save", {}), state["is_ended"])

    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return the state of the data set here, or in each worker, after the batches that are done with."""
        befores = self.in_flight_states(num_in_flight)
        epoch = self.epoch
        state: StateDict = {"epoch_start": epoch.start, "in_flight_states": befores}
        if epoch.workers is not None:
            state["worker_states"], state["last_giver"] = epoch.workers.states_before(num_in_flight)
            state["workers_started_at"] = epoch.workers.started_at
            return state
        if befores and befores[0] is not None:
            own = {key: value for key, value in befores[0].items() if key != "globals"}
            return {**state, "at_save": own, "is_ended": False}
        # A short batch is the last one: the data set came to its end, even if the loader has not said so yet.
        is_ended = bool(getattr(getattr(epoch.iterator, "_dataset_fetcher", None), "ended", False))
        return {**state, "at_save": self.main.read_own(), "is_ended": self.is_ended or is_ended}

    def after_pull(self) -> None:
        """Find the worker that gave the batch."""
        if self.epoch.workers is not None:
            self.epoch.workers.note_given()

    def _read_start(self) -> StateDict:
        return {"globals": self.rng.read()}

    def _begin(self, epoch: _Epoch) -> None:
        if self.unread is not None:
            self.main.write_left(self.unread, is_ended=False)
            self._set_back(epoch.start)
            self.unread = None
        if self.num_workers:
            self._release(epoch, self._start_workers(epoch, is_checked=False), -1)
        else:
            epoch.iterator = iter(self.loader)

    def _set_back(self, states: StateDict) -> None:
        self.rng.write(states["globals"])

    def _release(self, epoch: _Epoch, held: HeldSampler, last_giver: int) -> None:
        """Let the workers begin; the first turn is that of the one after ``last_giver``."""
        assert epoch.workers is not None
        epoch.workers.release(epoch.iterator, held, last_giver + 1)

    def _reopen(self, state: StateDict) -> Iterator[Batch]:
        self.epoch = epoch = _Epoch(state["epoch_start"])
        if self.num_workers:
            held = HeldSampler(index_sampler(self.loader), is_checked=False)
            self._restart_workers(epoch, state, held)
            is_same = len(state["worker_states"]) == self.num_workers
            self._release(epoch, held, state["last_giver"] if is_same else -1)
            return cast("Iterator[Batch]", epoch.iterator)
        self._set_back(epoch.start)
        if state["is_ended"]:
            self.main.write_left(state["at_save"], is_ended=True)
            epoch.iterator = iter(())
        else:
            self.main.write_own(state["at_save"])
            epoch.iterator = iter(self.loader)
        return cast("Iterator[Batch]", epoch.iterator)
