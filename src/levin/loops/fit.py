"""Training: epochs, batches, validation, logging and the stop conditions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Optional

from levin.checkpoint.io import CheckpointIO
from levin.data.feed import Feed
from levin.loops import evaluate
from levin.loops.dataloaders import prepare_epoch
from levin.loops.hook_table import has_hook
from levin.loops.logging import send
from levin.loops.run import Run, Step
from levin.loops.schedulers import step_schedulers
from levin.ranks.same_everywhere import check_logged_names
from levin.resume.resume_state import InterruptedPhase, Phase
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.overrides import is_overridden
from levin.utilities.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_warn


def fit(run: Run, feed: Feed, step: Step) -> None:
    """Train until a limit is reached or somebody asks to stop.

    In pseudocode::

        on_train_start
        while no limit is reached:
            on_train_epoch_start
            for batch in feed:
                on_train_batch_start; step(batch); schedulers; on_train_batch_end
                log; validate when due; stop when told
            on_train_epoch_end; log; schedulers
        on_train_end

    Args:
        run: The parts of the run.
        feed: The training batches.
        step: What is done with one; see ``loops/step.py``.
    """
    loop = run.loops.fit
    _exchange(run)
    if is_done(run):
        return
    run.last_validation_s = run.now_s
    run.call("on_train_start")
    run.resume.restore_after_start(run)
    _exchange(run)
    resumed = loop.restarted_mid_epoch
    if (unfinished := run.resume.take_unfinished(Phase.EPOCH_END)) is not None:
        _end_unfinished_epoch(run, unfinished)
    while not is_done(run):
        epoch = loop.epoch_progress
        prepare_epoch(run, feed)
        if not resumed:
            epoch.increment_ready()
            run.call("on_train_epoch_start")
            loop.epoch_loop.batch_progress.reset()
            loop.epoch_loop.scheduler_progress.reset()
            loop.epoch_loop.optim_progress.reset()
            loop.epoch_loop.val_loop.batch_progress.total.set_all(0)
            epoch.increment_started()
        run.hooks.warn_of_changes(run.callbacks)
        run.timed("run_training_epoch", _epoch)(run, feed, step, resumed)
        run.resume.position.finish()
        resumed = loop.restarted_mid_epoch = False
        epoch.increment_processed()
        _end_epoch(run)
        epoch.increment_completed()
        _exchange(run)
        if run.flags.received_sigterm:
            raise SIGTERMException
    run.call("on_train_end")


def _epoch(run: Run, feed: Feed, step: Step, resumed: bool) -> None:
    """Run over the batches of one epoch, or over the rest of one that was interrupted."""
    loop = run.loops.fit.epoch_loop
    store, progress, hooks = run.store, loop.batch_progress, run.hooks
    has_start, has_end = bool(hooks["on_train_batch_start"]), bool(hooks["on_train_batch_end"])
    may_skip = has_start and has_hook(run.module, "on_train_batch_start")  # a callback's answer does not count
    agreement, flags, unsent = run.agreement, run.flags, run.unsent.rows
    # On several ranks it is the agreement that looks after the saves, so that an error is raised on all of them.
    poll: Optional[Callable[[], None]] = agreement.maybe_sync if agreement is not None else None
    if poll is None and is_overridden("check", run.strategy.checkpoint_io, CheckpointIO):
        poll = run.strategy.checkpoint_io.check
    schedules = bool(run.schedulers) and run.module.automatic_optimization
    validates = run.enable_validation
    if resumed and progress.current.ready:
        if _end_unfinished_batch(run, validates):
            return
    if flags.should_stop and _may_stop(run):
        return
    batches = run.resume.batches(feed, progress.current.ready)
    train = run.timed("run_training_batch", step)
    try:
        for batch, batch_idx, _ in batches:
            is_last = progress.is_last_batch = feed.is_last
            progress.increment_ready()
            store.start_batch(batch)
            if batch is None:
                outputs: Optional[dict[str, object]] = None
                _warn_of_empty_batch()
            else:
                if has_start and run.call("on_train_batch_start", batch, batch_idx) == -1 and may_skip:
                    # The user made this the end of the epoch, without training on it.
                    progress.increment_processed()
                    progress.is_last_batch = True
                    if schedules:
                        _step_due_schedulers(run, batch_idx, is_last=True)
                    break
                progress.increment_started()
                outputs = train(batch, batch_idx, is_last)
            progress.increment_processed()
            is_last = progress.is_last_batch = feed.is_last  # a step with a `dataloader_iter` may have taken more
            if schedules:
                _step_due_schedulers(run, batch_idx, is_last)
            if has_end:
                run.call("on_train_batch_end", outputs, batch, batch_idx)
            if poll is not None:
                poll()
            if unsent:
                run.unsent.send(0.0)
            _after_batch(run, batch_idx, is_last, validates)
            if flags.received_sigterm and not _has_all_steps(run) and _may_be_left(run, batch_idx, is_last):
                raise SIGTERMException
            if flags.should_stop or loop.max_steps >= 0:
                if _stops_in_epoch(run):
                    break
        else:
            if progress.current.ready and not progress.is_last_batch:
                _end_short_epoch(run, step, validates)
    except StopIteration:
        store.hook = None
        run.under_way = ("", None, ())
    finally:
        batches.close()


def _end_short_epoch(run: Run, step: Step, validates: bool) -> None:
    """Do what belongs to the last batch of an epoch, after its data ended before the length of the loader said so."""
    loop = run.loops.fit.epoch_loop
    batch_idx = loop.batch_progress.current.ready - 1
    is_open = accumulates_after(run, batch_idx, is_last=False)
    was_validated = validates_now(run, batch_idx, is_last=False)
    loop.batch_progress.is_last_batch = True
    if run.module.automatic_optimization:
        if is_open:
            step.close_window()
            step_schedulers(run, "step", plateau=False)
        step_schedulers(run, "epoch", plateau=False)
    if validates and not was_validated and validates_now(run, batch_idx, is_last=True):
        evaluate.validate_in_fit(run, accumulates=False)
        _exchange(run)
    if is_open:
        if run.module.automatic_optimization:
            step_schedulers(run, "step", plateau=True)
        loop._batches_that_stepped += 1


def _step_due_schedulers(run: Run, batch_idx: int, is_last: bool) -> None:
    """Step the schedulers that follow a batch and, after the last batch, those that follow an epoch."""
    if not accumulates_after(run, batch_idx, is_last):
        step_schedulers(run, "step", plateau=False)
    if is_last:
        step_schedulers(run, "epoch", plateau=False)


def accumulates_after(run: Run, batch_idx: int, is_last: bool) -> bool:
    """Whether the accumulation window is still open after this batch."""
    every = run.settings.accumulate_grad_batches
    return every != 1 and not is_last and (batch_idx + 1) % every != 0


def _may_be_left(run: Run, batch_idx: int, is_last: bool) -> bool:
    """Whether all that was computed can be saved after this batch: the gradients of an open window cannot everywhere."""
    return run.strategy.keeps_open_windows or not accumulates_after(run, batch_idx, is_last)


def _after_batch(
    run: Run, batch_idx: int, is_last: bool, validates: bool, unfinished: Optional[InterruptedPhase] = None
) -> None:
    """Log the step, validate when due, count the batch; or do what is left of that."""
    loop = run.loops.fit.epoch_loop
    accumulates = run.settings.accumulate_grad_batches != 1 and accumulates_after(run, batch_idx, is_last)
    if unfinished is None or unfinished.phase == Phase.BATCH_END:
        loop.batch_progress.increment_completed()
        if not accumulates and run.loggers and logs_step(run, loop._batches_that_stepped):
            metrics = run.merge(run.store.read(on_step=True))
            send(run, metrics.logged, timeout_s=0.0)
        if validates and validates_now(run, batch_idx, is_last):
            evaluate.validate_in_fit(run, accumulates)
            _exchange(run)
    elif unfinished.phase == Phase.VALIDATION_END:
        evaluate.end_validation_in_fit(run, unfinished)
        _exchange(run)
    elif validates:
        evaluate.validate_in_fit(run, accumulates)
        _exchange(run)
    if run.schedulers and not accumulates and run.module.automatic_optimization:
        step_schedulers(run, "step", plateau=True)
    if not accumulates:
        loop._batches_that_stepped += 1


def _end_unfinished_batch(run: Run, validates: bool) -> bool:
    """Do what was left to do after the last batch when the checkpoint was saved. Returns whether the epoch is over."""
    exact = run.resume
    progress = run.loops.fit.epoch_loop.batch_progress
    batch_idx, is_last = progress.current.ready - 1, progress.is_last_batch
    unfinished = exact.take_unfinished(Phase.BATCH_END, Phase.VALIDATION, Phase.VALIDATION_END)
    if unfinished is not None:
        run.store.start_batch(None)
        if unfinished.phase == Phase.BATCH_END:
            exact.call_rest(run, "on_train_batch_end", unfinished, batch_idx)
        _after_batch(run, batch_idx, is_last, validates, unfinished)
        if run.flags.received_sigterm and not _has_all_steps(run):
            raise SIGTERMException
    return is_last or _stops_in_epoch(run)


def logs_step(run: Run, batches_that_stepped: int) -> bool:
    """Whether the values of a step go to the loggers, after so many batches that stepped before."""
    every = run.settings.log_every_n_steps
    if every == 0:
        return False
    return bool((batches_that_stepped + 1) % every == 0 or run.told.should_stop or run.settings.fast_dev_run)


def validates_now(run: Run, batch_idx: int, is_last: bool) -> bool:
    """Whether validation follows this batch; the rules in the order of their precedence."""
    if not run.validates_in_epoch:
        return False
    if is_last and (run.loops.fit.val_check_batch == math.inf or _is_once_an_epoch(run)):
        return True
    if run.flags.should_stop and _may_stop(run):
        return True
    if run.settings.val_check_seconds is not None:
        return bool(run.now_s - run.last_validation_s >= run.settings.val_check_seconds)
    interval = run.loops.fit.val_check_batch
    if interval is None or interval == math.inf:
        return False
    index = batch_idx if run.settings.check_val_every_n_epoch is not None else run.loops.fit.epoch_loop.total_batch_idx
    return bool((index + 1) % interval == 0)


def _is_once_an_epoch(run: Run) -> bool:
    """Whether the interval is the whole epoch, however many batches each step of it took."""
    return (
        run.settings.check_val_every_n_epoch is not None and run.loops.fit.val_check_batch == run.loops.fit.max_batches
    )


def _end_unfinished_epoch(run: Run, unfinished: InterruptedPhase) -> None:
    """Do what was left to do at the end of the epoch when the checkpoint was saved."""
    epoch = run.loops.fit.epoch_progress
    for counter in (epoch.current, epoch.total):
        counter.completed -= 1
    _end_epoch(run, unfinished)
    epoch.increment_completed()


def _end_epoch(run: Run, unfinished: Optional[InterruptedPhase] = None) -> None:
    """Epoch-end hooks, values, schedulers."""
    loop = run.loops.fit.epoch_loop
    run.merge(run.store.read(on_step=True))
    run.store.end_batches()
    run.unsent.send(math.inf)
    check_logged_names(run)
    if unfinished is None:
        run.call("on_train_epoch_end")
    else:
        run.resume.call_rest(run, "on_train_epoch_end", unfinished)
    if run.schedulers and run.module.automatic_optimization and loop.batch_progress.is_last_batch:
        step_schedulers(run, "epoch", plateau=True)
    check_logged_names(run)
    metrics = run.merge(run.store.read(on_step=False))
    if metrics.logged:
        loop._batches_that_stepped -= 1
        send(run, metrics.logged)
        loop._batches_that_stepped += 1
    run.store.reset()


def _has_all_steps(run: Run) -> bool:
    """Whether training is done in any case."""
    return 0 <= run.loops.fit.max_steps <= run.global_step


def _may_stop(run: Run) -> bool:
    """Whether ``should_stop`` may be obeyed: the least numbers of epochs and steps are reached."""
    loop = run.loops.fit
    enough_epochs = not loop.min_epochs or loop.epoch_progress.current.processed >= loop.min_epochs
    enough_steps = not loop.min_steps or run.global_step >= loop.min_steps
    return bool(enough_epochs and enough_steps)


def _stops_in_epoch(run: Run) -> bool:
    loop = run.loops.fit
    if 0 <= loop.max_steps <= run.global_step:
        return True
    return bool(run.flags.should_stop and _may_stop(run))


def _exchange(run: Run) -> None:
    """Let all ranks know here what each was told so far."""
    if run.agreement is not None:
        run.agreement.sync()


def is_done(run: Run) -> bool:
    """Whether a limit of training is reached, or a stop was asked for and may be obeyed; says which."""
    loop = run.loops.fit
    if loop.max_batches == 0:
        rank_zero_info("`Trainer.fit` stopped: No training batches.")
        return True
    if 0 <= loop.max_steps <= run.global_step:
        rank_zero_info(f"`Trainer.fit` stopped: `max_steps={loop.max_steps!r}` reached.")
        return True
    if loop.max_epochs is not None and 0 <= loop.max_epochs <= loop.epoch_progress.current.processed:
        rank_zero_info(f"`Trainer.fit` stopped: `max_epochs={loop.max_epochs!r}` reached.")
        return True
    if run.flags.should_stop:
        if _may_stop(run):
            rank_zero_debug("`Trainer.fit` stopped: `trainer.should_stop` was set.")
            return True
        _explain_minima_once(run)
    return False


def _explain_minima_once(run: Run) -> None:
    if not run.has_explained_minima:
        run.has_explained_minima = True
        rank_zero_info(
            f"Trainer was signaled to stop but the required `min_epochs={run.loops.fit.min_epochs!r}` or "
            f"`min_steps={run.loops.fit.min_steps!r}` has not been met. Training will continue..."
        )


def _warn_of_empty_batch() -> None:
    rank_zero_warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
