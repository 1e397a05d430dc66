"""What all ranks agree on while they run: to stop, to end for a signal, that a save has failed, and what time it is.

Any rank may be told something at any moment. If it acted at once, the others would wait for it in their next collective.
So every rank calls :meth:`Agreement.maybe_sync` at the same batches, and every so many calls the ranks exchange what they
were told: a few times a second, in a process group of their own over the CPU. An exchange begins one call before its answers
are read, so that steps do not wait for it. Between two exchanges a call is one subtraction.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from levin.protocols import Run
from levin.ranks.same_everywhere import AlikeCheck
from levin.strategies.control_group import Rows
from levin.strategies.parallel import ParallelStrategy
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import StopFlags

PERIOD_S = 0.25
"""Seconds between two exchanges, about."""


def calls_until_sync(seconds_per_call: float, num_before: int) -> int:
    """Return how many calls of :meth:`Agreement.maybe_sync` go by until the next exchange.

    Where calls are slow, each is an exchange that is waited for: of a stop nobody hears later than that.

    Args:
        seconds_per_call: How long it took from one call to the next, on the slowest rank.
        num_before: How many calls went by before the last exchange: the number at most doubles, so that a few quick
            steps at the beginning do not make ranks deaf to what comes after.

    Example:
        >>> calls_until_sync(0.01, 100), calls_until_sync(0.01, 4), calls_until_sync(3.0, 4)
        (25, 8, 1)
    """
    least = 1 if seconds_per_call > 2 * PERIOD_S else 2
    return max(least, min(int(PERIOD_S / max(seconds_per_call, 1e-6)), 2 * num_before))


class Agreement:
    """What all ranks have agreed on so far, the same on every rank.

    Args:
        told: What this rank is told.
        begin: Begins an exchange of numbers; what it returns waits for those of every rank, in the order of ranks.
        check: Raises what has failed in the background of this rank, if anything.
        alike: Compares what must be alike on all ranks; None where nothing is compared.
    """

    def __init__(
        self,
        told: StopFlags,
        begin: Callable[[list[float]], Rows],
        check: Callable[[], None],
        alike: AlikeCheck | None = None,
    ) -> None:
        self.should_stop: bool = False
        self.received_sigterm: bool = False
        # Since the beginning of the run, as of the last exchange.
        self.time_s: float = 0.0
        self._told = told
        self._begin = begin
        self._check = check
        self._alike = alike
        self._started_s: float = time.monotonic()
        self._num_calls: int = 1
        self._num_left: int = 1
        # An exchange under way, and what has failed on this rank when it began.
        self._rows: Rows | None = None
        self._error: Exception | None = None

    def maybe_sync(self) -> None:
        """Exchange what ranks were told, if it is time to; every rank calls this after the same batches.

        Raises:
            Exception: What has failed in the background on this rank.
            RuntimeError: It has failed on another rank, or the ranks log different values of steps.
        """
        self._num_left -= 1
        if self._rows is None and self._num_left <= 1:
            self._ask()
        if self._rows is not None and self._num_left <= 0:
            self._take(self._rows)

    def sync(self) -> None:
        """Exchange what ranks were told; every rank calls this at the same moment. Raises as :meth:`maybe_sync` does."""
        if self._rows is not None:
            self._take(self._rows)
        self._take(self._ask())

    def _ask(self) -> Rows:
        told = self._told
        self._error = error = self._failure()
        alike = [] if self._alike is None else self._alike.numbers()
        passed_s = time.monotonic() - self._started_s
        self._rows = self._begin([told.should_stop, told.received_sigterm, error is not None, passed_s, *alike])
        return self._rows

    def _take(self, rows: Rows) -> None:
        told, error = self._told, self._error
        self._rows = self._error = None
        stops, signals, failures, times, *shown = zip(*rows())
        self.should_stop = any(stops)
        if self.should_stop:
            told.should_stop = True
        self.received_sigterm = self.received_sigterm or any(signals)
        num_calls = max(1, self._num_calls - self._num_left)
        now_s = max(self.time_s, *times)
        self._num_calls = self._num_left = calls_until_sync((now_s - self.time_s) / num_calls, num_calls)
        self.time_s = now_s
        if error is not None:
            raise error
        if any(failures):
            rank = failures.index(True)
            raise RuntimeError(f"Saving in the background failed on rank {rank}, which tells why.")
        if self._alike is not None:
            self._alike.compare(*shown)

    def _failure(self) -> Exception | None:
        try:
            self._check()
        except Exception as error:  # raised again once all ranks know
            return error
        return None


def agreement_for(run: Run) -> Agreement | None:
    """Return an agreement for ``run``, None where there is no other rank to agree with."""
    strategy = run.strategy
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return None
    return Agreement(run.told, strategy.control.begin, strategy.checkpoint_io.check, AlikeCheck(run))


def agreed_value(run: Run, name: str, value: Any) -> object:
    """Return the value that steers what must be alike on all ranks: this one if it is the same on all, else their mean.

    Args:
        run: Each of whose ranks calls this.
        name: Under which the value was logged, for the warning.
        value: Of this rank; None where it was not logged.
    """
    if run.agreement is None:
        return value
    strategy = run.strategy
    assert isinstance(strategy, ParallelStrategy), "there is an agreement on several ranks alone"
    own = [0.0, 0.0] if value is None else [1.0, float(value)]
    rows = strategy.control.exchange(own, name)
    values = [number for is_there, number in rows if is_there]
    # What is no number is the same as itself.
    if not values or (len(values) == len(rows) and len({str(number) for number in values}) == 1):
        return value
    mean = sum(values) / len(values)
    if name not in run.unequal_values:
        run.unequal_values.add(name)
        rank_zero_warn(
            f"{name!r} is not the same on all ranks, received {values}. Their mean {mean} is used, so that all ranks do the "
            f"same. Log it with self.log({name!r}, ..., sync_dist=True)."
        )
    return torch.as_tensor(mean, dtype=value.dtype, device=value.device) if isinstance(value, Tensor) else mean
