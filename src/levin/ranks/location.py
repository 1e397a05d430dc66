"""Where a run is, for people and for the other processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.ranks.hang_watchdog import RunLocation

if TYPE_CHECKING:
    from levin.trainer import Trainer


def locate(trainer: Trainer) -> RunLocation:
    """Return the batches done in the present call, and where it is in words. May run in any thread: it only reads.

    Example:
        >>> from levin import Trainer
        >>> locate(Trainer(logger=False, enable_checkpointing=False))
        RunLocation(num_batches=0, text='set-up')
    """
    run, stage = trainer._run, trainer.state.stage
    if run is None or stage is None:
        return RunLocation(0, "set-up" if run is None else "the end of the run")
    training = trainer.fit_loop.epoch_loop
    loops = {"validate": trainer.validate_loop, "test": trainer.test_loop, "predict": trainer.predict_loop}
    loop = loops.get(str(trainer.state.fn), training.val_loop)
    num_batches = (
        training.batch_progress.total.completed
        if str(trainer.state.fn) == "fit"
        else loop.batch_progress.total.completed
    )
    hook = run.store.hook
    where = f"{hook} of " if hook else ""
    if str(stage) == "train":
        batch = max(training.batch_idx, 0)
        return RunLocation(
            num_batches, f"{where}training batch {batch}, epoch {trainer.current_epoch}, step {trainer.global_step}"
        )
    batch = max(loop.batch_progress.current.ready - 1, 0)
    step = f", step {trainer.global_step}" if str(trainer.state.fn) == "fit" else ""
    return RunLocation(num_batches, f"{where}{stage} batch {batch}{step}")
