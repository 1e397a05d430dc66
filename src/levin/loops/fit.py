"""Training: epochs, batches, validation, logging and the stop conditions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Optional

from levin.hooks import has_hook
from levin.loops import evaluate
from levin.loops.dataloaders import prepare_epoch
from levin.loops.logging import send
from levin.loops.schedulers import step_schedulers
from levin.ranks.agreement import now_s
from levin.resume.resume_state import InterruptedPhase, Phase
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.rank_zero import rank_zero_debug, rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.loops.run import Run
    from levin.loops.step import Step
    from levin.trainer import Trainer


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
    trainer = run.trainer
    loop = trainer.fit_loop
    _exchange(run)
    if is_done(run):
        return
    trainer._last_validation_time = now_s(run)
    run.call("on_train_start")
    trainer._resume.take_up(run)
    _exchange(run)
    resumed = loop.restarted_mid_epoch
    if (unfinished := trainer._resume.take_unfinished(Phase.EPOCH_END)) is not None:
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
        run.timed("run_training_epoch", _epoch)(run, feed, step, resumed)
        trainer._resume.position.finish()
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
    trainer = run.trainer
    loop = trainer.fit_loop.epoch_loop
    store, progress, hooks = run.store, loop.batch_progress, run.hooks
    may_skip = has_hook(run.module, "on_train_batch_start")  # a callback's answer does not count
    has_start, has_end = bool(hooks["on_train_batch_start"]), bool(hooks["on_train_batch_end"])
    agreement, flags = run.agreement, run.flags
    # On several ranks it is the agreement that looks after the saves, so that an error is raised on all of them.
    look = run.strategy.checkpoint_io.check if agreement is None else agreement.maybe_sync
    schedules = bool(run.schedulers) and run.module.automatic_optimization
    validates = trainer.enable_validation
    if resumed and progress.current.ready:
        if _end_unfinished_batch(run, validates):
            return
    if flags.should_stop and _may_stop(trainer):
        return
    batches = trainer._resume.batches(feed, progress.current.ready)
    train = run.timed("run_training_batch", step)
    try:
        for batch, batch_idx, _ in batches:
            is_last = progress.is_last_batch = feed.is_last
            progress.increment_ready()
            store.start_batch(batch)
            if batch is None:
                outputs: Optional[dict[str, Any]] = None
                _warn_of_empty_batch()
            else:
                if has_start and run.call("on_train_batch_start", batch, batch_idx) == -1 and may_skip:
                    # The user made this the end of the epoch, without training on it.
                    progress.increment_processed()
                    progress.is_last_batch = True
                    if schedules:
                        _step_schedulers(run, batch_idx, is_last=True)
                    break
                progress.increment_started()
                outputs = train(batch, batch_idx, is_last)
            progress.increment_processed()
            is_last = progress.is_last_batch = feed.is_last  # a step with a `dataloader_iter` may have taken more
            if schedules:
                _step_schedulers(run, batch_idx, is_last)
            if has_end:
                run.call("on_train_batch_end", outputs, batch, batch_idx)
            look()
            _after_batch(run, batch_idx, is_last, validates)
            if flags.received_sigterm and not _has_all_steps(trainer):
                raise SIGTERMException
            if flags.should_stop or loop.max_steps >= 0:
                if _stops_in_epoch(run):
                    break
    except StopIteration:
        store.hook = None
        run.under_way = ("", None, ())
    finally:
        batches.close()


def _step_schedulers(run: Run, batch_idx: int, is_last: bool) -> None:
    """Step the schedulers that follow a batch and, after the last batch, those that follow an epoch."""
    if not _accumulates(run.trainer, batch_idx, is_last):
        step_schedulers(run, "step", plateau=False)
    if is_last:
        step_schedulers(run, "epoch", plateau=False)


def _accumulates(trainer: Trainer, batch_idx: int, is_last: bool) -> bool:
    """Whether the accumulation window is still open after this batch."""
    every = trainer.accumulate_grad_batches
    return every != 1 and not is_last and (batch_idx + 1) % every != 0


def _after_batch(
    run: Run, batch_idx: int, is_last: bool, validates: bool, unfinished: Optional[InterruptedPhase] = None
) -> None:
    """Log the step, validate when due, count the batch; or do what is left of that."""
    trainer = run.trainer
    loop = trainer.fit_loop.epoch_loop
    accumulates = _accumulates(trainer, batch_idx, is_last)
    if unfinished is None or unfinished.phase == Phase.BATCH_END:
        loop.batch_progress.increment_completed()
        if not accumulates and trainer.loggers and _logs_step(trainer, loop._batches_that_stepped):
            metrics = trainer._merge(run.store.read(on_step=True))
            send(trainer, metrics.logged)
        if validates and _validates_now(run, batch_idx, is_last):
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
    trainer, exact = run.trainer, run.trainer._resume
    progress = trainer.fit_loop.epoch_loop.batch_progress
    batch_idx, is_last = progress.current.ready - 1, progress.is_last_batch
    unfinished = exact.take_unfinished(Phase.BATCH_END, Phase.VALIDATION, Phase.VALIDATION_END)
    if unfinished is not None:
        run.store.start_batch(None)
        if unfinished.phase == Phase.BATCH_END:
            exact.call_rest(run, "on_train_batch_end", unfinished, batch_idx)
        _after_batch(run, batch_idx, is_last, validates, unfinished)
        if run.flags.received_sigterm and not _has_all_steps(trainer):
            raise SIGTERMException
    return is_last or _stops_in_epoch(run)


def _logs_step(trainer: Trainer, batches_that_stepped: int) -> bool:
    every = trainer.log_every_n_steps
    if every == 0:
        return False
    return bool((batches_that_stepped + 1) % every == 0 or trainer.should_stop or trainer.fast_dev_run)


def _validates_now(run: Run, batch_idx: int, is_last: bool) -> bool:
    """Whether validation follows this batch; the rules in the order of their precedence."""
    trainer = run.trainer
    if not _validates_in_epoch(trainer):
        return False
    if is_last and (trainer.val_check_batch == math.inf or _is_once_an_epoch(trainer)):
        return True
    if run.flags.should_stop and _may_stop(trainer):
        return True
    if trainer._val_check_seconds is not None:
        return bool(now_s(run) - trainer._last_validation_time >= trainer._val_check_seconds)
    interval = trainer.val_check_batch
    if interval is None or interval == math.inf:
        return False
    if trainer.num_training_batches == math.inf and isinstance(trainer.limit_train_batches, int):
        return bool((batch_idx + 1) % trainer.limit_train_batches == 0)
    index = batch_idx if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.epoch_loop.total_batch_idx
    return bool((index + 1) % interval == 0)


def _validates_in_epoch(trainer: Trainer) -> bool:
    """Whether validation may run in the present epoch at all."""
    every = trainer.check_val_every_n_epoch
    return every is None or (trainer.current_epoch + 1) % every == 0


def _is_once_an_epoch(trainer: Trainer) -> bool:
    """Whether the interval is the whole epoch, however many batches each step of it took."""
    return trainer.check_val_every_n_epoch is not None and trainer.val_check_batch == trainer.num_training_batches


def _end_unfinished_epoch(run: Run, unfinished: InterruptedPhase) -> None:
    """Do what was left to do at the end of the epoch when the checkpoint was saved."""
    epoch = run.trainer.fit_loop.epoch_progress
    for counter in (epoch.current, epoch.total):
        counter.completed -= 1
    _end_epoch(run, unfinished)
    epoch.increment_completed()


def _end_epoch(run: Run, unfinished: Optional[InterruptedPhase] = None) -> None:
    """Epoch-end hooks, values, schedulers."""
    trainer = run.trainer
    loop = trainer.fit_loop.epoch_loop
    trainer._merge(run.store.read(on_step=True))
    run.store.end_batches()
    if unfinished is None:
        run.call("on_train_epoch_end")
    else:
        trainer._resume.call_rest(run, "on_train_epoch_end", unfinished)
    if run.schedulers and run.module.automatic_optimization and loop.batch_progress.is_last_batch:
        step_schedulers(run, "epoch", plateau=True)
    metrics = trainer._merge(run.store.read(on_step=False))
    if metrics.logged:
        loop._batches_that_stepped -= 1
        send(trainer, metrics.logged)
        loop._batches_that_stepped += 1
    run.store.reset()


def _has_all_steps(trainer: Trainer) -> bool:
    """Whether training is done in any case."""
    return 0 <= trainer.max_steps <= trainer.global_step


def _may_stop(trainer: Trainer) -> bool:
    """Whether ``should_stop`` may be obeyed: the least numbers of epochs and steps are reached."""
    loop = trainer.fit_loop
    enough_epochs = not loop.min_epochs or loop.epoch_progress.current.processed >= loop.min_epochs
    enough_steps = not loop.min_steps or trainer.global_step >= loop.min_steps
    return bool(enough_epochs and enough_steps)


def _stops_in_epoch(run: Run) -> bool:
    trainer = run.trainer
    loop = trainer.fit_loop
    if 0 <= loop.max_steps <= trainer.global_step:
        return True
    return bool(run.flags.should_stop and _may_stop(trainer))


def _exchange(run: Run) -> None:
    """Let all ranks know here what each was told so far."""
    if run.agreement is not None:
        run.agreement.sync()


def is_done(run: Run) -> bool:
    """Whether a limit of training is reached, or a stop was asked for and may be obeyed; says which."""
    trainer = run.trainer
    loop = trainer.fit_loop
    if trainer.num_training_batches == 0:
        rank_zero_info("`Trainer.fit` stopped: No training batches.")
        return True
    if 0 <= loop.max_steps <= trainer.global_step:
        rank_zero_info(f"`Trainer.fit` stopped: `max_steps={loop.max_steps!r}` reached.")
        return True
    if loop.max_epochs is not None and 0 <= loop.max_epochs <= loop.epoch_progress.current.processed:
        rank_zero_info(f"`Trainer.fit` stopped: `max_epochs={loop.max_epochs!r}` reached.")
        return True
    if run.flags.should_stop:
        if _may_stop(trainer):
            rank_zero_debug("`Trainer.fit` stopped: `trainer.should_stop` was set.")
            return True
        _explain_minima_once(trainer)
    return False


def _explain_minima_once(trainer: Trainer) -> None:
    if not trainer._explained_minima:
        trainer._explained_minima = True
        rank_zero_info(
            f"Trainer was signaled to stop but the required `min_epochs={trainer.min_epochs!r}` or "
            f"`min_steps={trainer.min_steps!r}` has not been met. Training will continue..."
        )


def _warn_of_empty_batch() -> None:
    rank_zero_warn("train_dataloader yielded None. If this was on purpose, ignore this warning...")
