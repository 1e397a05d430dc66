"""What must be the same on all ranks is compared: settings before the first batch, weights after the first step, and more."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from levin.log_store import SlotKey
from levin.protocols import Run
from levin.strategies.parallel import ParallelStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.user_frames import name_ranks, ranks_by_value, show_by_rank
from levin.utilities.warnings import PossibleUserWarning

_SETTINGS = (
    "fast_dev_run", "overfit_batches", "limit_train_batches", "limit_val_batches", "limit_test_batches",
    "limit_predict_batches", "num_sanity_val_steps", "val_check_interval", "val_check_seconds",
    "check_val_every_n_epoch", "log_every_n_steps", "reload_dataloaders_every_n_epochs", "accumulate_grad_batches",
    "splits_batches", "gradient_clip_val", "gradient_clip_algorithm", "enable_checkpointing", "use_distributed_sampler",
)  # fmt: skip
_LIMITS = ("max_epochs", "min_epochs", "max_steps", "min_steps")
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
    if run.fn == "fit":
        own["callbacks that save"] = _in_words(callback.state_key for callback in run.checkpoint_callbacks)
        own["callbacks that stop or change training"] = _in_words(
            callback.state_key
            for callback in run.callbacks
            if getattr(type(callback), "is_on_all_ranks", False) is True
        )
        own["validation in fit"] = str(run.enable_validation)
    _check_same(strategy, own, "settings")


def check_same_optimizers(run: Run) -> None:
    """Compare the optimizers of all ranks, where all train copies of the same parameters.

    Raises:
        ValueError: They are of other kinds, on all ranks: one may compute the gradients more often than another.
    """
    strategy = run.strategy
    if run.agreement is None or not strategy.copied_parameters(run.module):
        return
    assert isinstance(strategy, ParallelStrategy), "there is an agreement on several ranks alone"
    own = {"classes": _in_words(type(optimizer).__name__ for optimizer in run.optimizers)}
    _check_same(strategy, own, "optimizers")


def _check_same(strategy: ParallelStrategy, own: dict[str, str], what: str) -> None:
    different = differences(strategy.control.exchange_objects(own, what))
    if different:
        raise MisconfigurationException(
            f"All ranks must have the same {what}, received {'; '.join(different)}. Decide them without asking for the rank."
        )


def _in_words(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


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
        ranks = ranks_by_value([values[name] for values in settings])
        if len(ranks) > 1:
            found.append(f"{name}={show_by_rank(ranks)}")
    return found


def check_logged_name(strategy: Strategy, hook: str, name: str) -> None:
    """Compare what the ranks are about to log in a step with ``sync_dist=True``, before it is mixed with anything.

    Raises:
        RuntimeError: They log different names, or some do something else, on all ranks.
    """
    if not isinstance(strategy, ParallelStrategy):
        return
    found = ranks_by_value(strategy.data_control.exchange_objects(f"{name!r} in {hook}", "values of steps"))
    if len(found) > 1:
        raise RuntimeError(
            "self.log(..., sync_dist=True) reduces the values of steps in the order of its calls, which is not the same on all "
            f"ranks, received {show_by_rank(found)}. Log the same names in the same order on all ranks, or with on_step=False."
        )


def check_logged_names(run: Run) -> None:
    """Compare what all ranks have logged for the epoch with ``sync_dist=True``, before it is reduced in the order of calls.

    Values of steps are reduced at the call: what was mixed there is told here, once for many steps.

    Raises:
        RuntimeError: A rank has logged what another one has not, or reduces it otherwise, on all ranks.
    """
    if run.agreement is None:
        return
    strategy = run.strategy
    assert isinstance(strategy, ParallelStrategy), "there is an agreement on several ranks alone"
    store = run.store
    everywhere = strategy.control.exchange_objects(
        (store.collective_keys(), store.order.number, store.names_in_steps()), "names of logged values"
    )
    ways: list[dict[SlotKey, str]] = [keys for keys, _, _ in everywhere]
    if len({number for _, number, _ in everywhere}) > 1:
        names = ranks_by_value([", ".join(map(repr, dict.fromkeys(each))) or "nothing" for _, _, each in everywhere])
        raise RuntimeError(
            "self.log(..., sync_dist=True) reduces the values of steps in the order of its calls, which was not the same on "
            f"all ranks, so that values of several names were mixed. Logged were {show_by_rank(names)}. Log the same names in the "
            "same order on all ranks, or with on_step=False."
        )
    for key in sorted({key for keys in ways for key in keys}, key=str):
        found = ranks_by_value([keys.get(key, "") for keys in ways])
        if len(found) == 1:
            continue
        hook, name, _ = key
        what = f"self.log({name!r}, ...), which is reduced over all ranks, was called in {hook} on"
        if lacking := found.pop("", None):
            having = sorted(rank for ranks in found.values() for rank in ranks)
            raise RuntimeError(
                f"{what} {name_ranks(having)} and not on {name_ranks(lacking)}. Call it on all ranks in every epoch, or with "
                "sync_dist=False."
            )
        raise RuntimeError(f"{what} all ranks, with {show_by_rank(found)}. Log the same on all ranks.")
    store.put_first(ways[0])


class AlikeCheck:
    """Compares what must be alike while ranks train, at exchanges of numbers that happen anyway.

    The weights once, after the first step; learning rates and the order of logged values each time.

    Args:
        run: Whose module it is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._has_shown_weights: bool = False
        self._has_copies: bool = False
        self._has_warned: bool = False

    def numbers(self) -> list[float]:
        """Return what this rank shows the others."""
        return [self._weights(), self._groups(), self._run.store.order.number]

    def _weights(self) -> float:
        run = self._run
        if self._has_shown_weights or run.fn != "fit" or run.global_step == 0:
            return 0.0
        self._has_shown_weights = True
        copies = run.strategy.copied_parameters(run.module)
        self._has_copies = bool(copies)
        return fingerprint(copies)

    def _groups(self) -> int:
        # A rate that is a tensor would have to be waited for; parameters that are spread may be spread unevenly.
        groups = [
            (
                len(group["params"]) if self._has_copies else 0,
                None if isinstance(group.get("lr"), Tensor) else group.get("lr"),
            )
            for optimizer in self._run.optimizers
            for group in optimizer.param_groups
        ]
        return zlib.crc32(repr(groups).encode())

    def compare(self, weights: Sequence[float], groups: Sequence[float], orders: Sequence[float]) -> None:
        """Warn when weights or optimizers differ.

        Args:
            weights: Of each rank, as the others.
            groups: What the groups of its optimizers come to.
            orders: What the order of its logged values comes to.

        Raises:
            RuntimeError: The order of logged values differs, on all ranks.
        """
        if len(set(weights)) > 1:
            rank_zero_warn(
                f"After the first step the weights differ: {_each(weights)}. The gradients were not averaged over the ranks, "
                "or something steps or draws differently on each. If this is intended, leave it so; otherwise look for no_sync, "
                "for backward passes outside of manual_backward, and for weights that are made anew during training.",
                category=PossibleUserWarning,
            )
        if len(set(groups)) > 1 and not self._has_warned:
            self._has_warned = True
            rank_zero_warn(
                f"The optimizers differ in learning rates or parameters: {_each(groups)}. With these the weights drift apart. "
                "Decide by what is the same on all ranks, as values that were logged with sync_dist=True.",
                category=PossibleUserWarning,
            )
        if len(set(orders)) > 1:
            check_logged_names(self._run)


def _each(numbers: Sequence[float]) -> str:
    return ", ".join(f"those of {name_ranks(ranks)}" for ranks in ranks_by_value(numbers).values())


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
