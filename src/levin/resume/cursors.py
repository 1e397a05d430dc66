"""How the place in a loader is kept and found again: what all kinds share, and the kinds that are not PyTorch's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from levin.resume.rng_states import GlobalGenerators
from levin.resume.stateful import leave_epoch
from levin.resume.worker_state import WorkerState
from levin.utilities.rank_zero import rank_zero_warn

State = dict[str, Any]
END: Any = object()


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
        # How many batches are left of an epoch that goes on with another number of ranks, or other batches.
        self.num_left: int | None = None
        # Whether the present epoch came to its end.
        self.is_ended: bool = False
        # The state that was set to go on from, until the first batch is taken.
        self.unread: Any = None
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
        self.unread = None

    def followed(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Yield from ``iterator``, keeping the state before each batch."""
        while True:
            before = self.before_pull()
            batch = next(iterator, END)
            if batch is END:
                self.after_end(before)
                return
            self.befores.append(before)
            self.after_pull()
            yield batch

    def before_pull(self) -> Any:
        """Return what taking the next batch again will need."""
        return None

    def after_pull(self) -> None:
        """Do what must be done with every batch taken."""

    def after_end(self, before: Any) -> None:
        """Do what must be done when there was no further batch to take."""

    def _last_befores(self, in_flight: int) -> list[Any]:
        return list(self.befores)[len(self.befores) - in_flight :] if 0 < in_flight <= len(self.befores) else []


class StatefulTracker(Tracker):
    """For loaders with ``state_dict`` and ``load_state_dict``, which know best where they are."""

    kind = "stateful"

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        if self.unread is not None:
            self._leave(self.unread, is_ended=False)
        self.begun = self.globals.read()
        return iter(self.loader)

    def resume(self, state: State) -> Iterator[Any]:
        """Go on through the loader's own state."""
        self.begun = state["begun"]
        if state["is_ended"]:
            self._leave(state["own"], is_ended=True)
            return iter(())
        entry = self.globals.read()
        self.globals.write(self.begun)
        self.loader.load_state_dict(state["own"])
        iterator: Iterator[Any] = iter(self.loader)
        self.unread = state["own"]
        self.globals.write(entry)
        return iterator

    def reopen(self, state: State) -> None:
        """Give the loader the state that it had when its epoch was left."""
        self._leave(state["own"], state["is_ended"])

    def state(self, num_done: int, in_flight: int) -> State:
        """Return the loader's own state before the first batch that is not done with."""
        befores = self._last_befores(in_flight)
        return {"begun": self.begun, "own": befores[0] if befores else self.loader.state_dict()}

    def before_pull(self) -> Any:
        """Return the loader's own state."""
        return self.loader.state_dict()

    def _leave(self, own: Any, is_ended: bool) -> None:
        self.unread = None
        entry = self.globals.read()
        leave_epoch(self.loader, own, is_ended)
        self.globals.write(entry)


class ReplayTracker(Tracker):
    """For iterables that cannot say where they are: batches that were seen are made again and dropped."""

    kind = "replay"

    def __init__(self, loader: Any, lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.is_builtin: bool = isinstance(loader, (list, tuple, range, str))
        self.main: WorkerState = WorkerState(getattr(loader, "dataset", loader), getattr(loader, "collate_fn", None))

    def start(self) -> Iterator[Any]:
        """Begin an epoch."""
        self.begun = {} if self.is_builtin else {"globals": self.globals.read(), **self.main.read_own()}
        return iter(self.loader)

    def resume(self, state: State) -> Iterator[Any]:
        """Begin the epoch again and drop what was seen, with a warning."""
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
        self.main.write_left(self.begun, is_ended=False)
        self.globals.write(self.begun["globals"])
        iterator = iter(self.loader)
        for _ in range(num_done):
            if next(iterator, END) is END:
                break
        taken = []
        for before in state["befores"]:
            self.globals.write(before)
            taken.append(next(iterator, END))
        self.globals.write(entry)
        return chain((batch for batch in taken if batch is not END), iterator)

    def reopen(self, state: State) -> None:
        """Set what the loader holds to what it was when its epoch was left."""
        entry = self.globals.read()
        self.main.write_left(state["now"], state["is_ended"])
        self.globals.write(entry)

    def state(self, num_done: int, in_flight: int) -> State:
        """Return the states when the epoch began, before each batch in flight, and now."""
        now = {} if self.is_builtin else self.main.read_own()
        return {"begun": self.begun, "befores": self._last_befores(in_flight), "now": now}

    def before_pull(self) -> Any:
        """Return the states of the global generators."""
        return {} if self.is_builtin else self.globals.read()
