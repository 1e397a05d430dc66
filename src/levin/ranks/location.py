"""Where a run is, for people and for the other processes."""

from __future__ import annotations

from levin.protocols import Run
from levin.ranks.hang_watchdog import RunLocation


def locate(run: Run) -> RunLocation:
    """Return the batches done in the present call, and where it is in words. May run in any thread: it only reads."""
    stage, fits = run.state.stage, run.fn == "fit"
    if stage is None:
        return RunLocation(0, "the end of the run")
    training = run.loops.fit.epoch_loop
    loops = {"validate": run.loops.validate, "test": run.loops.test, "predict": run.loops.predict}
    loop = loops.get(run.fn, training.val_loop)
    num_batches = (training if fits else loop).batch_progress.total.completed
    where_step = f"step {training.global_step}"
    hook = run.store.hook
    where = f"{hook} of " if hook else ""
    if str(stage) == "train":
        batch = max(training.batch_idx, 0)
        return RunLocation(num_batches, f"{where}training batch {batch}, epoch {run.current_epoch}, {where_step}")
    batch = max(loop.batch_progress.current.ready - 1, 0)
    step = f", {where_step}" if fits else ""
    return RunLocation(num_batches, f"{where}{stage} batch {batch}{step}")
