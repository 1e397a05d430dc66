"""What every rank has of its own in a checkpoint, which rank 0 alone writes: random states, places in the data, sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import rank_zero_warn

State = dict[str, Any]
_OTHERS = "other_ranks"
# In a file that one rank saved without the others: how many there were.
_ALONE = "alone_of"
_CPU = torch.device("cpu")


def with_other_ranks(own: State, strategy: Any) -> State:
    """Return what rank 0 writes: its own state and, beside it, those of the other ranks; all ranks call this."""
    size = strategy.data_parallel.size
    if not strategy.is_distributed or size == 1:
        return own
    if strategy.control.is_closed:
        return {**own, _ALONE: size}
    states = strategy.data_control.gather(move_data_to_device(own, _CPU))
    return own if states is None else {**own, _OTHERS: states[1:]}


def part_of_rank(state: State, rank: int, size: int) -> State:
    """Return the state of ``rank``, out of what :func:`with_other_ranks` returned.

    Args:
        state: As it was saved, by any number of processes.
        rank: Of this process, among those that see different data.
        size: Number of those now. When it is another one, what cannot go on is left out, with a warning.
    """
    states: list[State] = [{key: value for key, value in state.items() if key != _OTHERS}, *state.get(_OTHERS, [])]
    if len(states) == size:
        return states[rank]
    if state.get(_ALONE) == size:
        rank_zero_warn(
            "The checkpoint was saved by one process alone, because a process had failed. The run goes on, but is not the "
            "unbroken one: random numbers are others, and values logged or counted by metrics in the epoch so far are left "
            "out of its end."
        )
        return states[0] if rank == 0 else _without_own(states[0])
    rank_zero_warn(
        f"The checkpoint was saved by {len(states)} processes, received {size}. The run goes on, but is not the unbroken "
        "one: the samples of the epoch that are left are spread over the processes that are there, random numbers are "
        "others, and values logged or counted by metrics in the epoch so far are left out of its end."
    )
    own = _without_own(states[rank] if rank < len(states) else states[0])
    if rank < len(states):
        own["rng"] = states[rank]["rng"]
    if "window" in own:
        own["window"] = _mean_window([other.get("window", {}) for other in states], size)
    return own


def _without_own(state: State) -> State:
    """Return a state without what belongs to one rank alone: its sums, and its random numbers, which no two may draw."""
    return {key: value for key, value in state.items() if key not in ("rng", "validation_rng", "log_store", "metrics")}


def _mean_window(windows: Sequence[State], size: int) -> State:
    """Return the unfinished accumulation window for ranks of another number: their mean stays what it was."""
    if not all(window.get("gradients") for window in windows):
        return dict(windows[0])
    mean = dict(windows[0])
    mean["gradients"] = [_mean(gradients) for gradients in zip(*(window["gradients"] for window in windows))]
    if "weight" in mean:
        mean["weight"] = sum(window["weight"] for window in windows) / len(windows)
        mean["lacks"] = mean.get("lacks", 0) * size / len(windows)
    return mean


def _mean(gradients: Sequence[Tensor | None]) -> Tensor | None:
    found = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(found).sum(0) / len(gradients) if found else None
