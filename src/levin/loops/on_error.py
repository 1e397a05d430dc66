"""What happens when a call of the Trainer raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.loops.run import detach_log_store
from levin.ranks.signals import save_for_restart
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.rank_zero import log
from levin.utilities.states import TrainerStatus
from levin.utilities.timing import call_timed

if TYPE_CHECKING:
    from levin.trainer import Trainer


def fail(trainer: Trainer, error: BaseException, is_told: bool = False) -> None:
    """Tell everybody that the run failed, and leave nothing half done.

    Args:
        trainer: In the middle of a call.
        error: What it raised.
        is_told: Whether callbacks, loggers and strategy are told in another process, where the run is.
    """
    trainer.state.status = TrainerStatus.INTERRUPTED
    if is_told:
        trainer.state.stage = None
        return
    module = trainer.lightning_module
    if trainer._watchdog is not None:
        trainer._watchdog.annotate_error(error)
    is_agreed = _is_agreed(trainer, error)
    if not is_agreed:
        # To wait now for the others, in order to save something, would be to wait for ever, and they for this rank.
        trainer.strategy.abandon_peers()
    # A further signal is no reason to leave out what follows.
    trainer._signals.waits_for_batch = True
    if isinstance(error, SIGTERMException):
        # All ranks obey a signal together.
        try:
            save_for_restart(trainer)
        except Exception as failure:
            # The run ends for another reason, which everybody below is told.
            log.error(f"The checkpoint for the restart was not saved: {type(failure).__name__}: {failure}")
    try:
        for callback in trainer.callbacks:
            call_timed(trainer, "Callback", callback, "on_exception", trainer, module, error)
        if trainer.datamodule is not None:
            trainer.datamodule.on_exception(error)
    finally:
        trainer.strategy.on_exception(error)
        for logger in trainer.loggers:
            logger.finalize("failed")
        detach_log_store(module)
        if is_agreed:
            _leave_together(trainer)
        trainer.strategy.teardown()
        stop_watchdog(trainer)
        trainer.profiler.teardown(str(trainer.state.fn))
        trainer.state.stage = None


def stop_watchdog(trainer: Trainer) -> None:
    """Watch over the other processes no more; those that still wait are told that this one has left."""
    watchdog, trainer._watchdog = trainer._watchdog, None
    if watchdog is not None:
        watchdog.stop(has_left=True)


def _leave_together(trainer: Trainer) -> None:
    """Wait for the other ranks: whoever started the processes may end those that are left when the first one leaves."""
    try:
        trainer.strategy.barrier("fail")
    except RuntimeError as failure:
        # The run ends in any case.
        log.error(f"A rank left before the others: {failure}")


def _is_agreed(trainer: Trainer, error: BaseException) -> bool:
    """Whether all ranks end at this moment, as they do for a signal once all know of it; other errors are of one rank."""
    agreement = None if trainer._run is None else trainer._run.agreement
    return isinstance(error, SIGTERMException) and agreement is not None and agreement.received_sigterm
