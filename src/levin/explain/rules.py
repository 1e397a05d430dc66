"""What is due after which batch: the loop's own rules, asked ahead, and their answers in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

from levin.explain.node import Place
from levin.loops.fit import accumulates_after, logs_step, validates_now
from levin.loops.run import Run
from levin.loops.schedulers import due_schedulers
from levin.utilities.types import LRSchedulerConfig

NUM_ASKED = 20_000
"""About how many batches each rule is asked, at most."""


class Rules:
    """Asks the rules of the training loop about batches that are still to come.

    Args:
        run: Composed, with counters of its own, which are moved to the batch that is asked about.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.num_batches: int | float = run.loops.fit.max_batches
        self.probed = int(min(self.num_batches, NUM_ASKED))
        closed = [not self.accumulates(Place(0, index)) for index in range(self.probed)]
        self._steps_before = [0, *itertools.accumulate(closed)]

    def is_last(self, place: Place) -> bool:
        """Whether it is the last batch of its epoch."""
        return place.batch_idx + 1 >= self.num_batches

    def accumulates(self, place: Place) -> bool:
        """Whether no optimizer step follows the batch."""
        return accumulates_after(self.run, place.batch_idx, self.is_last(place))

    def opens_window(self, place: Place) -> bool:
        """Whether gradients are zeroed before those of the batch are added."""
        return place.batch_idx == 0 or not self.accumulates(place._replace(batch_idx=place.batch_idx - 1))

    def validates(self, place: Place) -> bool:
        """Whether a validation follows the batch."""
        self._move(place)
        return self.run.enable_validation and validates_now(self.run, place.batch_idx, self.is_last(place))

    def logs(self, place: Place) -> bool:
        """Whether the values of the step go to the loggers."""
        if self.accumulates(place):
            return False
        before = place.epoch * self._steps_before[-1] + self._steps_before[place.batch_idx]
        return logs_step(self.run, before)

    def steps(self, config: LRSchedulerConfig) -> Callable[[Place], bool]:
        """Return a rule: whether a scheduler is stepped at a batch."""

        def rule(place: Place) -> bool:
            self._move(place)
            if self.accumulates(place) if config.interval == "step" else not self.is_last(place):
                return False
            due = due_schedulers(self.run, config.interval, config.reduce_on_plateau)
            return any(config is each for each in due)

        return rule

    def batches_in(self, epoch: int) -> int:
        """Return how many batches an epoch has, as far as that is asked ahead; fewer where ``max_steps`` ends it."""
        if (left := self._steps_left(epoch)) is None:
            return self.probed
        return next((index for index in range(self.probed + 1) if self._steps_before[index] >= left), self.probed)

    def num_epochs(self) -> int:
        """Return how many epochs begin, as far as that is asked ahead."""
        most = self.run.loops.fit.max_epochs
        asked = max(2, NUM_ASKED // max(1, self.probed))
        count = asked if most is None or most < 0 else min(most, asked)
        lefts = ((epoch, self._steps_left(epoch)) for epoch in range(count))
        return next((epoch for epoch, left in lefts if left is not None and left <= 0), count)

    def _is_all(self) -> bool:
        """Whether the run has no batches beyond those that are asked about."""
        most, count = self.run.loops.fit.max_epochs, self.num_epochs()
        left = self._steps_left(count)
        return self.probed == self.num_batches and (count == most or (left is not None and left <= 0))

    def _steps_left(self, epoch: int) -> int | None:
        most = self.run.loops.fit.max_steps
        if most < 0 or not self.run.module.automatic_optimization:
            return None
        return most - epoch * self._steps_before[-1]

    def _move(self, place: Place) -> None:
        """Set the counters to the batch, as they are when the loop asks."""
        loop = self.run.loops.fit
        loop.epoch_progress.current.completed = place.epoch
        progress = loop.epoch_loop.batch_progress
        progress.current.ready = place.batch_idx + 1
        if self.num_batches != math.inf:
            progress.total.ready = place.epoch * int(self.num_batches) + place.batch_idx + 1

    def words(self, due: Callable[[Place], object]) -> str:
        """Return in words after which batches ``due`` says yes; "" for never.

        Every answer is asked for: nothing is concluded from settings.
        """
        epochs = [
            [index for index in range(self.batches_in(epoch)) if due(Place(epoch, index))]
            for epoch in range(self.num_epochs())
        ]
        having = [epoch for epoch, indices in enumerate(epochs) if indices]
        if not having:
            num_asked = sum(map(self.batches_in, range(len(epochs))))
            return "" if self._is_all() else f"not within the first {num_asked} batches"
        # An epoch that max_steps cuts short may lack the end of what the others have.
        whole = [epoch for epoch in range(len(epochs)) if self.batches_in(epoch) == self.probed] or [0]
        kinds = {tuple(epochs[epoch]) for epoch in whole if epochs[epoch]}
        if len(kinds) <= 1:
            pattern = _pattern(epochs[having[0]], self.batches_in(having[0]), self.num_batches)
            chosen = _epochs(having, len(epochs))
            return f"{pattern}{' of ' + chosen if chosen else ''}"
        in_run = [epoch * self.probed + index for epoch, indices in enumerate(epochs) for index in indices]
        every = _step_of(in_run, len(epochs) * self.probed)
        return f"after every {_nth(every)} batch of the run" if every else f"after batches {_few(in_run)} of the run"


def _pattern(indices: Sequence[int], count: int, length: int | float) -> str:
    """Say after which of ``count`` batches."""
    has_end = length == count
    if len(indices) == count:
        return "after every batch"
    if has_end and list(indices) == [count - 1]:
        return "after the last batch"
    if every := _step_of(indices, count):
        return f"after every {_nth(every)} batch"
    if has_end and indices[-1] == count - 1 and (every := _step_of(indices[:-1], count)):
        return f"after every {_nth(every)} batch and the last"
    return f"after batch_idx {_few(indices)}"


def _epochs(having: Sequence[int], count: int) -> str:
    """Say which of ``count`` epochs; "" for all."""
    if len(having) == count:
        return ""
    every = _step_of(having, count)
    return f"every {_nth(every)} epoch" if every else f"epochs {_few(having)}"


def _step_of(indices: Sequence[int], count: int) -> int:
    """Return k where ``indices`` are exactly those below ``count`` that end a group of k; 0 where there is no such k."""
    every = indices[0] + 1 if indices else 0
    return every if every > 1 and list(indices) == list(range(every - 1, count, every)) else 0


def _nth(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _few(numbers: Iterable[int], most: int = 6) -> str:
    words = [str(number) for number in numbers]
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")
