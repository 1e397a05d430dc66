"""Asking for the loaders of a stage when they are due, measuring them, and making the feed that a loop draws from."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Optional

from levin.counters import EvaluationLoop
from levin.data.feed import Feed
from levin.data.loaders import set_epoch
from levin.loops.run import Run
from levin.loops.stage_loaders import StageLoaders
from levin.precision.precision import Precision
from levin.ranks.uneven import agreed_batches, is_any_batch, is_shared, shared_feed
from levin.settings import num_from_limit
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import RunningStage
from levin.utilities.timing import action_name
from levin.utilities.warnings import PossibleUserWarning

NEXT = {
    "train": "[_TrainingEpochLoop].train_dataloader_next",
    "val": "[_EvaluationLoop].val_next",
    "test": "[_EvaluationLoop].test_next",
    "predict": "[_PredictionLoop].predict_next",
}
"""Stage -> name of the wait for the next batch in reports of profilers; these are the names that it has always had."""
STAGE_OF = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
"""Method of the Trainer -> stage of the loaders that it runs over."""


def loaders_of(run: Run, fn: str) -> StageLoaders:
    """Return the loaders that ``validate``, ``test`` or ``predict`` runs over."""
    loaders: StageLoaders = getattr(run.loaders, STAGE_OF[fn])
    return loaders


def limit_of(run: Run, fn: str) -> int | float:
    """Return the limit of batches of ``validate``, ``test`` or ``predict``."""
    limit: int | float = getattr(run.settings, f"limit_{STAGE_OF[fn]}_batches")
    return limit


def make_feed(run: Run, loaders: StageLoaders) -> Feed:
    """Return the feed of a stage."""
    precision = run.strategy.precision
    convert = precision.convert_input if type(precision).convert_input is not Precision.convert_input else None
    step = {"train": "training_step", "val": "validation_step"}.get(loaders.stage, f"{loaders.stage}_step")
    function = getattr(run.module, step)
    on_demand = _takes_iterator(getattr(function, "__func__", function))
    if on_demand:
        run.hooks.show_batches({"val": "validation"}.get(loaders.stage, loaders.stage))
    arguments = (
        loaders.sources(), loaders.limits, loaders.lengths,
        run.strategy.root_device, convert, run.transfer, on_demand,
        run.timed(NEXT[loaders.stage], next) if run.is_profiled else None,
    )  # fmt: skip
    return shared_feed(run, loaders.stage, *arguments) if is_shared(run.strategy) else Feed(*arguments)


@functools.lru_cache(maxsize=16)
def _takes_iterator(function: Callable[..., object]) -> bool:
    return "dataloader_iter" in inspect.signature(function).parameters


def load(run: Run, loaders: StageLoaders, limit: int | float) -> None:
    """Ask for the loaders of a stage and measure them."""
    sampler_kwargs = run.strategy.distributed_sampler_kwargs if run.settings.use_distributed_sampler else None
    is_overfit = bool(run.settings.overfit_batches) and loaders.stage in ("train", "val") and run.fn == "fit"
    owner = loaders.owner
    with nullcontext() if owner is None else run.profiler.profile(action_name(owner, loaders.hook)):
        loaders.load(sampler_kwargs, run.strategy.process_dataloader, is_overfit)
    if run.settings.reload_dataloaders_every_n_epochs:
        _warn_of_pinned_workers(loaders)
    loaders.measure(limit, f"limit_{loaders.stage}_batches", num_from_limit)
    loaders.loaded_epoch = run.current_epoch
    for loop in run.loops.of_stage(loaders.stage):
        loop._combined_loader = loaders.combined
        if isinstance(loop, EvaluationLoop):
            loop.max_batches = loaders.batches_per_loader


def show_call(run: Run) -> None:
    """Let the loops show the Trainer and the loaders of a call, and load these when somebody asks before they are due."""
    run.loops.fit.epoch_loop.trainer = run.trainer
    for stage in ("train", "val", "test", "predict"):
        loaders: StageLoaders = getattr(run.loaders, stage)
        for loop in run.loops.of_stage(stage):
            loop.trainer, loop._data_source = run.trainer, loaders
            loop._load = functools.partial(_load_early, run, loaders)


def _load_early(run: Run, loaders: StageLoaders) -> None:
    if not loaders.is_defined():
        return
    if loaders.stage == "train":
        load_training(run)
    elif loaders.stage == "val":
        load_validation(run)
    elif loaders.combined is None:
        load(run, loaders, limit_of(run, loaders.stage))


def has_batches(run: Run, loaders: StageLoaders) -> bool:
    """Whether any loader of a stage has a batch on any rank; where none has, its hooks are not called either."""
    return is_any_batch(run.strategy, loaders.batches_per_loader, loaders.hook)


def measure_again(loaders: StageLoaders, limit: int | float, feed: Feed) -> bool:
    """Find the lengths of a new epoch, which may be others. Returns whether they are."""
    changed = loaders.measure_again(limit, f"limit_{loaders.stage}_batches", num_from_limit)
    if changed:
        feed.limits, feed.lengths = loaders.limits, loaders.lengths
    return changed


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


def _due(run: Run, loaders: StageLoaders) -> bool:
    every = run.settings.reload_dataloaders_every_n_epochs
    return loaders.combined is None or bool(every and run.current_epoch - loaders.loaded_epoch >= every)


def load_training(run: Run) -> bool:
    """Load the training loaders when they are not there, or due again. Returns whether it did."""
    loaders = run.loaders.train
    if not _due(run, loaders):
        return False
    load(run, loaders, run.settings.limit_train_batches)
    rule = getattr(run.strategy, "uneven", "longest")
    run.loops.fit.max_batches = agreed_batches(run.strategy, loaders.num_batches[0], rule)
    run.loops.fit.val_check_batch = _val_check_batch(run)
    if run.loggers and run.settings.log_every_n_steps and loaders.num_batches[0] < run.settings.log_every_n_steps:
        if not run.settings.fast_dev_run:
            rank_zero_warn(
                f"The number of training batches ({loaders.num_batches[0]}) is smaller than the logging interval "
                f"Trainer(log_every_n_steps={run.settings.log_every_n_steps}). "
                "Set a lower value for log_every_n_steps if you want to see logs for the training epoch.",
                category=PossibleUserWarning,
            )
    return True


def load_validation(run: Run) -> bool:
    """Load the validation loaders when they are not there, or due again. Returns whether it did."""
    loaders = run.loaders.val
    if not _due(run, loaders):
        return False
    load(run, loaders, run.settings.limit_val_batches)
    run.loops.fit.num_sanity_val_batches = [
        min(run.settings.num_sanity_val_steps, count) for count in loaders.batches_per_loader
    ]
    return True


def load_validation_if_soon(run: Run) -> None:
    """Load the validation loaders before the training epoch in which they are due, if nothing has loaded them."""
    is_stopped = run.told.should_stop and not run.loops.fit.min_epochs and not run.loops.fit.min_steps
    trains = not is_stopped and 0 not in (run.loops.fit.max_epochs, run.loops.fit.max_steps, run.loops.fit.max_batches)
    if run.validates_in_epoch and trains and run.enable_validation and run.loaders.val.combined is None:
        run.state.stage = RunningStage.VALIDATING
        load_validation(run)
        run.state.stage = RunningStage.TRAINING


def _val_check_batch(run: Run) -> Optional[int | float]:
    """Return every how many batches validation is due; inf for once at the end, None when the clock decides."""
    interval, count = run.settings.val_check_interval, run.loops.fit.max_batches
    if run.settings.val_check_seconds is not None:
        return None
    if isinstance(interval, int) and not isinstance(interval, bool):
        if interval > count > 0 and run.settings.check_val_every_n_epoch is not None and run.enable_validation:
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


def load_if_dropped(run: Run, feed: Feed) -> None:
    """Load the data of ``validate``, ``test`` or ``predict`` again where a hook has dropped the loaders."""
    loaders = loaders_of(run, run.fn)
    if loaders.combined is None:
        load(run, loaders, limit_of(run, run.fn))
        _refill(run, loaders, feed)


def _refill(run: Run, loaders: StageLoaders, feed: Feed) -> None:
    fresh = make_feed(run, loaders)
    feed.sources, feed.limits, feed.lengths = fresh.sources, fresh.limits, fresh.lengths


def prepare_epoch(run: Run, feed: Feed) -> None:
    """Load the training data again when that is due, and tell samplers the epoch."""
    loaders = run.loaders.train
    if load_training(run):
        _refill(run, loaders, feed)
        run.resume.follow_reloaded()
    elif not run.strategy.is_distributed and measure_again(loaders, run.settings.limit_train_batches, feed):
        run.loops.fit.max_batches = loaders.num_batches[0]
        if isinstance(run.settings.val_check_interval, float):
            run.loops.fit.val_check_batch = _val_check_batch(run)
    tell_epoch(run, loaders)


def tell_epoch(run: Run, loaders: StageLoaders) -> None:
    """Tell the samplers of a stage the epoch."""
    assert loaders.combined is not None
    for loader in loaders.combined.flattened:
        set_epoch(loader, run.current_epoch)


def batch_indices(feed: Feed, dataloader_idx: int, batch_idx: int) -> Optional[list[int]]:
    """Return the dataset indices of a batch that was drawn to predict on, None when they are unknown."""
    sampler: object = getattr(feed.sources[dataloader_idx], "batch_sampler", None)
    seen: Optional[list[list[int]]] = getattr(sampler, "seen_batch_indices", None)
    # A loader with workers draws ahead, so the batch is found by its own index.
    return seen[batch_idx] if seen and batch_idx < len(seen) else None
