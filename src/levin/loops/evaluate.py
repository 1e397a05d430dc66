"""Validation and test, alone or inside fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from levin.data.loaders import set_epoch
from levin.hooks import has_hook
from levin.loops.dataloaders import load_validation, make_feed
from levin.loops.logging import send, to_floats
from levin.loops.run import new_store, step_arguments
from levin.ranks.agreement import now_s
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.seed import isolate_rng

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.log_store import LogStore
    from levin.loops.progress import EvaluationLoop
    from levin.loops.run import Run
    from levin.resume.resume_state import InterruptedPhase
    from levin.trainer import Trainer


@contextmanager
def kept_modes(module: torch.nn.Module) -> Iterator[None]:
    """Give each submodule its own train or eval mode back."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


def validate_in_fit(run: Run, accumulates: bool) -> None:
    """Validate in the middle of training; gradients are freed unless an accumulation window is open."""
    trainer = run.trainer
    if not accumulates:
        # Whoever reads during the validation, or right after it, finds the values of the step before.
        trainer._merge(run.store.read(on_step=True))
    trainer.validating = True
    if run.uneven is not None:
        run.uneven.forget_filler()
    trainer._resume.begin_validation(trainer, run)
    if not accumulates:
        run.call_own("on_validation_model_zero_grad", run.module.on_validation_model_zero_grad)
    exact, loaders = trainer._resume, trainer._val_loaders
    is_due = exact.is_validation_due_to_load(trainer.reload_dataloaders_every_n_epochs, trainer.current_epoch)
    # Loaders that are made for this process only may not draw numbers that the unbroken run does not draw.
    with nullcontext() if is_due else isolate_rng():
        is_new = load_validation(trainer)
    if is_new or trainer._val_step is None:
        trainer._val_step = compose_evaluation_step(run, "validation", len(loaders.sources()))
    feed = make_feed(run, loaders)
    exact.follow_validation(feed, loaders, is_new, is_due)
    for loader in feed.sources:
        set_epoch(loader, trainer.current_epoch)
    with torch.no_grad():
        evaluate(run, "validation", feed, trainer._val_step, trainer.fit_loop.epoch_loop.val_loop)
    trainer._resume.end_validation()
    trainer.training = True
    trainer._last_validation_time = now_s(run)


def end_validation_in_fit(run: Run, unfinished: InterruptedPhase) -> None:
    """Do what was left to do at the end of a validation when the checkpoint was saved."""
    trainer, module = run.trainer, run.module
    trainer.validating = True
    has_own_train = has_hook(module, "on_validation_model_train")
    outer = run.activate(new_store(trainer, module, training=False))
    with torch.no_grad(), nullcontext() if has_own_train else kept_modes(module):
        module.eval()
        trainer._resume.call_rest(run, "on_validation_end", unfinished)
    run.activate(outer)
    outer.is_between_batches = True
    if has_own_train:
        run.call_own("on_validation_model_train", module.on_validation_model_train)
    trainer.training = True


def compose_evaluation_step(run: Run, stage: str, num_dataloaders: int) -> Callable[[Any, int, int], Any]:
    """Return ``step(batch, batch_idx, dataloader_idx)`` that passes what the user's step takes."""
    name = f"{stage}_step"
    function = run.timed(
        f"[Strategy]{type(run.strategy).__name__}.{name}", run.strategy.step_function(run.strategy.model, name)
    )
    count = step_arguments(run.module, name, num_dataloaders)
    if count == 3:
        return function
    if count == 2:
        return lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    return lambda batch, batch_idx, dataloader_idx: function(batch)


def evaluate(
    run: Run, stage: str, feed: Feed, step: Callable[[Any, int, int], Any], loop: EvaluationLoop
) -> list[dict[str, float]]:
    """Run ``validation`` or ``test`` over all batches once.

    In pseudocode::

        on_<stage>_model_eval, on_<stage>_start, on_<stage>_epoch_start
        for batch in feed: on_<stage>_batch_start; step(batch); on_<stage>_batch_end
        on_<stage>_epoch_end; log; on_<stage>_end; modes back

    Returns:
        The logged epoch values, one dict per loader.
    """
    trainer, module = run.trainer, run.module
    store = new_store(trainer, module, training=False)
    outer = run.activate(store)
    store.is_between_batches = outer.is_between_batches
    progress = loop.batch_progress
    progress.reset()
    try:
        with nullcontext() if has_hook(module, f"on_{stage}_model_train") else kept_modes(module):
            run.call_own(f"on_{stage}_model_eval", getattr(module, f"on_{stage}_model_eval"))
            run.call(f"on_{stage}_start")
            run.call(f"on_{stage}_epoch_start")
            results = _batches(run, stage, feed, step, loop, store)
            store.end_batches()
            run.call(f"on_{stage}_epoch_end")
            _finish(run, store, results)
            run.call(f"on_{stage}_end")
            store.reset()
    finally:
        run.activate(outer)
        outer.is_between_batches = True
    if has_hook(module, f"on_{stage}_model_train"):
        run.call_own(f"on_{stage}_model_train", getattr(module, f"on_{stage}_model_train"))
    return [] if trainer.state.fn == "fit" else [to_floats(result) for result in results]


def _batches(
    run: Run,
    stage: str,
    feed: Feed,
    step: Callable[[Any, int, int], Any],
    loop: EvaluationLoop,
    store: LogStore,
) -> list[dict[str, Any]]:
    """Run over all batches. Returns a dict for each loader, with its epoch values where there are several loaders."""
    trainer, hooks, progress = run.trainer, run.hooks, loop.batch_progress
    start, end = f"on_{stage}_batch_start", f"on_{stage}_batch_end"
    has_start, has_end = bool(hooks[start]), bool(hooks[end])
    step_name = f"{stage}_step"
    is_multiple = len(feed.sources) > 1
    previous_loader = -1
    agreement, flags = run.agreement, run.flags
    results: list[dict[str, Any]] = [{} for _ in range(max(1, len(feed.sources)))]
    logs_steps = bool(trainer.loggers) and not trainer.sanity_checking
    log_steps = run.eval_log_steps
    for batch, batch_idx, dataloader_idx in feed:
        progress.is_last_batch = feed.is_last
        if dataloader_idx != previous_loader:
            if previous_loader >= 0:
                results[previous_loader] = _end_loader(trainer, store)
                feed.listen()
            previous_loader = dataloader_idx
            progress.current.set_all(0)
        progress.increment_ready()
        store.start_batch(batch, dataloader_idx if is_multiple else None)
        index = (dataloader_idx,) if is_multiple else ()
        if has_start:
            run.call(start, batch, batch_idx, *index)
        progress.increment_started()
        store.hook = step_name
        output = step(batch, batch_idx, dataloader_idx)
        store.hook = None
        progress.increment_processed()
        if has_end:
            run.call(end, output, batch, batch_idx, *index)
        progress.increment_completed()
        if store.has_step_slots:
            metrics = trainer._merge(store.read(on_step=True))
            if logs_steps:
                send(trainer, metrics.logged, step=log_steps.get(dataloader_idx, 0))
        if logs_steps:
            log_steps[dataloader_idx] = log_steps.get(dataloader_idx, 0) + 1
        if agreement is not None and feed.is_shared:
            agreement.maybe_sync()
        if flags.received_sigterm and (agreement is not None or not feed.is_last):
            raise SIGTERMException
    if is_multiple and previous_loader >= 0:
        results[previous_loader] = _end_loader(trainer, store)
    return results


def _end_loader(trainer: Trainer, store: LogStore) -> dict[str, Any]:
    """Reduce the values of one of several loaders, before the next one adds to the same metric objects."""
    metrics = store.read(on_step=False)
    if not trainer.sanity_checking:
        trainer._merge(metrics)
    return metrics.logged


def _finish(run: Run, store: LogStore, results: list[dict[str, Any]]) -> None:
    """Reduce what belongs to no single loader, and hand all on to the trainer and the loggers."""
    trainer = run.trainer
    metrics = store.read(on_step=False)
    logged: dict[str, Any] = {}
    for result in results:
        result.update(metrics.logged)
        logged.update(result)
    if not trainer.sanity_checking:
        trainer._merge(metrics)
        send(trainer, logged)
