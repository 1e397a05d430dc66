"""How the place in PyTorch's DataLoader is kept and found again, over a map-style and over an iterable data set."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from levin.data.combined import known_length
from levin.data.loaders import stop_workers
from levin.resume.cursors import END, Cursor, taken_first
from levin.resume.order import Order, Rest, describe_order
from levin.resume.sampler_state import (
    HeldSampler,
    IndexStream,
    SamplerState,
    index_sampler,
    innermost,
    is_known,
    shape_of,
)
from levin.resume.worker_state import WorkerState
from levin.resume.workers import LOST, Workers, restart_workers, start_workers
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.rng_states import PROCESS
from levin.utilities.types import StateDict


class _LoaderCursor(Cursor):
    """What the cursors for PyTorch's DataLoader share."""

    def __init__(self, loader: DataLoader[object], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.num_workers: int = loader.num_workers
        self.main: WorkerState = WorkerState(loader.dataset, loader.collate_fn)
        self.workers: Workers | None = None
        self.iterator: object = None
        # Iterating a data set moves it on; a state loaded meanwhile would count for its next iteration.
        self._left_out: set[str] = {"dataset"} if isinstance(loader.dataset, IterableDataset) else set()

    def stop(self) -> None:
        """End workers that do not live on."""
        stop_workers(self.iterator)

    def before_pull(self) -> object:
        """Return the states of this process; None with workers."""
        # With workers, taking a batch draws nothing here that starting again would not draw.
        return None if self.num_workers else self.main.read()

    def _has_lasting_workers(self, state: StateDict) -> bool:
        """Whether workers that live on have states of ``state``, from the end of its epoch."""
        lasts = self.num_workers and self.loader.persistent_workers
        return bool(lasts and len(state.get("worker_states", [])) == self.num_workers)

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

    def _take_again(self, iterator: Iterator[Any], befores: list[Any]) -> Iterator[Any]:
        """Take the batches again that were in flight, each from the state it was taken from."""
        taken = []
        for before in befores:
            if before is None:
                break
            self.main.write({key: state for key, state in before.items() if key not in self._left_out})
            batch = next(iterator, END)
            if batch is END:
                break
            self.states_before.append(before)
            taken.append(batch)
        return taken_first(taken, iterator) if taken else iterator


class IndexCursor(_LoaderCursor):
    """For DataLoaders whose sampler gives the indices of the batches."""

    kind = "index"

    def __init__(self, loader: DataLoader[object], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.sampler: SamplerState = SamplerState(loader)
        self.is_checked: bool = not is_known(index_sampler(loader))
        # Torch's samplers draw from torch's generator alone.
        self.names: tuple[str, ...] = PROCESS if self.is_checked else ("torch",)
        self.stream: IndexStream | None = None
        # Right before the first index was taken: the global generators, and what lists the order that it began.
        self.order_drawn_at: StateDict = {}
        self.order: Order | None = None
        # Of an epoch that went on with another number of ranks or other batches: how much of it was done before.
        self.shared_epoch: StateDict | None = None
        # How many batches this process has not taken itself, because it went on after them.
        self.num_skipped: int = 0

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        self.epoch_start = {"globals": self.rng.read(self.names), "sampler": self.sampler.read()}
        self.order_drawn_at, self.order, self.shared_epoch = {}, None, None
        self.num_skipped = 0
        if self.num_workers:
            held = HeldSampler(index_sampler(self.loader), self.is_checked)
            self.workers, batches = start_workers(self.loader, self.lookahead, self.epoch_start, held)
            self._release(batches, held, 0)
            self.iterator = batches
            return batches
        iterator: Any = iter(self.loader)
        self._put_stream(iterator, IndexStream(iterator._sampler_iter, self.is_checked))
        return cast("Iterator[Any]", iterator)

    def before_first(self) -> None:
        """Keep the states from which the sampler draws its order."""
        super().before_first()
        if not self.order_drawn_at:
            self._note_order()

    def resume(self, state: StateDict) -> Iterator[object]:
        """Go on after the indices of the batches that were seen, without loading them."""
        present = self.rng.read()
        sampler, num_skipped = self._rest_of_epoch(state)
        iterator = self._reopen(state, sampler, num_skipped)
        if self.num_workers == 0:
            iterator = self._take_again(iterator, state["in_flight_states"])
            self.main.write_own(state["at_save"]["main"])
        self._compare(state["indices"])
        self.rng.write(present)
        return iterator

    def leave(self, state: StateDict) -> None:
        """Set the sampler, the data set and persistent workers to what they were when the epoch was left."""
        present = self.rng.read()
        if self._has_lasting_workers(state):
            # They may have been ahead of the end of that epoch.
            self._reopen(state, index_sampler(self.loader), state["num_done"])
        self.sampler.write(state["at_save"]["sampler"])
        self.main.write_own(state["at_save"]["main"])
        self.rng.write(present)

    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return the states when the epoch began, and those of the workers after the batches that are done with."""
        state: StateDict = {
            "epoch_start": self.epoch_start,
            "order_drawn_at": self.order_drawn_at,
            "order": self.order,
            "shape": shape_of(self.loader),
            "shared_epoch": self.shared_epoch,
            "at_save": {"sampler": self.sampler.read(), "main": self.main.read_own()},
            "in_flight_states": self.in_flight_states(num_in_flight),
            "indices": {} if self.stream is None else self.stream.state(),
        }
        if self.workers is not None:
            state["worker_states"] = self.workers.states(num_done - self.num_skipped)
            state["workers_started_at"] = self.workers.started_at
        return state

    def _note_order(self) -> None:
        self.order_drawn_at, self.order = self.rng.read(self.names), describe_order(self.loader)

    def _put_stream(self, iterator: Any, stream: IndexStream) -> None:
        """Let ``iterator``, which loads in this process, take its indices from ``stream``."""
        iterator._sampler_iter = stream if self.is_checked else stream.indices
        self.stream = stream

    def _release(self, iterator: object, held: HeldSampler, num_skipped: int) -> None:
        """Let the workers of ``iterator`` begin after so many indices."""
        assert self.workers is not None
        if not self.order_drawn_at:
            self._note_order()
        self.stream = held.stream
        self.stream.skip(num_skipped)
        self.workers.release(iterator, held, num_skipped)

    def _set_back(self, states: StateDict) -> None:
        self.sampler.write(states["sampler"])
        self.rng.write(states["globals"])

    def _reopen(self, state: StateDict, sampler: Any, num_skipped: int) -> Iterator[Any]:
        """Begin the saved epoch again and go through the first ``num_skipped`` indices of ``sampler``."""
        loader, self.num_skipped = self.loader, num_skipped
        self.epoch_start, self.order_drawn_at, self.order = (
            state["epoch_start"], state["order_drawn_at"], state["order"],
        )  # fmt: skip
        if self.num_workers:
            held = HeldSampler(sampler, self.is_checked)
            self.workers, batches = restart_workers(
                loader, self.lookahead, self.epoch_start, state.get("workers_started_at", self.epoch_start),
                self._saved_worker_states(state), held, self._set_back,
            )  # fmt: skip
            self._release(batches, held, num_skipped)
            self.iterator = batches
            return batches
        self._set_back(self.epoch_start)
        iterator: Any = iter(loader)
        self.rng.write(self.order_drawn_at)
        stream = IndexStream(iterator._sampler_iter, self.is_checked)
        if sampler is not index_sampler(loader):
            stream.indices = iter(sampler)
        if self.order_drawn_at and (state["num_done"] or not state["in_flight_states"]):
            # Otherwise the first batch in flight is taken again from the states that its order was drawn from.
            stream.draw_order()
        stream.skip(num_skipped)
        self._put_stream(iterator, stream)
        return cast("Iterator[Any]", iterator)

    def _rest_of_epoch(self, state: StateDict) -> tuple[object, int]:
        """Return the sampler to go on with and how many batches to leave out, if settings changed since the save."""
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
        before = self.shared_epoch = state["shared_epoch"]
        changed = [
            name for name in ("batch_size", "num_replicas") if then[name] != now[name] and then[name] and now[name]
        ]
        if not changed and before is None:
            return sampler, num_done
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
            return sampler, math.ceil(num_seen / (now["batch_size"] * now["num_replicas"]))
        self.shared_epoch = {"order": order, "num_seen": num_seen, "num_done": num_done}
        rest = BatchSampler(Rest(order, sampler.sampler, num_seen), sampler.batch_size, sampler.drop_last)
        num_left = known_length(rest)
        self.num_left = None if math.isinf(num_left) else int(num_left)
        return rest, 0

    def _compare(self, saved: StateDict) -> None:
        """Say so if the sampler gave other indices than before."""
        stream = self.stream
        if (
            not saved
            or stream is None
            or stream.num_taken != saved["num_taken"]
            or stream.checksum == saved["checksum"]
        ):
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
        # The worker that gave each of the last batches.
        self._givers: deque[int] = deque(maxlen=lookahead + 2)
        self._num_given: list[int] = [0] * loader.num_workers

    def start(self) -> Iterator[object]:
        """Begin an epoch."""
        present = self.rng.read()
        self.epoch_start = {"globals": present}
        if self.unread is not None:
            self.main.write_left(self.unread, is_ended=False)
            self.rng.write(present)
            self.unread = None
        if self.num_workers:
            held = HeldSampler(index_sampler(self.loader), is_checked=False)
            self.workers, iterator = start_workers(self.loader, self.lookahead, self.epoch_start, held)
            self.workers.release(iterator, held, 0)
            self._begin_following(-1)
        else:
            iterator = iter(self.loader)
        self.iterator = iterator
        return iterator

    def resume(self, state: StateDict) -> Iterator[object]:
        """Go on through the data set's own state."""
        present = self.rng.read()
        iterator = self._reopen(state)
        if not self.num_workers:
            iterator = self._take_again(iterator, state["in_flight_states"])
            if not state["in_flight_states"] and not self.is_ended:
                self.unread = state["at_save"]
        self.rng.write(present)
        return iterator

    def leave(self, state: StateDict) -> None:
        """Set the data set, or persistent workers, to what they were when the epoch was left."""
        present = self.rng.read()
        if self._has_lasting_workers(state):
            self._reopen(state)
        elif not self.num_workers:
            self.main.write_left(state.get("at_save", {}), state["is_ended"])
        self.rng.write(present)

    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return the state of the data set here, or in each worker, after the batches that are done with."""
        befores = self.in_flight_states(num_in_flight)
        state: StateDict = {"epoch_start": self.epoch_start, "in_flight_states": befores}
        if self.workers is not None:
            givers = list(self._givers)
            num_known = len(givers) - num_in_flight
            counts = [given - givers[num_known:].count(worker) for worker, given in enumerate(self._num_given)]
            state["worker_states"] = self.workers.states_after(counts)
            state["workers_started_at"] = self.workers.started_at
            state["last_giver"] = givers[num_known - 1] if num_known else self.num_workers - 1
            return state
        if befores and befores[0] is not None:
            own = {key: value for key, value in befores[0].items() if key != "globals"}
            return {**state, "at_save": own, "is_ended": False}
        # A short batch is the last one: the data set came to its end, even if the loader has not said so yet.
        is_ended = bool(getattr(getattr(self.iterator, "_dataset_fetcher", None), "ended", False))
        return {**state, "at_save": self.main.read_own(), "is_ended": self.is_ended or is_ended}

    def after_pull(self) -> None:
        """Find the worker that gave the batch."""
        if self.workers is None:
            return
        # Workers take turns, but for those that have come to their end.
        giver = (self._givers[-1] + 1) % self.num_workers
        while self.workers.num_made(giver) <= self._num_given[giver]:
            giver = (giver + 1) % self.num_workers
        self._num_given[giver] += 1
        self._givers.append(giver)

    def _begin_following(self, giver: int) -> None:
        self._num_given = [0] * self.num_workers
        self._givers.clear()
        self._givers.append(giver)

    def _reopen(self, state: StateDict) -> Iterator[object]:
        self.epoch_start = state["epoch_start"]
        if self.num_workers:
            giver = state["last_giver"] if len(state["worker_states"]) == self.num_workers else -1
            held = HeldSampler(index_sampler(self.loader), is_checked=False)
            self.workers, iterator = restart_workers(
                self.loader, self.lookahead, self.epoch_start, state.get("workers_started_at", self.epoch_start),
                self._saved_worker_states(state), held, lambda states: self.rng.write(states["globals"]),
            )  # fmt: skip
            self.workers.release(iterator, held, giver + 1)
            self._begin_following(giver)
        else:
            self.rng.write(self.epoch_start["globals"])
            self.is_ended = state["is_ended"]
            if self.is_ended:
                self.main.write_left(state["at_save"], is_ended=True)
                iterator = iter(())
            else:
                self.main.write_own(state["at_save"])
                iterator = iter(self.loader)
        self.iterator = iterator
        return iterator
