"""What happens when a call of the Trainer raises."""

from __future__ import annotations

from levin.loops.out_of_memory import annotate_out_of_memory
from levin.loops.run import Run
from levin.ranks.signals import save_for_restart
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.rank_zero import log
from levin.utilities.states import TrainerStatus

# How long values that were logged before an error may hold it up: a lost device never gives them.
UNSENT_TIMEOUT_S = 2.0


def fail(run: Run, error: BaseException, is_told: bool = False) -> None:
    """Tell everybody that the run failed, and leave nothing half done.

    Args:
        run: In the middle of a call.
        error: What it raised.
        is_told: Whether callbacks, loggers and strategy are told in another process, where the run is.
    """
    run.state.status = TrainerStatus.INTERRUPTED
    if is_told:
        run.state.stage = None
        return
    module = run.module
    annotate_out_of_memory(run, error)
    if run.watchdog is not None:
        run.watchdog.annotate_error(error)
    is_agreed = _is_agreed(run, error)
    if not is_agreed:
        # To wait now for the others, in order to save something, would be to wait for ever, and they for this rank.
        run.strategy.abandon_peers()
    _send_what_is_there(run)
    # A further signal is no reason to leave out what follows.
    run.signals.waits_for_batch = True
    if isinstance(error, SIGTERMException):
        # All ranks obey a signal together.
        try:
            save_for_restart(run)
        except Exception as failure:
            # The run ends for another reason, which everybody below is told.
            log.error(f"The checkpoint for the restart was not saved: {type(failure).__name__}: {failure}")
    try:
        for callback in run.callbacks:
            run.call_of(callback, "on_exception", run.trainer, module, error)
        if run.datamodule is not None:
            run.datamodule.on_exception(error)
    finally:
        run.strategy.on_exception(error)
        for logger in run.loggers:
            logger.finalize("failed")
        run.refuse_logs()
        if run.compiler is not None:
            run.compiler.end()
        if is_agreed:
            _leave_together(run)
        _free_device(run)
        run.stop_watchdog()
        run.profiler.teardown(run.fn)
        run.state.stage = None


def _send_what_is_there(run: Run) -> None:
    """Send what was logged before the error; the device may be lost, or wait for a rank that is."""
    try:
        run.unsent.send(UNSENT_TIMEOUT_S)
    except Exception as failure:
        # The run ends for another reason.
        log.error(f"The last logged values were not sent: {type(failure).__name__}: {failure}")


def _leave_together(run: Run) -> None:
    """Wait for the other ranks: whoever started the processes may end those that are left when the first one leaves."""
    try:
        run.strategy.barrier("fail")
    except RuntimeError as failure:
        # The run ends in any case.
        log.error(f"A rank left before the others: {failure}")


def _free_device(run: Run) -> None:
    try:
        run.strategy.teardown()
    except Exception as failure:
        # Whatever broke the run may have left what is half done behind; the user is told the first error, not this one.
        log.error(f"{type(run.strategy).__name__} could not be taken down: {type(failure).__name__}: {failure}")


def _is_agreed(run: Run, error: BaseException) -> bool:
    """Whether all ranks end at this moment, as they do for a signal once all know of it; other errors are of one rank."""
    agreement = run.agreement
    return isinstance(error, SIGTERMException) and agreement is not None and agreement.received_sigterm
