"""Runs in processes that the launcher starts: what happens there, and what comes back from rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

from levin.hooks import has_hook
from levin.loops import run_call
from levin.loops.on_error import fail
from levin.ranks.signals import as_ended, signal_handlers

if TYPE_CHECKING:
    from levin.trainer import Trainer

_LOOPS = ("fit_loop", "validate_loop", "test_loop", "predict_loop")


def run_sequence(trainer: Trainer, ckpt_path: Any, weights_only: Optional[bool]) -> Any:
    """Run :func:`levin.loops.run_call.run_sequence`, and tell callbacks and loggers here, where the run is, when it fails."""
    # A pickled module leaves its Trainer behind.
    trainer.lightning_module.trainer = trainer
    if trainer.datamodule is not None:
        trainer.datamodule.trainer = trainer
    with signal_handlers(trainer):
        try:
            return run_call.run_sequence(trainer, ckpt_path, weights_only)
        except BaseException as error:
            ended = as_ended(trainer, error)
            fail(trainer, ended)
            if ended is error:
                raise
            raise ended from error


def collect_results(trainer: Trainer) -> dict[str, Any]:
    """Return what the Trainer in the waiting process shall know: weights, callbacks, metrics and counters."""
    return {
        "weights": trainer.strategy.lightning_module_state_dict(),
        "callbacks": [callback.state_dict() for callback in trainer.callbacks],
        "metrics": trainer._metrics,
        "should_stop": trainer.should_stop,
        **{name: getattr(trainer, name) for name in _LOOPS},
    }


def restore_results(trainer: Trainer, results: dict[str, Any]) -> None:
    """Take up :func:`collect_results`."""
    module = trainer.lightning_module
    weights = results["weights"]
    if has_hook(module, "configure_model") and module.state_dict().keys() != weights.keys():
        # The layers were made in the other process only.
        module.configure_model()
    module.load_state_dict(weights)
    for callback, state in zip(trainer.callbacks, results["callbacks"]):
        if not state:
            continue
        if "dirpath" in state:
            # Known only once a run has begun, which it has not here.
            callback.dirpath = state["dirpath"]  # type: ignore[attr-defined]  # of those that save files
        callback.load_state_dict(state)
    trainer._metrics = results["metrics"]
    trainer.should_stop = results["should_stop"]
    for name in _LOOPS:
        setattr(trainer, name, results[name])
