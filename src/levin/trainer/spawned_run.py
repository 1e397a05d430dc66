"""Runs in processes that the launcher starts: what happens there, and what comes back from rank 0."""

from __future__ import annotations

from typing import Any, Optional

from levin.loops import run_call
from levin.loops.hook_table import has_hook
from levin.loops.on_error import fail
from levin.loops.run import Run
from levin.ranks.signals import as_ended, signal_handlers
from levin.utilities.types import StateDict


def run_sequence(run: Run, weights_only: Optional[bool]) -> object:
    """Run :func:`levin.loops.run_call.run_sequence`, and tell callbacks and loggers here, where the run is, when it fails."""
    # A pickled module leaves its Trainer behind.
    run.module.trainer = run.trainer
    if run.datamodule is not None:
        run.datamodule.trainer = run.trainer
    with signal_handlers(run):
        try:
            return run_call.run_sequence(run, weights_only)
        except BaseException as error:
            ended = as_ended(run, error)
            fail(run, ended)
            if ended is error:
                raise
            raise ended from error


def collect_results(run: Run) -> StateDict:
    """Return what the waiting process shall know: weights, callbacks, metrics, counters and flags."""
    return {
        "weights": run.strategy.lightning_module_state_dict(),
        "callbacks": [callback.state_dict() for callback in run.callbacks],
        "metrics": run.metrics,
        "should_stop": run.told.should_stop,
        "loops": run.loops,
    }


def restore_results(run: Run, results: dict[str, Any]) -> None:
    """Take up :func:`collect_results`."""
    module, weights = run.module, results["weights"]
    if has_hook(module, "configure_model") and module.state_dict().keys() != weights.keys():
        # The layers were made in the other process only.
        module.configure_model()
    module.load_state_dict(weights)
    for callback, state in zip(run.callbacks, results["callbacks"]):
        if not state:
            continue
        if "dirpath" in state:
            # Known only once a run has begun, which it has not here.
            vars(callback)["dirpath"] = state["dirpath"]
        callback.load_state_dict(state)
    run.metrics = results["metrics"]
    run.told.should_stop = results["should_stop"]
    vars(run.loops).update(vars(results["loops"]))
