"""What must be the same on all ranks, compared once: the settings before the first batch, the weights after the first step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from levin.protocols import Run
from levin.strategies.parallel import ParallelStrategy
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.warnings import PossibleUserWarning

_SETTINGS = (
    "fast_dev_run", "overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "limit_predict_batches", "num_sanity_val_steps", "val_check_interval", "val_check_seconds",
    "check_val_every_n_epoch", "log_every_n_steps", "reload_dataloaders_every_n_epochs", "accumulate_grad_batches",
    "gradient_clip_val", "gradient_clip_algorithm", "enable_checkpointing", "use_distributed_sampler",
)  # fmt: skip
_LIMITS = ("max_epochs", "min_epochs", "max_steps", "min_steps")
Value = TypeVar("Value", str, float)
_ITEM_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_settings(run: Run) -> None:
    """Compare the settings of all ranks, which are connected already.

    Raises:
        ValueError: Some differ, on all ranks: with these, ranks would wait for each other.
    """
    strategy = run.strategy
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size == 1:
        return
    own = {name: str(getattr(run.settings, name)) for name in _SETTINGS}
    own |= {name: str(getattr(run.loops.fit, name)) for name in _LIMITS}
    own |= {"method": run.fn, "precision": strategy.precision.precision}
    different = differences(strategy.control.exchange_objects(own))
    if different:
        raise MisconfigurationException(
            f"All ranks must have the same settings, received {'; '.join(different)}. Decide them without asking for the rank."
        )


def differences(settings: Sequence[dict[str, str]]) -> list[str]:
    """Return what differs between the ranks, in words.

    Args:
        settings: Name -> value of each rank; all have the same names.

    Example:
        >>> differences([{"max_epochs": "2"}, {"max_epochs": "3"}, {"max_epochs": "2"}])
        ['max_epochs=2 on ranks 0, 2 and 3 on rank 1']
    """
    found = []
    for name in settings[0]:
        ranks = _ranks_by_value([values[name] for values in settings])
        if len(ranks) > 1:
            found.append(f"{name}={' and '.join(f'{value} on {_named(having)}' for value, having in ranks.items())}")
    return found


def _ranks_by_value(values: Sequence[Value]) -> dict[Value, list[int]]:
    ranks: dict[Value, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ranks


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def check_logged_names(run: Run) -> None:
    """Compare what all ranks have logged for the epoch with ``sync_dist=True``, before it is reduced in the order of calls.

    Raises:
        RuntimeError: A rank has logged what another one has not, on all ranks.
    """
    if run.agreement is None:
        return
    own = run.store.collective_keys()
    strategy = run.strategy
    assert isinstance(strategy, ParallelStrategy), "there is an agreement on several ranks alone"
    found = strategy.control.exchange_objects(own)
    if all(keys == found[0] for keys in found):
        return
    for key in sorted({key for keys in found for key in keys}, key=str):
        having = [rank for rank, keys in enumerate(found) if key in keys]
        lacking = [rank for rank, keys in enumerate(found) if key not in keys]
        if lacking:
            raise RuntimeError(
                f"self.log({key[1]!r}, ...), which is reduced over all ranks, was called in {key[0]} on {_named(having)} and not "
                f"on {_named(lacking)}. Call it on all ranks in every epoch, or with sync_dist=False."
            )
    run.store.put_first(found[0])


class CopiesCheck:
    """Compares the weights of all ranks once, at the first exchange of numbers after the first step.

    Args:
        run: Whose module it is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._is_done: bool = False

    def number(self) -> float:
        """Return what this rank shows the others: 0 before the first step, then once what its weights come to."""
        run = self._run
        if self._is_done or run.fn != "fit" or run.global_step == 0:
            return 0.0
        self._is_done = True
        return fingerprint(run.strategy.copied_parameters(run.module))

    def compare(self, numbers: Sequence[float]) -> None:
        """Warn when the numbers of the ranks differ."""
        if len(set(numbers)) == 1:
            return
        ranks = _ranks_by_value(numbers).values()
        rank_zero_warn(
            f"After the first step the weights differ: those of {', those of '.join(map(_named, ranks))}. The "
            "gradients were not averaged over the ranks, or something steps or draws differently on each. If this is "
            "intended, leave it so; otherwise look for no_sync, for backward passes outside of manual_backward, and for "
            "weights that are made anew during training.",
            category=PossibleUserWarning,
        )


def fingerprint(tensors: Iterable[Tensor]) -> float:
    """Return a number that is the same for the same tensors and, but for a rare chance, for no others.

    Args:
        tensors: Of any types; their bits are summed as whole numbers, so that the order of the sum makes no difference.

    Example:
        >>> fingerprint([torch.tensor([1.0])]) == fingerprint([torch.tensor([1.0])])
        True
        >>> fingerprint([torch.tensor([1.0])]) == fingerprint([torch.tensor([1.0000001])])
        False
    """
    total = 0
    for place, tensor in enumerate(tensors, 1):
        plain = tensor.detach().contiguous()
        bits = (torch.view_as_real(plain) if plain.is_complex() else plain).view(_ITEM_TYPES[plain.real.element_size()])
        total += place * int(bits.sum(dtype=torch.int64))
    # As many digits as a float holds.
    return float(total % 2**52)
