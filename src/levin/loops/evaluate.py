"""Validation, test and predictions, alone or inside fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any, Optional

import torch

from levin.counters import EvaluationLoop
from levin.data.feed import Feed
from levin.log_store import LogStore
from levin.loops.dataloaders import (
    batch_indices,
    has_batches,
    load_if_dropped,
    load_validation,
    make_feed,
    measure_again,
    tell_epoch,
)
from levin.loops.hook_table import has_hook
from levin.loops.logging import send
from levin.loops.run import Evaluation, Run, new_store, step_arguments
from levin.loops.stage_loaders import StageLoaders
from levin.ranks.same_everywhere import check_logged_names
from levin.resume.resume_state import InterruptedPhase
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.modes import kept_modes
from levin.utilities.move import move_data_to_device
from levin.utilities.numbers import to_numbers
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.seed import isolate_rng
from levin.utilities.states import RunningStage

_CPU = torch.device("cpu")


def compose_evaluation(run: Run, stage: str, loaders: StageLoaders) -> Evaluation:
    """Return what ``validation``, ``test`` or ``predict`` is run with over ``loaders``."""
    feed = make_feed(run, loaders)
    return Evaluation(feed, compose_evaluation_step(run, stage, len(feed.sources)), new_store(run, training=False))


def validate_in_fit(run: Run, accumulates: bool) -> None:
    """Validate in the middle of training; gradients are freed unless an accumulation window is open."""
    if not accumulates:
        # Whoever reads during the validation, or right after it, finds the values of the step before.
        run.merge(run.store.read(on_step=True))
    run.state.stage = RunningStage.VALIDATING
    if run.uneven is not None:
        run.uneven.forget_filler()
    run.resume.begin_validation(run)
    if not accumulates:
        run.call_own("on_validation_model_zero_grad", run.module.on_validation_model_zero_grad)
    exact, loaders = run.resume, run.loaders.val
    is_due = exact.is_validation_due_to_load(run.settings.reload_dataloaders_every_n_epochs, run.current_epoch)
    # Loaders that are made for this process only may not draw numbers that the unbroken run does not draw.
    with nullcontext() if is_due else isolate_rng():
        is_new = load_validation(run)
    if is_new or run.validation is None:
        run.validation = compose_evaluation(run, "validation", loaders)
    elif not run.strategy.is_distributed:
        measure_again(loaders, run.settings.limit_val_batches, run.validation.feed)
    if has_batches(run, loaders):
        exact.follow_validation(run.validation.feed, loaders, is_new, is_due)
        tell_epoch(run, loaders)
        with torch.no_grad():
            evaluate(run, "validation", run.validation, run.loops.fit.epoch_loop.val_loop)
    run.resume.end_validation()
    run.state.stage = RunningStage.TRAINING
    run.last_validation_s = run.now_s


def end_validation_in_fit(run: Run, unfinished: InterruptedPhase) -> None:
    """Do what was left to do at the end of a validation when the checkpoint was saved."""
    module = run.module
    run.state.stage = RunningStage.VALIDATING
    has_own_train = has_hook(module, "on_validation_model_train")
    outer = run.activate(new_store(run, training=False))
    with torch.no_grad(), nullcontext() if has_own_train else kept_modes(module):
        module.eval()
        run.resume.call_rest(run, "on_validation_end", unfinished)
    run.activate(outer)
    outer.is_between_batches = True
    if has_own_train:
        run.call_own("on_validation_model_train", module.on_validation_model_train)
    run.state.stage = RunningStage.TRAINING


def compose_evaluation_step(run: Run, stage: str, num_dataloaders: int) -> Callable[[object, int, int], object]:
    """Return ``step(batch, batch_idx, dataloader_idx)`` that passes what the user's step takes."""
    name = f"{stage}_step"
    function = run.strategy.step_function(run.strategy.model, name)
    if run.compiler is not None and not run.compiler.only_blocks:
        function = run.compiler.function(function, name)
    function = run.timed(f"[Strategy]{type(run.strategy).__name__}.{name}", function)
    count = step_arguments(run.module, name, num_dataloaders)
    if count == 3:
        return function
    if count == 2:
        return lambda batch, batch_idx, dataloader_idx: function(batch, batch_idx)
    return lambda batch, batch_idx, dataloader_idx: function(batch)


def no_gradients(run: Run) -> type[torch.no_grad] | type[torch.inference_mode]:
    """Return the context of an evaluation outside of fit."""
    if run.settings.inference_mode and run.strategy.supports_inference_mode:
        return torch.inference_mode
    return torch.no_grad


class Predictions:
    """What ``predict`` keeps of its batches: which samples they were, and what came out.

    Args:
        feed: The batches.
        loop: Where users find the indices and the outputs.
        keeps: Whether the outputs are kept as well, on the CPU.
    """

    def __init__(self, feed: Feed, loop: EvaluationLoop, keeps: bool) -> None:
        self._feed = feed
        self._loop = loop
        self._keeps = keeps
        self._outputs: list[list[object]] = [[] for _ in feed.sources]
        self._has_warned: bool = False
        loop.epoch_batch_indices = [[] for _ in feed.sources]
        loop.predictions = self._outputs[0] if len(self._outputs) == 1 else self._outputs

    def begin_batch(self, batch_idx: int, dataloader_idx: int) -> None:
        """Find the indices of the batch, if they are known."""
        self._loop.current_batch_indices = batch_indices(self._feed, dataloader_idx, batch_idx) or []

    def end_batch(self, output: object, dataloader_idx: int) -> None:
        """Keep what the batch gave."""
        if output is None and not self._has_warned:
            self._has_warned = True
            rank_zero_warn("`predict_step` returned None. Return the prediction if this was not meant.")
        if self._loop.current_batch_indices:
            self._loop.epoch_batch_indices[dataloader_idx].append(self._loop.current_batch_indices)
        if self._keeps:
            self._outputs[dataloader_idx].append(move_data_to_device(output, _CPU))

    def result(self) -> Optional[list[Any]]:
        """Return one list of outputs, or a list of lists with several loaders; None when they are not kept."""
        return self._loop.predictions if self._keeps else None


def evaluate(run: Run, stage: str, evaluation: Evaluation, loop: EvaluationLoop) -> Optional[list[object]]:
    """Run ``validation``, ``test`` or ``predict`` over all batches once.

    In pseudocode::

        on_<stage>_model_eval, on_<stage>_start, on_<stage>_epoch_start
        for batch in feed: on_<stage>_batch_start; step(batch); on_<stage>_batch_end
        on_<stage>_epoch_end; log; on_<stage>_end; modes back

    Returns:
        The logged epoch values, one dict per loader; of predictions what :meth:`Predictions.result` returns.
    """
    module, feed, store = run.module, evaluation.feed, evaluation.store
    predictions = Predictions(feed, loop, run.keeps_predictions) if stage == "predict" else None
    has_own_train = predictions is None and has_hook(module, f"on_{stage}_model_train")
    outer = run.activate(store)
    store.is_between_batches = outer.is_between_batches
    loop.batch_progress.reset()
    try:
        with nullcontext() if has_own_train else kept_modes(module):
            run.call_own(f"on_{stage}_model_eval", getattr(module, f"on_{stage}_model_eval"))
            run.call(f"on_{stage}_start")
            if run.fn != "fit":
                load_if_dropped(run, feed)
            run.call(f"on_{stage}_epoch_start")
            with closing(feed.iterate(0)) as batches:
                results = _batches(run, stage, feed, batches, evaluation.step, loop, predictions)
            store.end_batches()
            check_logged_names(run)
            run.call(f"on_{stage}_epoch_end")
            check_logged_names(run)
            _finish(run, store, results)
            run.call(f"on_{stage}_end")
            store.reset()
    finally:
        run.activate(outer)
        outer.is_between_batches = True
    if has_own_train:
        run.call_own(f"on_{stage}_model_train", getattr(module, f"on_{stage}_model_train"))
    if predictions is not None:
        return predictions.result()
    return [] if run.fn == "fit" else [to_numbers(result) for result in results]


def _batches(
    run: Run,
    stage: str,
    feed: Feed,
    batches: Iterator[tuple[object, int, int]],
    step: Callable[[object, int, int], object],
    loop: EvaluationLoop,
    predictions: Optional[Predictions],
) -> list[dict[str, object]]:
    """Run over all batches. Returns a dict for each loader, with its epoch values where there are several loaders."""
    hooks, progress, store = run.hooks, loop.batch_progress, run.store
    start, end = f"on_{stage}_batch_start", f"on_{stage}_batch_end"
    has_start, has_end = bool(hooks[start]), bool(hooks[end])
    step_name = f"{stage}_step"
    is_multiple = len(feed.sources) > 1
    previous_loader = -1
    agreement, flags = run.agreement, run.flags
    results: list[dict[str, object]] = [{} for _ in range(max(1, len(feed.sources)))]
    logs_steps = not run.is_sanity_checking
    log_steps = run.eval_log_steps
    try:
        for batch, batch_idx, dataloader_idx in batches:
            if predictions is not None and feed.is_filler:
                step(batch, batch_idx, dataloader_idx)
                continue
            progress.is_last_batch = feed.is_last
            if dataloader_idx != previous_loader:
                if previous_loader >= 0:
                    results[previous_loader] = _end_loader(run, store)
                    feed.listen()
                previous_loader = dataloader_idx
                progress.current.set_all(0)
            progress.increment_ready()
            store.start_batch(batch, dataloader_idx if is_multiple else None)
            if predictions is not None:
                predictions.begin_batch(batch_idx, dataloader_idx)
            index = (dataloader_idx,) if is_multiple else ()
            if has_start:
                run.call(start, batch, batch_idx, *index)
            progress.increment_started()
            store.hook = step_name
            output = step(batch, batch_idx, dataloader_idx)
            store.hook = None
            if store.recorded:
                store.take_recorded()
            progress.increment_processed()
            if has_end:
                run.call(end, output, batch, batch_idx, *index)
            progress.increment_completed()
            if predictions is not None:
                predictions.end_batch(output, dataloader_idx)
            if store.has_step_slots:
                metrics = run.merge(store.read(on_step=True))
                if logs_steps:
                    send(run, metrics.logged, step=log_steps.get(dataloader_idx, 0))
            if logs_steps and run.loggers:
                log_steps[dataloader_idx] = log_steps.get(dataloader_idx, 0) + 1
            if agreement is not None and feed.is_shared:
                agreement.maybe_sync()
            if flags.received_sigterm and (agreement is not None or not feed.is_last):
                raise SIGTERMException
    except StopIteration:  # a step has no more batches, or wants none
        store.hook = None
        run.under_way = ("", None, ())
    progress.is_last_batch = feed.is_last
    if is_multiple and previous_loader >= 0:
        results[previous_loader] = _end_loader(run, store)
    return results


def _end_loader(run: Run, store: LogStore) -> dict[str, object]:
    """Reduce the values of one of several loaders, before the next one adds to the same metric objects."""
    check_logged_names(run)
    metrics = store.read(on_step=False)
    if not run.is_sanity_checking:
        run.merge(metrics)
    return metrics.logged


def _finish(run: Run, store: LogStore, results: list[dict[str, object]]) -> None:
    """Reduce what belongs to no single loader, and hand all on to users and loggers."""
    metrics = store.read(on_step=False)
    logged: dict[str, object] = {}
    for result in results:
        result.update(metrics.logged)
        logged.update(result)
    if not run.is_sanity_checking:
        run.merge(metrics)
        send(run, logged)
