"""The feed of a run on several ranks: all of them take the same number of steps, whatever their loaders hold.

A rank whose data is used up goes on with *fillers*: its last batch again, which counts for nothing. So every collective
of a step, of the gradient reduction, of the user's own, and of every hook, finds all ranks.

    lengths known     one exchange of numbers when the epoch begins (torch's own samplers, lists)
    others            the next few batches are fetched ahead, and the ranks exchange how many they have got
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Optional

from torch.utils.data import DataLoader, IterableDataset

from levin.data.combined import Joint, iterate
from levin.data.feed import Feed, drawn
from levin.data.samplers import DistributedSamplerWrapper, IndexBatchSampler
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn

WINDOW = 8
"""Batches of unknown number are fetched so far ahead at most."""
UNKNOWN = -1


@dataclass
class Peers:
    """The other ranks, as far as the feed needs them.

    Args:
        rank: Of this process.
        size: Number of processes.
        exchange: Returns the numbers of every rank, in the order of ranks.
        share: ``share(obj, src)`` returns the object of rank ``src``.
        num_collectives: Returns how many collectives this process has taken part in, those of ``exchange`` left out.
    """

    rank: int
    size: int
    exchange: Callable[[list[float]], list[list[float]]]
    share: Callable[[object, int], object]
    num_collectives: Callable[[], int]


class _Window(NamedTuple):
    """The next steps, as all ranks know them."""

    counts: list[int]
    num_steps: int
    is_end: bool
    is_own_end: bool
    lender: Optional[int]


class SharedFeed(Feed):
    """Yields the same number of batches on every rank.

    Args:
        args: As for :class:`~levin.data.feed.Feed`.
        peers: The other ranks.
        rule: When an epoch of training ends: ``"longest"``, ``"shortest"`` or ``"error"``; None in evaluation, where
            every batch is seen, and ranks whose steps do not talk to each other need no fillers.
        uneven: Called as ``uneven(is_filler, num_active)``; the step runs in the context it returns whenever not all
            ranks have a batch of their own.
        kwargs: As for :class:`~levin.data.feed.Feed`.
    """

    def __init__(
        self,
        *args: Any,
        peers: Peers,
        rule: Optional[str],
        uneven: Callable[[bool, int], AbstractContextManager[object]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.peers = peers
        self.rule = rule
        self.uneven = uneven
        self._num_heard: int = 0
        self._has_told_loss: bool = False
        self._num_own: int = 0

    def listen(self) -> None:
        """Look from here on whether the step talks to other ranks; what levin itself says between steps does not count."""
        self._num_heard = self.peers.num_collectives()

    def _batches(
        self, start: int, iterator: Optional[Iterator[object]]
    ) -> Generator[tuple[object, int, int], None, None]:
        if self.is_on_demand:
            # What a step takes of such an iterator is known to the user alone.
            self.is_shared = False
            yield from super()._batches(start, iterator)
            return
        starts = [start] + [0] * (len(self.sources) - 1)
        if iterator is None and start:
            # Only then it is known how much is left.
            iterator = self._open(0, start)
        numbers = [float(self._num_left(i, first)) for i, first in enumerate(starts)]
        table = self.peers.exchange(numbers + [float(_is_length_sure(source)) for source in self.sources])
        columns = [[int(row[i]) for row in table] for i in range(len(self.sources))]
        are_sure = [all(row[len(self.sources) + i] for row in table) for i in range(len(self.sources))]
        last_source = max((i for i, column in enumerate(columns) if any(column)), default=-1)
        for dataloader_idx, column in enumerate(columns):
            first = starts[dataloader_idx]
            self.is_last = False
            has_lengths = min(column) >= 0
            is_known = has_lengths and are_sure[dataloader_idx]
            if not any(column):
                continue
            if iterator is None:
                iterator = self._open(dataloader_idx, first)
            if self._draw is not None:
                iterator = drawn(iterator, self._draw)
            cap = self.end_of(dataloader_idx, first)
            if cap != float("inf"):
                iterator = islice(iterator, max(0, int(cap) - first))
            if is_known:
                windows = iter([self._agree_once(column)])
                ahead: deque[object] = deque()
            else:
                if has_lengths and self.rule is not None and min(column) != max(column):
                    self._tell(column)
                ahead = deque()
                windows = self._agree_by_windows(iterator, ahead)
            yield from self._steps(windows, ahead, iterator, first, dataloader_idx, dataloader_idx == last_source)
            is_cut = self.rule == "shortest" and not is_known
            if self._num_own + first < cap and self.lengths[dataloader_idx] < float("inf") and not is_cut:
                self._distrust(dataloader_idx, self._num_own + first)
            iterator = None

    def _steps(
        self, windows: Iterator[_Window], ahead: deque[object], iterator: Iterator[object], index: int, dataloader_idx: int,
        is_final: bool,
    ) -> Generator[tuple[object, int, int], None, None]:  # fmt: skip
        size, num_collectives = self.peers.size, self.peers.num_collectives
        # In training there are fillers whether steps talk or not.
        listens = self.rule is None
        kept: object = None
        talks = False
        self._num_own = 0
        for counts, num_steps, is_end, is_own_end, lender in windows:
            own, fewest = counts[self.peers.rank], min(counts)
            self._num_own += own
            for number in range(num_steps):
                is_filler = number >= own
                if not is_filler:
                    if ahead:
                        batch = ahead.popleft()
                    else:
                        batch = next(iterator)
                if number == 0 and lender is not None:
                    lent = self.peers.share(batch if self.peers.rank == lender else None, lender)
                    if is_filler:
                        kept = self.place(lent, dataloader_idx)
                num_active = size if number < fewest else sum(number < count for count in counts)
                self.is_shared = num_active == size
                is_last_own = listens and is_own_end and number == own - 1
                self.is_last = is_final and (is_last_own or (is_end and number == num_steps - 1))
                if not is_filler:
                    batch = self.place(batch, dataloader_idx)
                    if listens:
                        self.listen()
                    if num_active == size:
                        yield batch, index, dataloader_idx
                    else:
                        with self.uneven(False, num_active):
                            yield batch, index, dataloader_idx
                    if listens and num_collectives() != self._num_heard:
                        talks = True
                    if number == own - 1:
                        # Kept for the case that others go on.
                        kept = batch
                elif not listens or talks or (index == 0 and lender is not None):
                    self.is_filler = True
                    try:
                        if listens:
                            self.listen()
                        with self.uneven(True, num_active):
                            yield kept, index, dataloader_idx
                        if listens and num_collectives() != self._num_heard:
                            talks = True
                    finally:
                        self.is_filler = False
                index += 1

    def _open(self, dataloader_idx: int, start: int) -> Iterator[object]:
        source = self.sources[dataloader_idx]
        if self.positions is None:
            return iterate(source)
        is_known = self._num_left(dataloader_idx, start) != UNKNOWN and _is_length_sure(source)
        lookahead = 0 if is_known else WINDOW + 1
        return self.positions[dataloader_idx].iterate(source, lookahead)

    def _num_left(self, dataloader_idx: int, start: int) -> int:
        limit, length = self.limits[dataloader_idx], self.lengths[dataloader_idx]
        if limit <= 0 or length <= 0:
            return 0
        if length == float("inf") or _is_said_of_all_ranks(self.sources[dataloader_idx]):
            return UNKNOWN
        return max(0, int(self.end_of(dataloader_idx, start)) - start)

    def _agree_once(self, counts: list[int]) -> _Window:
        if self.rule is not None and min(counts) != max(counts):
            self._tell(counts)
        num_steps = min(counts) if self.rule == "shortest" else max(counts)
        lender = _lender(counts, [False] * len(counts)) if num_steps else None
        return _Window(counts, num_steps, is_end=True, is_own_end=True, lender=lender)

    def _agree_by_windows(self, iterator: Iterator[object], ahead: deque[object]) -> Iterator[_Window]:
        width, has_had = 1, False
        while True:
            # One more than the window, to know whether it is the last.
            ahead.extend(islice(iterator, width + 1 - len(ahead)))
            own = min(len(ahead), width)
            table = self.peers.exchange([float(own), float(len(ahead) > width), float(has_had)])
            counts = [int(row[0]) for row in table]
            goes_on = [bool(row[1]) for row in table]
            is_even = len({*zip(counts, goes_on)}) == 1
            if self.rule is not None and not is_even:
                self._tell([count + more for count, more in zip(counts, goes_on)])
            if self.rule == "shortest":
                num_steps, is_end = min(counts), not all(goes_on)
            else:
                num_steps, is_end = max(counts), not any(goes_on)
            if num_steps == 0:
                return
            lender = _lender(counts, [bool(row[2]) for row in table])
            yield _Window(counts, num_steps, is_end, not goes_on[self.peers.rank], lender)
            if is_end:
                return
            has_had = True
            width = min(2 * width, WINDOW)

    def _tell(self, counts: list[int]) -> None:
        numbers = ", ".join(map(str, counts))
        if self.rule == "error":
            raise MisconfigurationException(
                f"All ranks must have the same number of training batches with uneven='error', received {numbers} "
                "(by rank; of those still to come, as far as they were fetched). Use uneven='longest' to train on all of them, or 'shortest' to leave "
                "out what others do not have."
            )
        if self.rule == "shortest" and not self._has_told_loss:
            self._has_told_loss = True
            rank_zero_warn(
                f"The ranks have {numbers} training batches still to come: with uneven='shortest' the epoch ends after "
                f"{min(counts)}, and the others are left out. Use uneven='longest' to train on all of them."
            )


def _lender(counts: list[int], has_batch: list[bool]) -> Optional[int]:
    """Return the rank that lends its first batch to those that have none to go on with; None if nobody needs one."""
    if not any(count == 0 and not has for count, has in zip(counts, has_batch)):
        return None
    return next(rank for rank, count in enumerate(counts) if count)


def _is_said_of_all_ranks(source: object) -> bool:
    """Whether the length of ``source`` is what an iterable data set says of itself, which may hold for all ranks together."""
    if isinstance(source, Joint):
        return any(_is_said_of_all_ranks(loader) for loader in source.loaders)
    return isinstance(getattr(source, "dataset", None), IterableDataset)


def _is_length_sure(source: object) -> bool:
    """Whether ``source`` gives as many batches as its length says, which only lists and torch's own samplers are known to."""
    if isinstance(source, Joint):
        return all(_is_length_sure(loader) for loader in source.loaders)
    if isinstance(source, (list, tuple)):
        return True
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset):
        return False
    samplers = [source.sampler, source.batch_sampler, *map(_inner, (source.sampler, source.batch_sampler))]
    homes = {type(sampler).__module__.split(".")[0] for sampler in samplers if sampler is not None}
    return homes <= {"torch", "levin"}


def _inner(sampler: object) -> object:
    """Return the user's sampler inside of one that levin put around it, None if there is none."""
    if isinstance(sampler, DistributedSamplerWrapper):
        return sampler.sampler
    return sampler._batch_sampler if isinstance(sampler, IndexBatchSampler) else None
