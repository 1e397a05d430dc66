"""Steps for which not all ranks have a batch of their own: what they do differently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

from levin.ranks.shared_feed import Peers, SharedFeed
from levin.resume.metric_states import collect_metric_states, load_metric_states
from levin.strategies.parallel import ParallelStrategy
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.process_group import is_connected
from levin.utilities.types import Batch, StateDict

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.protocols import Run
    from levin.strategies.strategy import Strategy


class Uneven:
    """Lets a filler count for nothing, and the batches of the other ranks for all of the step.

    The loss of a filler is multiplied by zero, its logged values have no weight, and the states of metric objects are
    put back after it.

    Args:
        run: Whose steps.
        size: Number of processes.
    """

    def __init__(self, run: Run, size: int) -> None:
        self.size: int = size
        self.is_filler: bool = False
        self.num_lacking: int = 0
        self._run = run
        self._metrics: dict[str, Any] | None = None

    @property
    def share(self) -> float:
        """What the batch of this rank counts in a plain mean over all ranks."""
        return 0.0 if self.is_filler else self.size / (self.size - self.num_lacking)

    @contextmanager
    def __call__(self, is_filler: bool, num_active: int) -> Iterator[None]:
        """Run a step for which ``num_active`` ranks have a batch of their own."""
        self.is_filler, self.num_lacking = is_filler, self.size - num_active
        store = self._run.store
        store.is_filler = is_filler
        if is_filler:
            self._metrics = _copied(collect_metric_states(self._run.module))
        try:
            yield
        finally:
            self.forget_filler()
            store.is_filler = None
            self.is_filler, self.num_lacking = False, 0

    def forget_filler(self) -> None:
        """Put the metrics back to what they were before the filler; what follows in the same step counts."""
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            for state in metrics.values():
                # Where nothing was ever seen, metrics would otherwise warn that they were not updated.
                state["update_count"] = max(1, state["update_count"])
            load_metric_states(self._run.module, metrics)
        # On all ranks: what was computed in the step counts the fillers of others, too.
        children: Iterator[Batch] = self._run.module.modules()
        for child in children if self.num_lacking else ():
            if hasattr(child, "_update_count") and hasattr(child, "_computed"):
                child._computed = None


def _copied(states: StateDict) -> dict[str, object]:
    return {name: {key: _copy(value) for key, value in state.items()} for name, state in states.items()}


def _copy(value: object) -> object:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


def shared_feed(run: Run, stage: str, *args: object) -> Feed:
    """Return the feed of a stage on several ranks.

    Args:
        run: The run.
        stage: ``"train"``, ``"val"``, ``"test"`` or ``"predict"``.
        args: As for :class:`~levin.data.feed.Feed`.
    """
    strategy = run.strategy
    assert is_shared(strategy)
    data = strategy.data_parallel
    control = strategy.data_control
    peers = Peers(data.rank, data.size, control.exchange, control.share, strategy.num_collectives)
    uneven = Uneven(run, data.size)
    return SharedFeed(*args, peers=peers, rule=strategy.uneven if stage == "train" else None, uneven=uneven)


def agreed_batches(strategy: Strategy, num_batches: float, rule: str = "longest") -> int | float:
    """Return how many batches of one loader all ranks go through together; each asks with its own number."""
    if not is_shared(strategy) or not is_connected():
        return num_batches
    numbers = [row[0] for row in strategy.data_control.exchange([float(num_batches)], "lengths")]
    agreed = min(numbers) if rule == "shortest" else max(numbers)
    return agreed if agreed == float("inf") else int(agreed)


def is_any_batch(strategy: Strategy, batches_per_loader: Sequence[float], hook: str) -> bool:
    """Return whether any loader has a batch on any rank; each asks with its own.

    Args:
        strategy: All its processes come here.
        batches_per_loader: Of this rank.
        hook: That gave the loaders, for the message.

    Raises:
        ValueError: The ranks have different numbers of loaders, on all ranks.
    """
    own = [float(sum(batches_per_loader)), float(len(batches_per_loader))]
    rows = strategy.data_control.exchange(own, "lengths") if is_shared(strategy) and is_connected() else [own]
    numbers = [int(number) for _, number in rows]
    if len(set(numbers)) > 1:
        raise MisconfigurationException(
            f"`{hook}` must give as many loaders on one rank as on another, received {numbers} in the order of ranks. Give each "
            "rank all loaders, an empty one where it has no data."
        )
    return any(num_batches for num_batches, _ in rows)


def is_shared(strategy: Strategy) -> TypeGuard[ParallelStrategy]:
    """Whether the data is split over several ranks, which take their steps together."""
    return isinstance(strategy, ParallelStrategy) and strategy.data_parallel.size > 1
