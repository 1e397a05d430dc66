"""Set-up without a batch: what composes the run that is explained, and takes it apart again."""

from __future__ import annotations

from levin.explain.text import Explanation, explain
from levin.loops import run_call
from levin.loops.dataloaders import limit_of, load, load_training, load_validation, loaders_of
from levin.loops.run import Run
from levin.utilities.seed import isolate_rng


def explain_sequence(run: Run, weights_only: object = None) -> Explanation:
    """Set the run up as the method of the Trainer does, say what it would do, and tear it down.

    The user's hooks of set-up run, and the loaders are asked for; no batch is drawn, nothing is logged or saved.

    Args:
        run: As it was given; with counters of its own.
        weights_only: As launchers pass it to every sequence; there is no checkpoint to read.
    """
    run.module.trainer = run.trainer  # a pickled module leaves it behind
    if run.datamodule is not None:
        run.datamodule.trainer = run.trainer
    with isolate_rng():
        try:
            run_call.connect(run)
            run_call.prepare_data(run)
            run_call.set_up_owners(run)
            run_call.attach(run)
            if run.fn != "fit":
                if limit := limit_of(run, run.fn):
                    load(run, loaders_of(run, run.fn), limit)
            else:
                load_training(run)
                if run.enable_validation:
                    load_validation(run)
            return explain(run)
        finally:
            run.refuse_logs()
            run.strategy.teardown()
            run.stop_watchdog()
            for owner in (run.datamodule, run.module):
                if owner is not None:
                    run.call_of(owner, "teardown", stage=run.fn)
            run.loaders.close()
