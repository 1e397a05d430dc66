"""The sequence of a run: prepare, set up, restore, loop, tear down."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, Optional

import torch

from levin.checkpoint.migrate import migrate
from levin.checkpoint.select import agree
from levin.data.transfer import CopyStream
from levin.hooks import DataHooks
from levin.hparams import drop_unpicklable
from levin.loggers.folder_logger import FolderLogger
from levin.loops.compiled import Compiler
from levin.loops.dataloaders import (
    has_batches,
    limit_of,
    load,
    load_training,
    load_validation,
    load_validation_if_soon,
    loaders_of,
    make_feed,
    show_call,
    tell_epoch,
)
from levin.loops.evaluate import compose_evaluation, evaluate, no_gradients
from levin.loops.fit import fit, is_done
from levin.loops.hook_table import HookTable, has_hook, transfer_hooks
from levin.loops.logging import send_hyperparameters
from levin.loops.run import Run, find_log_dir, new_store
from levin.loops.step import compose_step
from levin.loops.time_shares import TimeShares
from levin.loops.validate_setup import check_restored_epoch, hint_at_eval_mode, verify
from levin.optimizer import LightningOptimizer, resolve_optimizers
from levin.profilers.profiler import is_profiling, timer
from levin.ranks.agreement import agreement_for
from levin.ranks.hang_watchdog import start_watchdog
from levin.ranks.location import locate
from levin.ranks.same_everywhere import check_same_optimizers, check_same_settings
from levin.resume import checkpoint_tree as tree
from levin.resume.optimizer_groups import groups_by_name
from levin.resume.resume_state import ResumeState
from levin.utilities.overrides import has_own
from levin.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_warn
from levin.utilities.seed import isolate_rng
from levin.utilities.states import RunningStage
from levin.utilities.types import LRSchedulerConfig, StateDict


def run_sequence(run: Run, weights_only: Optional[bool]) -> object:
    """Run what ``run.state.fn`` says, from set-up to teardown.

    Args:
        run: As it was given.
        weights_only: Whether reading it may run no code; None for the default.

    Returns:
        What the method returns to the user.
    """
    module, datamodule, strategy = run.module, run.datamodule, run.strategy
    fn = run.fn
    connect(run)
    ckpt_path = run.ckpt_path = agree(run, run.ckpt_path)
    local_rank = strategy.local_rank if strategy.world_size > 1 else None
    is_profiled = is_profiling(run.profiler)
    folder = find_log_dir(run.loggers, run.settings.default_root_dir, strategy) if is_profiled else None
    run.profiler.setup(stage=fn, local_rank=local_rank, log_dir=folder)
    prepare_data(run)
    for logger in run.loggers:
        if isinstance(logger, FolderLogger):
            logger.agree(strategy.broadcast)
        getattr(logger, "experiment", None)
    set_up_owners(run)
    if run.settings.compile is not None:
        run.compiler = Compiler(run.settings.compile, module, lambda: run.store)
        run.compiler.begin(needs_blocks=strategy.restore_checkpoint_after_setup or not module.automatic_optimization)
    checkpoint: Optional[StateDict] = None
    if ckpt_path is not None:
        rank_zero_info(f"Restoring states from the checkpoint path at {ckpt_path}")
        checkpoint = migrate(strategy.load_checkpoint(ckpt_path, weights_only=weights_only), source=ckpt_path)
        if not strategy.restore_checkpoint_after_setup:
            tree.restore_module(run, checkpoint)
    attach(run)
    run.reset_metrics()
    if fn == "fit":
        run.call("on_fit_start")
    send_hyperparameters(run)
    if checkpoint is not None:
        if strategy.restore_checkpoint_after_setup:
            tree.restore_module(run, checkpoint)
        tree.restore_precision(run, checkpoint)
        tree.restore_loops(run, checkpoint)
        if fn == "fit":
            check_restored_epoch(run)
            tree.restore_optimizers(run, checkpoint)
            tree.keep_part_of_rank(checkpoint, strategy, weights_only)
            tree.continue_logs(run, checkpoint)
        what = "Restored all states" if fn == "fit" else "Loaded model weights"
        rank_zero_info(f"{what} from the checkpoint at {ckpt_path}")
    if run.watchdog is not None:
        run.watchdog.watch_progress(functools.partial(locate, run))
    run.signals.waits_for_batch = True
    run.take_logs()  # also of modules that `on_fit_start` has made
    result = run_stage(run, fn, checkpoint)
    run.refuse_logs()
    if run.compiler is not None:
        run.compiler.end()
    strategy.teardown()
    run.stop_watchdog()
    run.move_metrics(torch.device("cpu"))
    if fn == "fit":
        run.call("on_fit_end")
    if datamodule is not None:
        run.call_of(datamodule, "teardown", stage=fn)
    for callback in run.callbacks:
        run.call_of(callback, "teardown", run.trainer, module, stage=fn)
    run.call_of(module, "teardown", stage=fn)
    for logger in run.loggers:
        logger.finalize("success")
    run.profiler.describe()
    run.profiler.teardown(fn)
    return result


def connect(run: Run) -> None:
    """Check the run, and take this process to where its part of it runs."""
    verify(run)
    show_call(run)
    for owner in (run.module, run.datamodule):
        if owner is not None:
            drop_unpicklable(owner.hparams)
    run.is_setting_up = True
    run.strategy.connect(run.module)
    run.strategy.setup_environment()
    run.watchdog = start_watchdog(run.strategy)
    check_same_settings(run)


def set_up_owners(run: Run) -> None:
    """Call ``setup`` of all who have one, and let the module make its layers."""
    if run.datamodule is not None:
        run.call_of(run.datamodule, "setup", stage=run.fn)
    for callback in run.callbacks:
        run.call_of(callback, "setup", run.trainer, run.module, stage=run.fn)
    run.call_of(run.module, "setup", stage=run.fn)
    run.is_setting_up = False
    configure_model(run)


def attach(run: Run) -> None:
    """Give the module to the strategy, which asks for its optimizers, and compose the run."""
    if run.fn == "fit":
        run.strategy.configure_optimizers = functools.partial(configure_optimizers, run)
    run.strategy.setup(run.trainer)
    run.move_metrics(run.strategy.root_device)
    if hasattr(run.profiler, "attach"):  # Lightning's have none
        run.profiler.attach(run.module)
    compose_run(run)


def configure_model(run: Run) -> None:
    """Let the module make its layers, on the device and in the precision where they will be."""
    module = run.module
    old = getattr(module, "configure_sharded_model", None)
    is_new = has_hook(module, "configure_model")
    if old is not None:
        name = f"{type(module).__name__}.configure_sharded_model"
        if is_new:
            raise RuntimeError(f"`{name}` and `configure_model` are both defined. Keep `configure_model` alone.")
        rank_zero_deprecation(f"`{name}` is deprecated. Rename it to `configure_model`.")
    if is_new or old is not None:
        with run.strategy.module_init_context(), run.strategy.model_sharded_context():
            run.call_of(module, "configure_model" if is_new else "configure_sharded_model")


def configure_optimizers(run: Run) -> tuple[list[Any], list[LRSchedulerConfig]]:
    """Return the module's optimizers and schedulers, in one form."""
    return resolve_optimizers(run.call_of(run.module, "configure_optimizers"), run.module)


def run_stage(run: Run, fn: str, checkpoint: Optional[dict[str, object]]) -> object:
    """Run the loop of ``fn`` and return what the user gets."""
    run.module.zero_grad()
    if fn == "fit":
        run_fit(run, checkpoint)
        return None
    loaders = loaders_of(run, fn)
    limit = limit_of(run, fn)
    if limit == 0:
        return None if fn == "predict" else []
    load(run, loaders, limit)
    name = "validation" if fn == "validate" else fn
    evaluation = compose_evaluation(run, name, loaders)
    if not has_batches(run, loaders):
        rank_zero_warn(f"The loaders of `{loaders.hook}` hold no batches: {fn} is skipped.")
        return None if fn == "predict" else []
    tell_epoch(run, loaders)
    run.signals.is_looping = True
    with no_gradients(run)():
        return evaluate(run, name, evaluation, getattr(run.loops, fn))


def run_fit(run: Run, checkpoint: Optional[dict[str, object]]) -> None:
    """Sanity check, then training."""
    module = run.module
    loop = run.loops.fit
    loop.restarted_mid_epoch = False
    run.resume = ResumeState()
    exact = None
    if loop.restarting:
        exact = tree.own_state(checkpoint) if checkpoint is not None else None
        run.resume.settle_counters(run, exact)
    # An epoch whose end failed in the fit before was trained on.
    loop.epoch_progress.complete_processed()
    sanity_check(run, is_resumed=loop.restarted_mid_epoch)
    hint_at_eval_mode(module)
    run.state.stage = RunningStage.TRAINING
    torch.set_grad_enabled(True)
    loop.restarting = False
    if run.settings.limit_train_batches == 0:
        is_done(run)  # says so when a limit is reached as well
        return
    load_training(run)
    load_validation_if_soon(run)
    step = compose_step(run)
    run.step = step
    feed = make_feed(run, run.loaders.train)
    run.uneven = step.uneven = feed.uneven
    run.resume.follow(run, feed, step, exact)
    run.signals.is_before_training, run.signals.is_looping = False, True
    if run.strategy.is_global_zero and not run.settings.barebones:
        run.time_shares = TimeShares(run)
    with torch.autograd.set_detect_anomaly(True) if run.settings.detect_anomaly else nullcontext():
        try:
            fit(run, feed, step)
        finally:
            if run.time_shares is not None:
                run.time_shares.stop()
    run.signals.is_looping = False


def sanity_check(run: Run, is_resumed: bool) -> None:
    """Run a few validation batches before training, with nothing left of it afterwards."""
    steps = run.settings.num_sanity_val_steps
    if not run.enable_validation or not steps or is_resumed:
        return
    run.state.stage = RunningStage.SANITY_CHECKING
    with isolate_rng():
        run.call("on_sanity_check_start")
        load_validation(run)
        loaders = run.loaders.val
        if has_batches(run, loaders):
            run.validation = compose_evaluation(run, "validation", loaders)
            feed = run.validation.feed
            feed.limits = [min(steps, count) for count in loaders.num_batches]
            run.resume.follow_validation(feed, loaders, is_new=True, is_due=True)
            val_loop = run.loops.fit.epoch_loop.val_loop
            counts = val_loop.batch_progress.state_dict()
            with torch.no_grad():
                evaluate(run, "validation", run.validation, val_loop)
            feed.limits = loaders.limits
            run.resume.end_validation()
            val_loop.batch_progress.load_state_dict(counts)
        run.call("on_sanity_check_end")
    run.reset_metrics()


def prepare_data(run: Run) -> None:
    """Let the data module, then the module, prepare data in one process per node (or in one altogether)."""
    for owner in (run.datamodule, run.module):
        if owner is None or not has_own("prepare_data", owner, DataHooks):
            continue
        per_node = getattr(owner, "prepare_data_per_node", True)
        if run.strategy.local_rank == 0 if per_node else run.strategy.is_global_zero:
            run.call_of(owner, "prepare_data")
        run.strategy.barrier("prepare_data")


def take_optimizers(run: Run) -> None:
    """Train with what the strategy has from now on: from the start, and where a program exchanges it in the middle of a fit."""
    run.optimizers, run.schedulers = run.strategy.optimizers, run.strategy.lr_scheduler_configs
    run.configured_groups = groups_by_name(run.optimizers, run.module)
    run.lightning_optimizers = [LightningOptimizer(optimizer) for optimizer in run.optimizers]
    for optimizer in run.lightning_optimizers:
        optimizer._module = run.module
    if run.signals.is_looping:
        run.step.take_optimizers()


def compose_run(run: Run) -> None:
    """Resolve everything that can be known before the first batch."""
    module, strategy, fits = run.module, run.strategy, run.fn == "fit"
    timed = None
    if is_profiling(run.profiler):
        timed = run.timed = timer(run.profiler)
        run.is_profiled = True
    if fits:
        take_optimizers(run)
        strategy.when_exchanged = functools.partial(take_optimizers, run)
    run.hooks = HookTable(run.trainer, module, run.callbacks, timed, strategy)
    owners = [owner for owner in (run.datamodule, module) if owner is not None]
    move = CopyStream(strategy.root_device) if strategy.root_device.type == "cuda" else None
    run.transfer = strategy.transfer_function(transfer_hooks(owners, timed, strategy, move))
    run.agreement = agreement_for(run)
    if fits:
        check_same_optimizers(run)
    run.activate(new_store(run, training=fits))
    run.take_logs()
