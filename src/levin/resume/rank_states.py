"""What every rank has of its own in a checkpoint, which rank 0 alone writes: random states, places in the data, sums.

The state of rank 0 lies in the tree as it is. That of each other rank is an entry of bytes, which no rank but its own
takes apart.
"""

from __future__ import annotations

import io
from collections.abc import Iterable

import torch
from torch import Tensor

from levin.checkpoint.io import own_parts
from levin.strategies.parallel import ParallelStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict

_OTHERS = "other_ranks"
# In a file that one rank saved without the others: how many there were.
_ALONE = "alone_of"
_CPU = torch.device("cpu")


def with_other_ranks(own: StateDict, strategy: Strategy) -> StateDict:
    """Return what rank 0 writes: its own state and, beside it, those of the other ranks; all ranks call this."""
    own = own_parts(own)
    data = strategy.data_parallel
    if not isinstance(strategy, ParallelStrategy) or data.size == 1:
        return own
    if strategy.control.is_closed:
        return {**own, _ALONE: data.size}
    others = strategy.data_control.collect(torch.empty(0, dtype=torch.uint8) if data.rank == 0 else _packed(own))
    return own if others is None else {**own, _OTHERS: others}


def part_of_rank(state: StateDict, rank: int, size: int, weights_only: bool | None = None) -> StateDict:
    """Return the state of ``rank``, out of what :func:`with_other_ranks` returned.

    Args:
        state: As it was saved, by any number of processes.
        rank: Of this process, among those that see different data.
        size: Number of those now. When it is another one, what cannot go on is left out, with a warning.
        weights_only: Whether reading the entry of a rank may run no code; None for the default, which is True.
    """
    first = {key: value for key, value in state.items() if key != _OTHERS}
    others: list[Tensor] = state.get(_OTHERS, [])
    num_saved = 1 + len(others)
    own = _unpacked(others[rank - 1], weights_only) if 0 < rank < num_saved else first
    if num_saved == size:
        return own
    if state.get(_ALONE) == size:
        rank_zero_warn(
            "The checkpoint was saved by one process alone, because a process had failed. The run goes on, but is not the "
            "unbroken one: random numbers are others, and values logged or counted by metrics in the epoch so far are left "
            "out of its end."
        )
        return first if rank == 0 else _shared_part(first)
    rank_zero_warn(
        f"The checkpoint was saved by {num_saved} processes, received {size}. The run goes on, but is not the unbroken "
        "one: the samples of the epoch that are left are spread over the processes that are there, random numbers are "
        "others, and values logged or counted by metrics in the epoch so far are left out of its end."
    )
    shared = _shared_part(own)
    if rank < num_saved:
        shared["rng"] = own["rng"]
    if "window" in shared:
        # The one thing that all ranks have a part in.
        shared["window"] = _mean_window(
            first.get("window", {}), (_unpacked(other, weights_only) for other in others), num_saved, size
        )
    return shared


def _packed(state: StateDict) -> Tensor:
    buffer = io.BytesIO()
    torch.save(move_data_to_device(state, _CPU), buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Tensor, weights_only: bool | None) -> StateDict:
    from levin.checkpoint.reading import load

    state: StateDict = load(io.BytesIO(data.numpy().tobytes()), "cpu", weights_only)
    return state


def _shared_part(state: StateDict) -> StateDict:
    """Return a state without what belongs to one rank alone: its sums, and its random numbers, which no two may draw."""
    return {key: value for key, value in state.items() if key not in ("rng", "validation_rng", "log_store", "metrics")}


def _mean_window(first: StateDict, others: Iterable[StateDict], num_saved: int, size: int) -> StateDict:
    """Return the unfinished accumulation window for ranks of another number: their mean stays what it was."""
    if not first.get("gradients"):
        return dict(first)
    gradients: list[Tensor | None] = list(first["gradients"])
    weight = first.get("weight", 0)
    for other in others:
        window = other.get("window", {})
        if not window.get("gradients"):
            return dict(first)
        gradients = [_sum(total, more) for total, more in zip(gradients, window["gradients"], strict=True)]
        weight = weight + window.get("weight", 0)
    mean = {**first, "gradients": [None if total is None else total / num_saved for total in gradients]}
    if "weight" in mean:
        mean["weight"] = weight / num_saved
        mean["lacks"] = mean.get("lacks", 0) * size / num_saved
    return mean


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if total is None or more is None:
        return more if total is None else total
    return total + more
