"""The feed: batches of one loop, on the device, with the knowledge of which one is the last."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Optional, Protocol

import torch

from levin.data.combined import NumberedBatch, iterate
from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import Batch


class Position(Protocol):
    """Follows a source, so that a run can go on in the middle of it; see ``resume/position.py``."""

    num_left: Optional[int]
    """How many batches are left of the epoch, where the length of the source does not tell."""

    def iterate(self, loader: Iterable[object], lookahead: int = 0) -> Iterator[Batch]:
        """Return the batches of the source, or those that are left; ``lookahead`` of them are taken ahead."""


class Feed:
    """Yields ``(batch, batch_idx, dataloader_idx)`` from one loader after the other.

    Args:
        sources: The loaders; a combined loader that yields joint batches counts as one.
        limits: Batches to take of each; inf for all there are.
        lengths: Batches each is known to have, inf when unknown: then one batch is fetched ahead to see the end, also
            when there is a limit, before which it may come. A length that turns out to be too long becomes inf.
        device: Where batches go.
        convert: Changes a batch before the transfer (the precision's input conversion), or None.
        transfer: The chain of the user's transfer hooks, or None for the default.
        on_demand: Yield an :class:`OnDemand` in place of each batch, and leave the batches where they are.
        draw: Called as ``next(iterator, default)`` is, for each batch, so that the wait can be measured; or None.
    """

    def __init__(
        self,
        sources: list[Iterable[object]],
        limits: list[int | float],
        lengths: list[int | float],
        device: torch.device,
        convert: Optional[Callable[[object], object]] = None,
        transfer: Optional[Callable[[object, torch.device, int], object]] = None,
        on_demand: bool = False,
        draw: Optional[Callable[[Iterator[object], object], object]] = None,
    ) -> None:
        self.sources = sources
        self.limits = limits
        self.lengths = lengths
        self.device = device
        self.is_last: bool = False
        # Of runs on several ranks, see shared_feed.py: whether the present batch stands in for one that this rank has
        # not got, and whether every rank has a batch of its own in this step.
        self.is_filler: bool = False
        self.is_shared: bool = True
        self.uneven: Any = None
        self.positions: Optional[Sequence[Position]] = None
        # Of steps that take batches themselves: index of the first batch of the step, and that after the last one taken.
        self.step_start: int = 0
        self.num_taken: int = 0
        # How many batches the first step took, and each of the others: None before the second, -1 when they differ.
        self.first_take: int = 0
        self.later_takes: Optional[int] = None
        self._convert = convert
        self._transfer = transfer
        self._is_moved_alone = convert is None and transfer is None and not on_demand
        self.is_on_demand = on_demand
        self._draw = draw

    def listen(self) -> None:
        """Look from here on whether the steps of this rank talk to other ranks; see shared_feed.py."""

    def place(self, batch: object, dataloader_idx: int) -> object:
        """Return ``batch`` on the device, through the user's hooks."""
        if self.is_on_demand:
            return batch
        if self._convert is not None:
            batch = self._convert(batch)
        if self._transfer is None:
            return move_data_to_device(batch, self.device)
        return self._transfer(batch, self.device, dataloader_idx)

    def __iter__(self) -> Iterator[NumberedBatch]:
        return self.iterate(0)

    def track(self, positions: Sequence[Position]) -> None:
        """Let one of ``positions`` follow each source, so that a run can go on in the middle of it."""
        self.positions = positions

    def end_of(self, dataloader_idx: int, start: int) -> int | float:
        """Return the index after the last batch of a source whose iterator begins at ``start``."""
        limit, length = self.limits[dataloader_idx], self.lengths[dataloader_idx]
        left = None if self.positions is None else self.positions[dataloader_idx].num_left
        if left is None:
            return min(limit, length)
        # Another number of ranks began the epoch: what is left of it is not what the length of the loader says.
        return start + left if limit >= length else min(limit, start + left)

    def iterate(self, start: int, iterator: Optional[Iterator[Batch]] = None) -> Generator[NumberedBatch, None, None]:
        """Yield the batches.

        Args:
            start: Index of the first batch of the first source that ``iterator`` will give.
            iterator: Continues the first source; by default a new iterator of it.
        """
        batches = self._batches(start, iterator)
        return self._on_demand(batches) if self.is_on_demand else batches

    def _on_demand(self, batches: Generator[NumberedBatch, None, None]) -> Generator[Batch, None, None]:
        """Yield an :class:`OnDemand` in place of each batch, and note what the steps take."""
        counted = self._counted(batches)
        self.first_take, self.later_takes = 0, None
        try:
            for item in counted:
                self.step_start = item[1]
                yield OnDemand(item, counted), item[1], item[2]
                num = self.num_taken - self.step_start
                if not self.first_take:
                    self.first_take = num
                else:
                    self.later_takes = num if self.later_takes in (None, num) else -1
        finally:
            batches.close()

    @property
    def is_ahead(self) -> bool:
        """Whether the first step took more batches than each of the others, as steps do that keep some for later."""
        return self.later_takes is not None and 0 < self.later_takes < self.first_take

    def _counted(self, batches: Iterator[NumberedBatch]) -> Iterator[NumberedBatch]:
        for item in batches:
            self.num_taken = item[1] + 1
            yield item

    def _batches(self, start: int, iterator: Optional[Iterator[object]]) -> Generator[NumberedBatch, None, None]:
        place, move, device, is_moved_alone = self.place, move_data_to_device, self.device, self._is_moved_alone
        last_source = max((i for i, limit in enumerate(self.limits) if limit > 0 and self.lengths[i] > 0), default=-1)
        for dataloader_idx, source in enumerate(self.sources):
            limit = min(self.limits[dataloader_idx], self.lengths[dataloader_idx])
            is_final = dataloader_idx == last_source
            if limit <= 0:
                continue
            self.is_last = False
            batch_idx = start
            start = 0
            if iterator is None:
                lookahead = 1 if self.lengths[dataloader_idx] == float("inf") else 0
                followed = None if self.positions is None else self.positions[dataloader_idx]
                iterator = iterate(source) if followed is None else followed.iterate(source, lookahead)
                limit = self.end_of(dataloader_idx, batch_idx)
            if self._draw is not None:
                iterator = drawn(iterator, self._draw)
            if self.lengths[dataloader_idx] == float("inf"):
                for batch, ends in with_end(iterator, limit - batch_idx):
                    self.is_last = ends and is_final
                    yield place(batch, dataloader_idx), batch_idx, dataloader_idx
                    batch_idx += 1
            elif batch_idx < limit:
                for batch in iterator:
                    self.is_last = is_final and batch_idx + 1 >= limit
                    batch = move(batch, device) if is_moved_alone else place(batch, dataloader_idx)
                    yield batch, batch_idx, dataloader_idx
                    batch_idx += 1
                    if batch_idx >= limit:
                        break
                else:
                    self._distrust(dataloader_idx, batch_idx)
                    self.is_last = is_final
            iterator = None

    def _distrust(self, dataloader_idx: int, num_given: int) -> None:
        """Say once that a source ended before its length said so; from now on its end is seen ahead."""
        source: Any = self.sources[dataloader_idx]
        name = getattr(source, "shown_as", type(source).__name__)
        rank_zero_warn(
            f"{name} has a length of {self.lengths[dataloader_idx]} and ended after "
            f"{num_given} batches: the end of the data is the end of the epoch. Let its `__len__` say how many it gives."
        )
        self.lengths[dataloader_idx] = float("inf")


class OnDemand(Iterator[NumberedBatch]):
    """What a step with an argument ``dataloader_iter`` gets: its batch, and after it those that follow.

    Args:
        item: ``(batch, batch_idx, dataloader_idx)`` of this step.
        following: The rest; what is taken from it is not given to later steps.

    Example:
        >>> batches = OnDemand(("a", 0, 0), iter([("b", 1, 0)]))
        >>> next(batches), next(batches)
        (('a', 0, 0), ('b', 1, 0))
    """

    def __init__(self, item: NumberedBatch, following: Iterator[NumberedBatch]) -> None:
        self.batch: Batch = item[0]
        """The batch that was taken last; before the step, the one that comes."""
        self._item: Optional[NumberedBatch] = item
        self._following = following

    def __next__(self) -> NumberedBatch:
        item, self._item = self._item, None
        if item is None:
            item = next(self._following)
        self.batch = item[0]
        return item


def drawn(iterator: Iterator[object], draw: Callable[[Iterator[object], object], object]) -> Iterator[Batch]:
    """Yield the items of ``iterator``, each fetched by ``draw(iterator, default)``."""
    end = object()
    while (item := draw(iterator, end)) is not end:
        yield item


def with_end(iterator: Iterator[object], limit: int | float) -> Iterator[tuple[Batch, bool]]:
    """Yield at most ``limit`` items, each with whether it is the last, by fetching one ahead."""
    if limit <= 0:
        return
    try:
        item = next(iterator)
    except StopIteration:
        return
    number = 1
    # The one after the limit is not fetched.
    while number < limit:
        try:
            following = next(iterator)
        except StopIteration:
            break
        yield item, False
        item = following
        number += 1
    yield item, True
