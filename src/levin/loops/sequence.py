"""The sequence of a run: prepare, set up, restore, loop, tear down."""

from __future__ import annotations

import functools
import inspect
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.checkpoint import state as tree
from levin.data.feed import Feed
from levin.data.loaders import set_epoch
from levin.data.source import StageLoaders
from levin.hooks import DataHooks, HookTable, has_hook, transfer_hooks
from levin.loops.agreement import agreement_for
from levin.loops.evaluate import compose_evaluation_step, evaluate
from levin.loops.fit import fit
from levin.loops.logging import send_hyperparameters
from levin.loops.predict import predict
from levin.loops.profiled import NEXT, ProfiledRun, kind_of, time_step, timed_transfer, timer, untimed
from levin.loops.run import Run, new_store
from levin.loops.signals import signal_handlers
from levin.loops.step import compose_step
from levin.loops.uneven import agreed_batches, is_shared, shared_feed
from levin.module import LightningModule
from levin.optimizer import LightningOptimizer, resolve_optimizers
from levin.precision.precision import Precision
from levin.settings import num_from_limit
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_warn
from levin.utilities.seed import isolate_rng
from levin.utilities.states import RunningStage
from levin.utilities.timing import action_name, call_timed

if TYPE_CHECKING:
    from levin.trainer import Trainer


def run_sequence(trainer: Trainer, ckpt_path: Any, weights_only: Optional[bool]) -> Any:
    """Run what ``trainer.state.fn`` says, from set-up to teardown.

    Args:
        trainer: With module, loaders and state attached.
        ckpt_path: Path or URL to restore from, or None.
        weights_only: Whether reading it may run no code; None for the default.

    Returns:
        What the method returns to the user.
    """
    module, datamodule, strategy = trainer.lightning_module, trainer.datamodule, trainer.strategy
    fn = str(trainer.state.fn)
    verify(trainer)
    trainer._is_setting_up = True
    strategy.connect(module)
    strategy.setup_environment()
    local_rank = trainer.local_rank if trainer.world_size > 1 else None
    trainer.profiler.setup(stage=fn, local_rank=local_rank, log_dir=trainer._profiler_dir())
    prepare_data(trainer)
    for logger in trainer.loggers:
        getattr(logger, "experiment", None)
    if datamodule is not None:
        call_timed(trainer, "LightningDataModule", datamodule, "setup", stage=fn)
    for callback in trainer.callbacks:
        call_timed(trainer, "Callback", callback, "setup", trainer, module, stage=fn)
    call_timed(trainer, "LightningModule", module, "setup", stage=fn)
    trainer._is_setting_up = False
    configure_model(trainer)
    checkpoint: Optional[dict[str, Any]] = None
    if ckpt_path is not None:
        rank_zero_info(f"Restoring states from the checkpoint path at {ckpt_path}")
        checkpoint = strategy.load_checkpoint(ckpt_path, weights_only=weights_only)
        if not strategy.restore_checkpoint_after_setup:
            tree.restore_module(trainer, checkpoint)
    strategy.setup_module(module, for_training=fn == "fit")
    trainer._moved_metrics_to(strategy.root_device)
    trainer.profiler.attach(module)
    run = compose_run(trainer, fn)
    trainer._run = run
    trainer._reset_metrics()
    if fn == "fit":
        run.call("on_fit_start")
    send_hyperparameters(trainer)
    if checkpoint is not None:
        if strategy.restore_checkpoint_after_setup:
            tree.restore_module(trainer, checkpoint)
        tree.restore_precision_and_loops(trainer, checkpoint)
        if fn == "fit":
            tree.restore_optimizers(trainer, checkpoint)
        rank_zero_info(f"Restored all states from the checkpoint at {ckpt_path}")
    with signal_handlers(trainer):
        result = run_stage(trainer, run, fn, checkpoint)
    run.activate(new_store(trainer, module, training=False))
    _detach_log_store(module)
    strategy.teardown()
    trainer._moved_metrics_to(torch.device("cpu"))
    if fn == "fit":
        run.call("on_fit_end")
    if datamodule is not None:
        call_timed(trainer, "LightningDataModule", datamodule, "teardown", stage=fn)
    for callback in trainer.callbacks:
        call_timed(trainer, "Callback", callback, "teardown", trainer, module, stage=fn)
    call_timed(trainer, "LightningModule", module, "teardown", stage=fn)
    for logger in trainer.loggers:
        logger.finalize("success")
    trainer.profiler.describe()
    trainer.profiler.teardown(fn)
    return result


def configure_model(trainer: Trainer) -> None:
    """Let the module make its layers, on the device and in the precision where they will be."""
    module = trainer.lightning_module
    old = getattr(module, "configure_sharded_model", None)
    is_new = has_hook(module, "configure_model")
    if old is not None:
        name = f"{type(module).__name__}.configure_sharded_model"
        if is_new:
            raise RuntimeError(f"`{name}` and `configure_model` are both defined. Keep `configure_model` alone.")
        rank_zero_deprecation(f"`{name}` is deprecated. Rename it to `configure_model`.")
    if is_new or old is not None:
        with trainer.strategy.module_init_context():
            call_timed(trainer, "LightningModule", module, "configure_model" if is_new else "configure_sharded_model")


def run_stage(trainer: Trainer, run: Run, fn: str, checkpoint: Optional[dict[str, Any]]) -> Any:
    """Run the loop of ``fn`` and return what the user gets."""
    if fn == "fit":
        with torch.autograd.set_detect_anomaly(trainer._detect_anomaly) if trainer._detect_anomaly else nullcontext():
            run_fit(trainer, run, checkpoint)
        return None
    loaders = trainer._loaders_of(fn)
    limit = trainer._limit_of(fn)
    if limit == 0:
        return None if fn == "predict" else []
    load(trainer, loaders, limit)
    feed = make_feed(run, loaders)
    name = "validation" if fn == "validate" else fn
    step = compose_evaluation_step(run, name, len(feed.sources))
    no_gradients = torch.inference_mode() if trainer._uses_inference_mode else torch.no_grad()
    if agreed_batches(trainer.strategy, sum(loaders.num_batches)) == 0:
        rank_zero_warn(f"The loaders of `{loaders.hook}` hold no batches: {fn} is skipped.")
        return None if fn == "predict" else []
    for loader in feed.sources:
        set_epoch(loader, trainer.current_epoch)
    with no_gradients:
        if fn == "predict":
            indices = functools.partial(trainer._batch_indices, feed)
            loop = trainer.predict_loop
            return predict(run, feed, step, loop, trainer._returns_predictions, indices)
        loop = trainer.validate_loop if fn == "validate" else trainer.test_loop
        return evaluate(run, name, feed, step, loop)


def run_fit(trainer: Trainer, run: Run, checkpoint: Optional[dict[str, Any]]) -> None:
    """Sanity check, then training."""
    module = run.module
    module.zero_grad()
    loop = trainer.fit_loop
    loop.restarted_mid_epoch = False
    exact = None
    if loop.restarting:
        trainer._exact.settle_counters(trainer)
        exact = tree.own_state(checkpoint) if checkpoint is not None else None
    sanity_check(trainer, run, is_resumed=loop.restarted_mid_epoch)
    trainer.training = True
    module.train() if not any(child.training for child in module.modules()) and not loop.restarting else None
    torch.set_grad_enabled(True)
    loop.restarting = False
    if trainer.limit_train_batches == 0 or trainer.fit_loop.max_epochs == 0:
        trainer._num_training_batches = 0 if trainer.limit_train_batches == 0 else trainer._num_training_batches
        if trainer.limit_train_batches == 0:
            return
    load_training(trainer)
    step = compose_step(run)
    if run.is_profiled:
        time_step(run, step)
    trainer._step = step
    run.store.start_batch(None)
    feed = make_feed(run, trainer._train_loaders)
    run.uneven = step.uneven = feed.uneven  # type: ignore[attr-defined]  # of both kinds of steps
    trainer._exact.follow(run, feed, step, exact)
    fit(run, feed, step)


def sanity_check(trainer: Trainer, run: Run, is_resumed: bool) -> None:
    """Run a few validation batches before training, with nothing left of it afterwards."""
    steps = trainer.num_sanity_val_steps
    if not trainer.enable_validation or not steps or is_resumed:
        return
    trainer.sanity_checking = True
    with isolate_rng():
        run.call("on_sanity_check_start")
        load_validation(trainer)
        loaders = trainer._val_loaders
        limits = [min(steps, count) for count in loaders.num_batches]
        trainer._num_sanity_val_batches = limits
        if agreed_batches(trainer.strategy, sum(limits)) > 0:
            feed = make_feed(run, loaders, limits)
            trainer._val_step = trainer._val_step or compose_evaluation_step(run, "validation", len(feed.sources))
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            with torch.no_grad():
                evaluate(run, "validation", feed, trainer._val_step, val_loop)
            val_loop.batch_progress.total.set_all(0)
            val_loop.batch_progress.reset()
        run.call("on_sanity_check_end")
    trainer._sanity_metrics = None
    trainer._reset_metrics()


def verify(trainer: Trainer) -> None:
    """Check that the hooks a run needs are there, before anything starts.

    Raises:
        MisconfigurationException: One is missing, or settings do not fit the module.
    """
    module, fn = trainer.lightning_module, str(trainer.state.fn)

    def has(name: str) -> bool:
        return name in vars(module) or is_overridden(name, module, LightningModule)

    for old in ("training_epoch_end", "validation_epoch_end", "test_epoch_end"):
        if callable(getattr(module, old, None)):
            new = f"on_{old.replace('training', 'train')}"
            raise NotImplementedError(
                f"`{type(module).__name__}.{old}` is not supported. Override `{new}` and keep the outputs yourself."
            )
    if fn == "fit":
        for name in ("training_step", "configure_optimizers"):
            if not has(name):
                raise MisconfigurationException(
                    f"`Trainer.fit` requires `{name}`, which {type(module).__name__} does not define. Define it."
                )
        if not trainer._train_loaders.is_defined:
            raise MisconfigurationException(
                f"`Trainer.fit` requires training data, received none for {type(module).__name__}. Pass "
                "`train_dataloaders`, a `datamodule`, or define `train_dataloader`."
            )
        if has("validation_step") and not trainer._val_loaders.is_defined:
            rank_zero_warn("You defined a `validation_step` but have no `val_dataloader`. Skipping validation.")
        elif trainer._val_loaders.is_defined and not has("validation_step"):
            rank_zero_warn("You passed in a `val_dataloader` but have no `validation_step`. Skipping validation.")
        if not module.automatic_optimization:
            if trainer.gradient_clip_val:
                raise MisconfigurationException(
                    "Automatic gradient clipping is not possible in manual optimization, received "
                    f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r}). Call `self.clip_gradients` in `training_step`."
                )
            if trainer.accumulate_grad_batches != 1:
                raise MisconfigurationException(
                    "Automatic gradient accumulation is not possible in manual optimization, received "
                    f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}). Step every N batches yourself."
                )
        return
    name = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[fn]
    if fn == "predict":
        if not has(name) and not has("forward"):
            raise MisconfigurationException(
                "`Trainer.predict` requires `predict_step` or `forward`. Define one of them."
            )
    elif not has(name):
        raise MisconfigurationException(
            f"`Trainer.{fn}` requires `{name}`, which {type(module).__name__} does not define. Define it."
        )
    loaders = trainer._loaders_of(fn)
    if not loaders.is_defined:
        raise MisconfigurationException(
            f"`Trainer.{fn}` requires data, received none. Pass `dataloaders`, a `datamodule`, or define `{loaders.hook}`."
        )


def prepare_data(trainer: Trainer) -> None:
    """Let the data module, then the module, prepare data in one process per node (or in one altogether)."""
    for owner in (trainer.datamodule, trainer.lightning_module):
        if owner is None or not is_overridden("prepare_data", owner, DataHooks):
            continue
        per_node = getattr(owner, "prepare_data_per_node", True)
        if trainer.local_rank == 0 if per_node else trainer.is_global_zero:
            call_timed(trainer, kind_of(owner), owner, "prepare_data")
        trainer.strategy.barrier("prepare_data")


def compose_run(trainer: Trainer, fn: str) -> Run:
    """Resolve everything that can be known before the first batch."""
    module, strategy = trainer.lightning_module, trainer.strategy
    timed = timer(trainer.profiler) if trainer._is_profiling else None
    optimizers: list[Any] = []
    schedulers: list[Any] = []
    if fn == "fit":
        configured = call_timed(trainer, "LightningModule", module, "configure_optimizers")
        optimizers, schedulers = resolve_optimizers(configured, module)
        optimizers = strategy.setup_optimizers(optimizers)
        strategy.optimizers, strategy.lr_scheduler_configs = optimizers, schedulers
        trainer._lightning_optimizers = [LightningOptimizer(optimizer) for optimizer in optimizers]
        for optimizer in trainer._lightning_optimizers:
            optimizer._module = module
    owners = [owner for owner in (trainer.datamodule, module) if owner is not None]
    run = (Run if timed is None else ProfiledRun)(
        trainer=trainer,
        module=module,
        strategy=strategy,
        hooks=HookTable(trainer, module, trainer.callbacks, timed, strategy),
        transfer=transfer_hooks(owners) if timed is None else timed_transfer(timed, owners, strategy),
        timed=timed or untimed,
        store=new_store(trainer, module, training=fn == "fit"),
        optimizers=optimizers,
        schedulers=schedulers,
        agreement=agreement_for(trainer),
    )
    run.activate(run.store)
    return run


def _detach_log_store(module: torch.nn.Module) -> None:
    for child in module.modules():
        if "_log_store" in child.__dict__:
            child.__dict__["_log_store"] = None


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
    loaders.measure(limit, name, num_from_limit)
    loaders.loaded_epoch = trainer.current_epoch


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
            from levin.utilities.warnings import PossibleUserWarning

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
    return True


def _val_check_batch(trainer: Trainer) -> int | float:
    """Return every how many batches validation is due; inf for once at the end."""
    interval, count = trainer.val_check_interval, trainer._num_training_batches
    if trainer._val_check_seconds is not None:
        return math.inf
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


def next_validation_feed(run: Run) -> Feed:
    """Return the feed of a validation inside fit."""
    trainer = run.trainer
    if load_validation(trainer) or trainer._val_step is None:
        trainer._val_step = compose_evaluation_step(run, "validation", len(trainer._val_loaders.sources()))
    feed = make_feed(run, trainer._val_loaders)
    for loader in feed.sources:
        set_epoch(loader, trainer.current_epoch)
    return feed


def stage_of(fn: str) -> RunningStage:
    """Return the stage in which a method starts."""
    stages = {"fit": "train", "validate": "validate", "test": "test", "predict": "predict"}
    return RunningStage(stages[fn])
