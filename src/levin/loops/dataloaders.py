"""Asking for the loaders of a stage when they are due, measuring them, and making the feed that a loop draws from."""

from __future__ import annotations

import inspect
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Optional

from levin.data.feed import Feed
from levin.data.loaders import set_epoch
from levin.loops.profiled import NEXT, kind_of
from levin.loops.stage_loaders import StageLoaders
from levin.precision.precision import Precision
from levin.ranks.uneven import agreed_batches, is_shared, shared_feed
from levin.settings import num_from_limit
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.timing import action_name
from levin.utilities.warnings import PossibleUserWarning

if TYPE_CHECKING:
    from levin.loops.run import Run
    from levin.trainer import Trainer


def loaders_of(trainer: Trainer, fn: str) -> StageLoaders:
    """Return the loaders that ``validate``, ``test`` or ``predict`` runs over."""
    return {
        "validate": trainer._val_loaders, "test": trainer._test_loaders, "predict": trainer._predict_loaders,
    }[fn]  # fmt: skip


def limit_of(trainer: Trainer, fn: str) -> int | float:
    """Return the limit of batches of ``validate``, ``test`` or ``predict``."""
    return {
        "validate": trainer.limit_val_batches, "test": trainer.limit_test_batches,
        "predict": trainer.limit_predict_batches,
    }[fn]  # fmt: skip


def make_feed(run: Run, loaders: StageLoaders, limits: Optional[list[int | float]] = None) -> Feed:
    """Return the feed of a stage."""
    precision = run.strategy.precision
    convert = precision.convert_input if type(precision).convert_input is not Precision.convert_input else None
    step = {"train": "training_step", "val": "validation_step"}.get(loaders.stage, f"{loaders.stage}_step")
    on_demand = "dataloader_iter" in inspect.signature(getattr(run.module, step)).parameters
    arguments = (
        loaders.sources(), loaders.limits if limits is None else limits, loaders.lengths,
        run.strategy.root_device, convert, run.transfer, on_demand,
        run.timed(NEXT[loaders.stage], next) if run.is_profiled else None,
    )  # fmt: skip
    return shared_feed(run, loaders.stage, *arguments) if is_shared(run.strategy) else Feed(*arguments)


def load(trainer: Trainer, loaders: StageLoaders, limit: int | float) -> None:
    """Ask for the loaders of a stage and measure them."""
    sampler_kwargs = trainer.distributed_sampler_kwargs if trainer._use_distributed_sampler else None
    is_overfit = bool(trainer.overfit_batches) and loaders.stage in ("train", "val") and str(trainer.state.fn) == "fit"
    owner = loaders.owner
    with nullcontext() if owner is None else trainer.profiler.profile(action_name(kind_of(owner), owner, loaders.hook)):
        loaders.load(sampler_kwargs, is_overfit)
    name = {"train": "limit_train_batches", "val": "limit_val_batches"}.get(
        loaders.stage, f"limit_{loaders.stage}_batches"
    )
    if trainer.reload_dataloaders_every_n_epochs:
        _warn_of_pinned_workers(loaders)
    loaders.measure(limit, name, num_from_limit)
    loaders.loaded_epoch = trainer.current_epoch


def _warn_of_pinned_workers(loaders: StageLoaders) -> None:
    assert loaders.combined is not None
    if any(
        getattr(loader, "pin_memory", False) and getattr(loader, "persistent_workers", False)
        for loader in loaders.combined.flattened
    ):
        rank_zero_warn(
            "`DataLoader(pin_memory=True, persistent_workers=True)` together with "
            "`Trainer(reload_dataloaders_every_n_epochs > 0)` can leave threads of PyTorch behind. Set pin_memory=False.",
            category=PossibleUserWarning,
        )


def _due(trainer: Trainer, loaders: StageLoaders) -> bool:
    every = trainer.reload_dataloaders_every_n_epochs
    return loaders.combined is None or bool(every and trainer.current_epoch - loaders.loaded_epoch >= every)


def load_training(trainer: Trainer) -> bool:
    """Load the training loaders when they are not there, or due again. Returns whether it did."""
    loaders = trainer._train_loaders
    if not _due(trainer, loaders):
        return False
    load(trainer, loaders, trainer.limit_train_batches)
    rule = getattr(trainer.strategy, "uneven", "longest")
    trainer._num_training_batches = agreed_batches(trainer.strategy, loaders.num_batches[0], rule)
    trainer.val_check_batch = _val_check_batch(trainer)
    if trainer.loggers and trainer.log_every_n_steps and loaders.num_batches[0] < trainer.log_every_n_steps:
        if not trainer.fast_dev_run:
            rank_zero_warn(
                f"The number of training batches ({loaders.num_batches[0]}) is smaller than the logging interval "
                f"Trainer(log_every_n_steps={trainer.log_every_n_steps}). "
                "Set a lower value for log_every_n_steps if you want to see logs for the training epoch.",
                category=PossibleUserWarning,
            )
    return True


def load_validation(trainer: Trainer) -> bool:
    """Load the validation loaders when they are not there, or due again. Returns whether it did."""
    loaders = trainer._val_loaders
    if not _due(trainer, loaders):
        return False
    load(trainer, loaders, trainer.limit_val_batches)
    trainer._num_sanity_val_batches = [min(trainer.num_sanity_val_steps, count) for count in loaders.num_batches]
    return True


def load_validation_if_soon(trainer: Trainer) -> None:
    """Load the validation loaders before the training epoch in which they are due, if nothing has loaded them."""
    every = trainer.check_val_every_n_epoch
    is_due = every is None or (trainer.current_epoch + 1) % every == 0
    is_stopped = trainer.should_stop and not trainer.min_epochs and not trainer.min_steps
    trains = not is_stopped and 0 not in (trainer.max_epochs, trainer.max_steps, trainer.num_training_batches)
    if is_due and trains and trainer.enable_validation and trainer._val_loaders.combined is None:
        trainer.validating = True
        load_validation(trainer)
        trainer.training = True


def _val_check_batch(trainer: Trainer) -> Optional[int | float]:
    """Return every how many batches validation is due; inf for once at the end, None when the clock decides."""
    interval, count = trainer.val_check_interval, trainer._num_training_batches
    if trainer._val_check_seconds is not None:
        return None
    if isinstance(interval, int) and not isinstance(interval, bool):
        if interval > count and trainer.check_val_every_n_epoch is not None and trainer.enable_validation:
            raise ValueError(
                f"val_check_interval must be <= the number of training batches ({count}), received {interval}. "
                "Set Trainer(check_val_every_n_epoch=None) to count batches across epochs."
            )
        return interval
    if count == math.inf:
        if interval == 1.0:
            return math.inf
        raise MisconfigurationException(
            f"val_check_interval must be 1.0 or an int when the loader's length is unknown, received {interval}."
        )
    return max(1, int(count * interval))


def prepare_epoch(run: Run, feed: Feed) -> None:
    """Load the training data again when that is due, and tell samplers the epoch."""
    trainer = run.trainer
    loaders = trainer._train_loaders
    if load_training(trainer):
        fresh = make_feed(run, loaders)
        feed.sources, feed.limits, feed.lengths = fresh.sources, fresh.limits, fresh.lengths
        trainer._resume.follow_reloaded()
    assert loaders.combined is not None
    for loader in loaders.combined.flattened:
        set_epoch(loader, trainer.current_epoch)


def batch_indices(feed: Feed, dataloader_idx: int, batch_idx: int) -> Optional[list[int]]:
    """Return the dataset indices of a batch that was drawn to predict on, None when they are unknown."""
    sampler: Any = getattr(feed.sources[dataloader_idx], "batch_sampler", None)
    seen: Optional[list[list[int]]] = getattr(sampler, "seen_batch_indices", None)
    # A loader with workers draws ahead, so the batch is found by its own index.
    return seen[batch_idx] if seen and batch_idx < len(seen) else None
