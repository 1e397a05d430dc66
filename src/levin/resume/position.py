"""Where a run is in its data, so that it can go on there after a restart as if nothing had happened."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from levin.data.combined import Joint, is_stateful, joint
from levin.data.loaders import stop_workers
from levin.resume.cursors import END, Cursor, ReplayCursor, StatefulCursor
from levin.resume.dataloader_cursor import IndexCursor, IterableCursor
from levin.utilities.types import Batch, StateDict


class Position:
    """Where a run is in one loader, or in several that give joint batches.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader, position = DataLoader(range(4), shuffle=True), Position()
        >>> batches = position.iterate(loader)
        >>> seen = next(batches), next(batches)
        >>> saved = position.state_dict()
        >>> later = Position()
        >>> later.load_state_dict(saved)
        >>> list(later.iterate(loader)) == list(batches)
        True
    """

    def __init__(self) -> None:
        self.num_pulled: int = 0
        # Batches that are left, where the length of the loader does not tell.
        self.num_left: int | None = None
        self._cursor: Cursor | None = None
        self._loaded: StateDict | None = None
        self._is_finished: bool = False

    def iterate(self, loader: Iterable[object], lookahead: int = 0) -> Iterator[Batch]:
        """Begin an epoch of ``loader``, or go on in the middle of the one that was loaded.

        Args:
            loader: A DataLoader, a :class:`Joint`, or any iterable.
            lookahead: How many batches the caller takes before it needs them. To be exact with them, the random
                states are read before each batch (about 10 us).

        Returns:
            The batches, or those that are left.
        """
        cursor = self._cursor
        if cursor is None or cursor.loader is not loader or cursor.lookahead != lookahead:
            cursor = cursor_for(loader, lookahead)
        loaded, cursor.num_left = self._loaded, None
        iterator = None if loaded is None else _go_on(cursor, loaded)
        if loaded is None or iterator is None:
            iterator, num_done, is_ended = cursor.start(), 0, False
        else:
            num_done, is_ended = loaded["num_done"], loaded["is_ended"]
        # Until here it was the place before, also for a checkpoint: a worker may be ended while it is being started.
        self._cursor, self._loaded, self._is_finished = cursor, None, False
        self.num_pulled, self.num_left, cursor.is_ended = num_done, cursor.num_left, is_ended
        return self._pull(cursor, iterator)

    def finish(self) -> None:
        """Say that the epoch is over, so that the next :meth:`iterate` begins another, also after a restart."""
        if self._loaded is not None:
            self._loaded = {**self._loaded, "is_finished": True}
        self._is_finished = True
        self.num_left = None

    def state_dict(self, num_done: int | None = None) -> StateDict:
        """Return what a restart needs: numbers, strings, bytes, and what the user's own states hold.

        Args:
            num_done: How many batches of this epoch are done with; by default, and after :meth:`finish`, all that were
                taken.
        """
        if self._loaded is not None:
            return self._loaded
        if self._cursor is None:
            return {}
        num_done = self.num_pulled if num_done is None or self._is_finished else min(num_done, self.num_pulled)
        return {
            "kind": self._cursor.kind,
            "is_finished": self._is_finished,
            "is_ended": self._cursor.is_ended and num_done == self.num_pulled,
            "num_done": num_done,
            **self._cursor.state(num_done, self.num_pulled - num_done),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Take what :meth:`state_dict` returned; the next :meth:`iterate` goes on there."""
        self._loaded = state or None

    def _pull(self, cursor: Cursor, iterator: Iterator[Batch]) -> Iterator[Batch]:
        cursor.before_first()
        # The next epoch may have begun before this one is closed.
        opened = cursor.opened()
        if cursor.follows_pulls:
            iterator = cursor.followed(iterator)
        # A loader that is its own iterator would begin anew if `iter` were called of it again, as `for` does.
        try:
            while (batch := next(iterator, END)) is not END:
                self.num_pulled += 1
                yield batch
        finally:
            stop_workers(opened)
        cursor.is_ended = True


def _go_on(cursor: Cursor, loaded: StateDict) -> Iterator[Batch] | None:
    """Go on in the epoch that was loaded, or leave it if it is over; the global generators stay as they are."""
    present = cursor.rng.read()
    try:
        if not loaded["is_finished"]:
            return cursor.resume(loaded)
        cursor.leave(loaded)
        return None
    finally:
        cursor.rng.write(present)


class JointCursor(Cursor):
    """For a :class:`Joint`: a position in each of its loaders, and which of them have come to their end."""

    kind = "joint"

    def __init__(self, loader: Any, lookahead: int) -> None:
        super().__init__(loader, lookahead)
        self.follows_pulls = True
        self.positions: list[Position] = [Position() for _ in loader.loaders]
        self.exhausted: list[bool] = []
        # Which loaders gave something to each of the last batches.
        self._givers: deque[list[int]] = deque(maxlen=lookahead + 1)
        self._num_opened: list[int] = [0] * len(self.positions)
        # The state of each loader that started again, before its last item until then.
        self._before_last: list[StateDict] = [{} for _ in self.positions]

    @override
    def start(self) -> Iterator[Batch]:
        return self._begin([False] * len(self.positions))

    @override
    def resume(self, state: StateDict) -> Iterator[Batch]:
        if state["is_ended"]:
            self.leave(state)
            self.exhausted = list(state["exhausted"])
            return iter(())
        for position, loaded, ended in zip(self.positions, state["loaders"], state["exhausted"], strict=True):
            position.load_state_dict(loaded)
            if ended and self.loader.mode == "max_size":
                # It is not iterated again in this epoch.
                position.finish()
        return self._begin(list(state["exhausted"]))

    def leave(self, state: StateDict) -> None:
        """Set every loader to what it was after the end of an epoch."""
        for position, loaded in zip(self.positions, state["loaders"], strict=True):
            position.load_state_dict(loaded)
            position.finish()

    @override
    def state(self, num_done: int, num_in_flight: int) -> StateDict:
        givers = list(self._givers)[len(self._givers) - num_in_flight :] if num_in_flight else []
        exhausted = list(self.exhausted)
        pulled = [position.num_pulled for position in self.positions]
        num_opened = self._num_opened
        if num_in_flight and self.is_ended:
            # Looking for another batch took items and set marks.
            exhausted, pulled, num_opened = self.state_before_end
        states = []
        for index, position in enumerate(self.positions):
            num_undone = sum(index in indices for indices in givers)
            if num_opened[index] != self._num_opened[index]:
                states.append(self._before_last[index])
            else:
                states.append(position.state_dict(max(0, pulled[index] - num_undone)))
        if self.loader.mode == "max_size":
            # One that gave something in flight must give it again.
            exhausted = [
                ended and all(index not in indices for indices in givers) for index, ended in enumerate(exhausted)
            ]
        return {"loaders": states, "exhausted": list(exhausted)}

    def before_pull(self) -> object:
        """Return which loaders came to their end, and how often each was taken from and opened."""
        return list(self.exhausted), [position.num_pulled for position in self.positions], list(self._num_opened)

    def after_pull(self) -> None:
        """Remember which loaders gave something to the batch."""
        keeps_all = self.loader.mode != "max_size"
        self._givers.append([index for index, ended in enumerate(self.exhausted) if keeps_all or not ended])

    def _begin(self, exhausted: list[bool]) -> Iterator[Batch]:
        self.exhausted = exhausted
        self._num_opened = [0] * len(self.positions)
        openers = [self._opener(index) for index in range(len(self.positions))]
        return joint(openers, self.loader.mode, self.loader.rebuild, exhausted)

    def _opener(self, index: int) -> Callable[[], Iterator[Batch]]:
        position = self.positions[index]

        def open_loader() -> Iterator[Batch]:
            if self.lookahead and self._num_opened[index]:
                self._before_last[index] = position.state_dict(max(0, position.num_pulled - 1))
            self._num_opened[index] += 1
            return position.iterate(self.loader.loaders[index], self.lookahead)

        return open_loader


def cursor_for(loader: Any, lookahead: int) -> Cursor:
    """Return the cursor for this kind of loader."""
    if isinstance(loader, Joint):
        return JointCursor(loader, lookahead)
    if is_stateful(loader):
        return StatefulCursor(loader, lookahead)
    if _gives_the_batches_of_its_sampler(loader):
        if not isinstance(loader.dataset, IterableDataset):
            return IndexCursor(loader, lookahead)
        if is_stateful(loader.dataset):
            return IterableCursor(loader, lookahead)
    return ReplayCursor(loader, lookahead)


def _gives_the_batches_of_its_sampler(loader: object) -> bool:
    """Whether the batches of ``loader`` correspond to the indices of its sampler, one to one."""
    kind: Any = type(loader)
    return (
        isinstance(loader, DataLoader)
        and kind.__iter__ is DataLoader.__iter__
        and kind._get_iterator is DataLoader._get_iterator
        and {"sampler", "batch_sampler", "collate_fn"} <= vars(loader).keys()
    )
