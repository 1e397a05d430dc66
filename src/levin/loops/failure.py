"""What happens when a call of the Trainer raises."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.loops.run import detach_log_store
from levin.utilities.exceptions import SIGTERMException
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
    trainer.strategy.explain(error)
    if not isinstance(error, SIGTERMException):
        # A signal is obeyed by all ranks together. An error may be that of this rank: to wait for the others now, in
        # order to save something, would be to wait for ever, and they for this one.
        trainer.strategy.stand_alone()
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
        trainer.strategy.teardown()
        trainer.profiler.teardown(str(trainer.state.fn))
        trainer.state.stage = None
