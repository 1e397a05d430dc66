"""How the place in a loader is kept and found again: what all kinds share, and the kinds that are not PyTorch's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from typing_extensions import override

from levin.resume.stateful import leave_epoch
from levin.resume.worker_state import WorkerState
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.rng_states import ProcessRng
from levin.utilities.types import Batch, StateDict

END: object = object()


class Cursor(ABC):
    """Starts one loader, says where it is, and starts it there again.

    Args:
        loader: The loader.
        lookahead: How many batches its user takes before they are needed.
    """

    kind: str

    def __init__(self, loader: object, lookahead: int) -> None:
        self.loader: Any = loader
        self.lookahead: int = lookahead
        self.follows_pulls: bool = lookahead > 0
        self.rng: ProcessRng = ProcessRng()
        # The states that the present epoch began with.
        self.epoch_start: StateDict = {}
        # How many batches are left of an epoch that goes on with another number of ranks, or other batches.
        self.num_left: int | None = None
        # Whether the present epoch came to its end.
        self.is_ended: bool = False
        # The state that was loaded to go on from, until the first batch is taken.
        self.unread: Any = None
        # The states before each of the last batches, the oldest first.
        self.states_before: deque[object] = deque(maxlen=lookahead + 1)
        # The state in which there was no further batch, which is found out again after those in flight.
        self.state_before_end: Any = None

    @abstractmethod
    def start(self) -> Iterator[Batch]:
        """Begin an epoch."""

    @abstractmethod
    def resume(self, state: StateDict) -> Iterator[Batch]:
        """Go on in the epoch that ``state`` was saved in; the caller sets the global generators back afterwards."""

    @abstractmethod
    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return what :meth:`resume` needs.

        Args:
            num_done: Batches of the epoch that are done with.
            num_in_flight: Batches taken but not done with.
        """

    def leave(self, state: StateDict) -> None:
        """Set everything to what it was when ``state`` was saved, after the end of an epoch; as for :meth:`resume`."""

    def opened(self) -> object:
        """Return the loader's iterator of the present epoch, whose workers end with the epoch, or None."""

    def before_first(self) -> None:
        """Do what must be done right before the first batch is taken."""
        self.unread = None

    def followed(self, iterator: Iterator[Batch]) -> Iterator[Batch]:
        """Yield from ``iterator``, keeping the state before each batch."""
        while True:
            before = self.before_pull()
            batch = next(iterator, END)
            if batch is END:
                self.state_before_end = before
                return
            self.states_before.append(before)
            self.after_pull()
            yield batch

    def before_pull(self) -> object:
        """Return what taking the next batch again will need."""
        return None

    def after_pull(self) -> None:
        """Do what must be done with every batch taken."""

    def in_flight_states(self, num_in_flight: int) -> list[Any]:
        """Return the states before each of the batches in flight, and before their end where it was seen."""
        num_kept = len(self.states_before)
        if not 0 < num_in_flight <= num_kept:
            return []
        return list(self.states_before)[num_kept - num_in_flight :] + [self.state_before_end] * self.is_ended

    def take_again(
        self, iterator: Iterator[Batch], befores: list[object], write: Callable[[Any], object]
    ) -> Iterator[Batch]:
        """Take the batches again that were in flight, each from the state it was taken from.

        Args:
            iterator: Gives them, and what follows.
            befores: Of :meth:`in_flight_states`.
            write: Sets the generators to one of these.
        """
        taken: list[Batch] = []
        for before in befores:
            if before is None:
                break
            write(before)
            batch = next(iterator, END)
            if batch is END:
                return iter(taken)
            self.states_before.append(before)
            taken.append(batch)
        return _taken_first(taken, iterator) if taken else iterator


class StatefulCursor(Cursor):
    """For loaders with ``state_dict`` and ``load_state_dict``, which know best where they are."""

    kind = "stateful"

    @override
    def start(self) -> Iterator[Batch]:
        self.epoch_start = self.rng.read()
        if self.unread is not None:
            self._leave(self.unread, is_ended=False)
            self.rng.write(self.epoch_start)
        return iter(self.loader)

    def resume(self, state: StateDict) -> Iterator[Batch]:
        """Go on through the loader's own state."""
        self.epoch_start = state["epoch_start"]
        if state["is_ended"]:
            self._leave(state["loader_state"], is_ended=True)
            return iter(())
        self.rng.write(self.epoch_start)
        self.loader.load_state_dict(state["loader_state"])
        iterator: Iterator[Batch] = iter(self.loader)
        self.unread = state["loader_state"]
        return iterator

    @override
    def opened(self) -> object:
        return getattr(self.loader, "_iterator", None)

    def leave(self, state: StateDict) -> None:
        """Give the loader the state that it had when its epoch was left."""
        self._leave(state["loader_state"], state["is_ended"])

    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return the loader's own state before the first batch that is not done with."""
        befores = self.in_flight_states(num_in_flight)
        return {
            "epoch_start": self.epoch_start,
            "loader_state": befores[0] if befores else self.loader.state_dict(),
        }

    def before_pull(self) -> object:
        """Return the loader's own state."""
        return self.loader.state_dict()

    def _leave(self, loader_state: object, is_ended: bool) -> None:
        self.unread = None
        leave_epoch(self.loader, loader_state, is_ended)


class ReplayCursor(Cursor):
    """For iterables that cannot say where they are: batches that were seen are made again and dropped."""

    kind = "replay"

    def __init__(self, loader: object, lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.is_builtin: bool = isinstance(loader, (list, tuple, range, str))
        self.main: WorkerState = WorkerState(getattr(loader, "dataset", loader), getattr(loader, "collate_fn", None))

    @override
    def start(self) -> Iterator[Batch]:
        self.epoch_start = {} if self.is_builtin else self.main.read()
        return iter(self.loader)

    def resume(self, state: StateDict) -> Iterator[Batch]:
        """Begin the epoch again and drop what was seen, with a warning."""
        num_done = state["num_done"]
        if self.is_builtin:
            return islice(self.loader, num_done, None)
        if num_done:
            rank_zero_warn(
                f"{type(self.loader).__name__} cannot say where it is: its first {num_done} batches are read again and "
                "dropped. Give it `state_dict` and `load_state_dict` to go on at once, and exactly."
            )
        self.epoch_start = state["epoch_start"]
        self.main.write_left(self.epoch_start, is_ended=False)
        self.rng.write(self.epoch_start["globals"])
        iterator = iter(self.loader)
        for _ in range(num_done):
            if next(iterator, END) is END:
                break
        return self.take_again(iterator, state["in_flight_states"], self.rng.write)

    def leave(self, state: StateDict) -> None:
        """Set what the loader holds to what it was when its epoch was left."""
        self.main.write_left(state["at_save"], state["is_ended"])

    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        """Return the states when the epoch began, before each batch in flight, and now."""
        return {
            "epoch_start": self.epoch_start,
            "in_flight_states": self.in_flight_states(num_in_flight),
            "at_save": {} if self.is_builtin else self.main.read_own(),
        }

    def before_pull(self) -> object:
        """Return the states of the global generators."""
        return {} if self.is_builtin else self.rng.read()


def _taken_first(taken: list[object], iterator: Iterator[Batch]) -> Iterator[Batch]:
    """Yield batches that were taken already, then the rest."""
    yield from taken
    # `chain` would call `iter` of the iterator, and a loader that is its own iterator would begin anew.
    while (batch := next(iterator, END)) is not END:
        yield batch
