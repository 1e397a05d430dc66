"""The sequence of a run: prepare, set up, restore, loop, tear down."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.checkpoint.migrate import migrate
from levin.checkpoint.select import agree
from levin.data.loaders import set_epoch
from levin.hooks import DataHooks, HookTable, has_hook, transfer_hooks
from levin.hparams import drop_unpicklable
from levin.loops.dataloaders import (
    batch_indices,
    limit_of,
    load,
    load_training,
    load_validation,
    load_validation_if_soon,
    loaders_of,
    make_feed,
)
from levin.loops.evaluate import compose_evaluation_step, evaluate
from levin.loops.fit import fit, is_done
from levin.loops.logging import send_hyperparameters
from levin.loops.on_error import stop_watchdog
from levin.loops.predict import predict
from levin.loops.profiled import ProfiledRun, is_profiling, kind_of, time_step, timed_transfer, timer, untimed
from levin.loops.run import Run, detach_log_store, new_store
from levin.loops.step import compose_step
from levin.loops.validate_setup import check_restored_epoch, hint_at_eval_mode, verify
from levin.optimizer import LightningOptimizer, resolve_optimizers
from levin.ranks.agreement import agreement_for
from levin.ranks.hang_watchdog import start_watchdog
from levin.ranks.location import locate
from levin.ranks.uneven import agreed_batches
from levin.resume import checkpoint_tree as tree
from levin.resume.resume_state import ResumeState
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_deprecation, rank_zero_info, rank_zero_warn
from levin.utilities.seed import isolate_rng
from levin.utilities.timing import call_timed

if TYPE_CHECKING:
    from levin.trainer import Trainer
    from levin.utilities.types import LRSchedulerConfig


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
    for owner in (module, datamodule):
        if owner is not None:
            drop_unpicklable(owner.hparams)
    trainer._is_setting_up = True
    strategy.connect(module)
    strategy.setup_environment()
    trainer._watchdog = start_watchdog(strategy)
    ckpt_path = agree(trainer, ckpt_path)
    local_rank = trainer.local_rank if trainer.world_size > 1 else None
    trainer.profiler.setup(stage=fn, local_rank=local_rank, log_dir=trainer.log_dir if is_profiling(trainer) else None)
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
        checkpoint = migrate(strategy.load_checkpoint(ckpt_path, weights_only=weights_only), source=ckpt_path)
        if not strategy.restore_checkpoint_after_setup:
            tree.restore_module(trainer, checkpoint)
    if fn == "fit":
        strategy.configure_optimizers = functools.partial(configure_optimizers, trainer)
    strategy.setup(trainer)
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
            check_restored_epoch(trainer)
            tree.restore_optimizers(trainer, checkpoint)
        what = "Restored all states" if fn == "fit" else "Loaded model weights"
        rank_zero_info(f"{what} from the checkpoint at {ckpt_path}")
    if trainer._watchdog is not None:
        trainer._watchdog.watch_progress(functools.partial(locate, trainer))
    trainer._signals.waits_for_batch = True
    result = run_stage(trainer, run, fn, checkpoint)
    run.activate(new_store(trainer, module, training=False))
    detach_log_store(module)
    strategy.teardown()
    stop_watchdog(trainer)
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
        with trainer.strategy.module_init_context(), trainer.strategy.model_sharded_context():
            call_timed(trainer, "LightningModule", module, "configure_model" if is_new else "configure_sharded_model")


def configure_optimizers(trainer: Trainer) -> tuple[list[Any], list[LRSchedulerConfig]]:
    """Return the module's optimizers and schedulers, in one form."""
    module = trainer.lightning_module
    return resolve_optimizers(call_timed(trainer, "LightningModule", module, "configure_optimizers"), module)


def run_stage(trainer: Trainer, run: Run, fn: str, checkpoint: Optional[dict[str, Any]]) -> Any:
    """Run the loop of ``fn`` and return what the user gets."""
    if fn == "fit":
        run_fit(trainer, run, checkpoint)
        return None
    loaders = loaders_of(trainer, fn)
    limit = limit_of(trainer, fn)
    if limit == 0:
        return None if fn == "predict" else []
    load(trainer, loaders, limit)
    feed = make_feed(run, loaders)
    name = "validation" if fn == "validate" else fn
    step = compose_evaluation_step(run, name, len(feed.sources))
    uses_inference = trainer._inference_mode and trainer.strategy.supports_inference_mode
    no_gradients = torch.inference_mode() if uses_inference else torch.no_grad()
    if agreed_batches(trainer.strategy, sum(loaders.num_batches)) == 0:
        rank_zero_warn(f"The loaders of `{loaders.hook}` hold no batches: {fn} is skipped.")
        return None if fn == "predict" else []
    for loader in feed.sources:
        set_epoch(loader, trainer.current_epoch)
    with no_gradients:
        if fn == "predict":
            indices = functools.partial(batch_indices, feed)
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
    trainer._resume = ResumeState()
    exact = None
    if loop.restarting:
        exact = tree.own_state_of_rank(checkpoint, trainer.strategy) if checkpoint is not None else None
        trainer._resume.settle_counters(trainer, exact)
    sanity_check(trainer, run, is_resumed=loop.restarted_mid_epoch)
    hint_at_eval_mode(module)
    trainer.training = True
    torch.set_grad_enabled(True)
    loop.restarting = False
    if trainer.limit_train_batches == 0:
        is_done(run)  # says so when a limit is reached as well
        return
    load_training(trainer)
    load_validation_if_soon(trainer)
    step = compose_step(run)
    if run.is_profiled:
        time_step(run, step)
    trainer._step = step
    feed = make_feed(run, trainer._train_loaders)
    run.uneven = step.uneven = feed.uneven  # type: ignore[attr-defined]  # of both kinds of steps
    trainer._resume.follow(run, feed, step, exact)
    trainer._signals.is_training = True
    with torch.autograd.set_detect_anomaly(True) if trainer._detect_anomaly else nullcontext():
        fit(run, feed, step)
    trainer._signals.is_training = False


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
        limits = trainer.num_sanity_val_batches
        if agreed_batches(trainer.strategy, sum(limits)) > 0:
            feed = make_feed(run, loaders, limits)
            trainer._resume.follow_validation(feed, loaders, is_new=True, is_due=True)
            trainer._val_step = trainer._val_step or compose_evaluation_step(run, "validation", len(feed.sources))
            val_loop = trainer.fit_loop.epoch_loop.val_loop
            counts = val_loop.batch_progress.state_dict()
            with torch.no_grad():
                evaluate(run, "validation", feed, trainer._val_step, val_loop)
            trainer._resume.end_validation()
            val_loop.batch_progress.load_state_dict(counts)
        run.call("on_sanity_check_end")
    trainer._reset_metrics()


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
    timed = timer(trainer.profiler) if is_profiling(trainer) else None
    if fn == "fit":
        trainer._lightning_optimizers = [LightningOptimizer(optimizer) for optimizer in strategy.optimizers]
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
        optimizers=strategy.optimizers if fn == "fit" else [],
        schedulers=strategy.lr_scheduler_configs if fn == "fit" else [],
        agreement=agreement_for(trainer),
    )
    run.activate(run.store)
    return run
