"""How the place in PyTorch's DataLoader is kept and found again, over a map-style and over an iterable data set."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from levin.resume.cursors import END, State, Tracker
from levin.resume.order import complete_order, describe_order, left_for_rank, list_order
from levin.resume.sampling import (
    Gate,
    SamplerState,
    Steps,
    begun_now,
    generators_used,
    index_sampler,
    is_known,
    samples_seen,
    shape_of,
    without_samples,
)
from levin.resume.worker_start import LOST, Workers, resume_workers, start_workers
from levin.resume.worker_state import WorkerState
from levin.utilities.rank_zero import rank_zero_warn


class _LoaderTracker(Tracker):
    """What the trackers for PyTorch's DataLoader share."""

    def __init__(self, loader: DataLoader[Any], lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.num_workers: int = loader.num_workers
        self.main: WorkerState = WorkerState(loader.dataset, loader.collate_fn)
        self.workers: Workers | None = None
        # Iterating a data set moves it on; a state loaded meanwhile would count for its next iteration.
        self._left_out: set[str] = {"dataset"} if isinstance(loader.dataset, IterableDataset) else set()

    def before_pull(self) -> Any:
        """Return the states of this process; None with workers."""
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
            self.main.write({key: state for key, state in before.items() if key not in self._left_out})
            batch = next(iterator, END)
            if batch is END:
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
        # Of an epoch that went on with another number of ranks: the order of all, and how much of it was seen before.
        self.spread: State | None = None
        self.steps: Steps | None = None
        # How many batches this process has not taken itself, because it went on after them.
        self.num_skipped: int = 0
        # Whether this epoch's order was drawn when it was gone on with, though no batch of it is done with.
        self.has_order: bool = False

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        self.begun = {"globals": self.globals.read(self.names), "sampler": self.sampler.read()}
        self.first = {}
        self.spread = None
        self.num_skipped = 0
        self.has_order = False
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
        """Keep the states from which the sampler draws its order."""
        super().before_first()
        if not self.num_workers and self.num_skipped == 0 and not self.has_order:
            self.first = self.globals.read(self.names)

    def resume(self, state: State) -> Iterator[Any]:
        """Go on after the indices of the batches that were seen, without loading them."""
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
        """Set the sampler, the data set and persistent workers to what they were when the epoch was left."""
        entry = self.globals.read()
        if self.num_workers and self.loader.persistent_workers and len(state.get("workers", [])) == self.num_workers:
            # The workers' states come from the end of that epoch, and they may have been ahead of it.
            self.begun = state["begun"]
            self._open(state, index_sampler(self.loader), state["num_done"])
        self.sampler.write(state["now"]["sampler"])
        self.main.write_own(state["now"]["main"])
        self.globals.write(entry)

    def state(self, num_done: int, in_flight: int) -> State:
        """Return the states when the epoch began, and those of the workers after the batches that are done with."""
        state: State = {
            "begun": self.begun,
            "first": self.first,
            "shape": {**shape_of(self.loader), "order": describe_order(self.loader)},
            "spread": self.spread,
            "now": {"sampler": self.sampler.read(), "main": self.main.read_own()},
            "befores": self._last_befores(in_flight),
            "steps": {} if self.steps is None else self.steps.state(),
        }
        self._worker_states(num_done - self.num_skipped, state)
        return state

    def _open(self, state: State, sampler: Any, num_skipped: int) -> Iterator[Any]:
        """Begin the saved epoch again and go through the first ``num_skipped`` of its indices."""
        self.num_skipped = num_skipped
        self.has_order = False
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
            # Only an epoch of which something was seen has drawn its order.
            iterator._sampler_iter = begun_now(iter(sampler)) if state["num_done"] else iter(sampler)
        elif self.first and not state["num_done"] and not state["befores"]:
            self.has_order = True
            iterator._sampler_iter = begun_now(iterator._sampler_iter)
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
        before = state.get("spread")
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
        if changed:
            name = changed[0]
            rank_zero_warn(
                f"{name} was {then[name]} when the checkpoint was saved, received {now[name]}. The resumed run is not the "
                "unbroken one, but every sample is still seen once in this epoch."
            )
        order = then.get("order") if before is None else before["order"]
        if (changed or before is not None) and order is not None and type(sampler) is BatchSampler:
            return self._spread_rest(sampler, complete_order(order, state), before, state), 0
        if not changed:
            return sampler, num_done
        num_samples = num_done * then["batch_size"] * then["num_replicas"]
        if type(sampler) is BatchSampler:
            rest = without_samples(sampler, samples_seen(num_samples, sampler.sampler))
            self.num_left = len(rest)
            return rest, 0
        return sampler, math.ceil(num_samples / (now["batch_size"] * now["num_replicas"]))

    def _spread_rest(self, sampler: BatchSampler, order: State, before: State | None, state: State) -> BatchSampler:
        """Return a batch sampler over what is left for this rank of the epoch that other ranks began."""
        then, num_done = state["shape"], state["num_done"]
        num_seen, num_done_before = (0, 0) if before is None else (before["num_seen"], before["num_done"])
        num_seen += (num_done - num_done_before) * then["batch_size"] * then["num_replicas"]
        own: Any = sampler.sampler
        rank, size = getattr(own, "rank", 0), getattr(own, "num_replicas", 1)
        self.spread = {"order": order, "num_seen": num_seen, "num_done": num_done}
        rest = BatchSampler(
            left_for_rank(list_order(order), num_seen, rank, size), sampler.batch_size, sampler.drop_last
        )
        self.num_left = len(rest)
        return rest

    def _compare(self, state: State) -> None:
        saved, steps = state["steps"], self.steps
        if not saved or steps is None:
            return
        is_same_place = steps.num_taken == saved["num_taken"]
        if saved["is_incomplete"] or (is_same_place and steps.checksum != saved["checksum"]):
            sampler = index_sampler(self.loader)
            if type(sampler) is BatchSampler:
                sampler = sampler.sampler
            rank_zero_warn(
                f"{type(sampler).__name__} gives other indices than before the restart, so that the "
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
        """Begin an epoch."""
        entry = self.globals.read()
        self.begun = {"globals": entry}
        if self.unread is not None:
            self.main.write_left(self.unread, is_ended=False)
            self.globals.write(entry)
            self.unread = None
        if self.num_workers:
            self.workers, iterator = start_workers(self.loader, self.lookahead, self.begun, is_watched=False)
            self._begin_following(-1)
        else:
            self.workers, iterator = None, iter(self.loader)
        self._iterator = iterator
        return iterator

    def resume(self, state: State) -> Iterator[Any]:
        """Go on through the data set's own state."""
        entry = self.globals.read()
        iterator = self._open(state)
        if not self.num_workers:
            iterator = self._take_again(iterator, state["befores"])
            if not state["befores"] and not self.is_ended:
                self.unread = state["main"]
        self.globals.write(entry)
        return iterator

    def reopen(self, state: State) -> None:
        """Set the data set, or persistent workers, to what they were when the epoch was left."""
        entry = self.globals.read()
        if self.num_workers and self.loader.persistent_workers and len(state.get("workers", [])) == self.num_workers:
            self._open(state)
        elif not self.num_workers:
            self.main.write_left(state["main"], state["is_ended"])
        self.globals.write(entry)

    def state(self, num_done: int, in_flight: int) -> State:
        """Return the state of the data set here, or in each worker, after the batches that are done with."""
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
        # A short batch is the last one: the data set came to its end, even if the loader has not said so yet.
        is_ended = bool(getattr(getattr(self._iterator, "_dataset_fetcher", None), "ended", False))
        return {**state, "main": self.main.read_own(), "is_ended": self.is_ended or is_ended}

    def after_pull(self) -> None:
        """Find the worker that gave the batch."""
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
            self.is_ended = state["is_ended"]
            if self.is_ended:
                self.main.write_left(state["main"], is_ended=True)
                iterator = iter(())
            else:
                self.main.write_own(state["main"])
                iterator = iter(self.loader)
        self._iterator = iterator
        return iterator
