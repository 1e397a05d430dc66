"""Going on exactly where a run stopped: what a checkpoint holds for that beyond Lightning's keys, and its way back."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Optional

from levin.checkpoint import state as tree
from levin.checkpoint.metric_states import collect_metric_states, load_metric_states
from levin.data.position import Position
from levin.log_store import LogStore
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import TrainerFn

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.loops.run import Run
    from levin.trainer import Trainer


class Exact:
    """Where training is: in the data, in the accumulation window, in the running sums of logged values and metrics."""

    def __init__(self) -> None:
        self.position = Position()
        self._store: Optional[LogStore] = None
        self._loaded: Optional[dict[str, Any]] = None
        self._batch_is_unfinished: bool = False
        self._validation_is_unfinished: bool = False

    def state_dict(self, trainer: Trainer) -> dict[str, Any]:
        """Return what :meth:`follow` needs after a restart; empty outside fit."""
        run, step = trainer._run, trainer._step
        if run is None or trainer.state.fn != TrainerFn.FITTING or step is None:
            return {}
        return {
            "window": step.state_dict(),
            "log_store": self._store.state_dict() if self._store is not None else [],
            "data": self.position.state_dict(trainer.fit_loop.epoch_loop.batch_progress.current.processed),
            "metrics": collect_metric_states(run.module),
            "callback_metrics": dict(trainer._metrics.callback),
        }

    def settle_counters(self, trainer: Trainer) -> None:
        """Turn what was being counted when the file was saved into where to go on."""
        loop = trainer.fit_loop
        epoch, batch = loop.epoch_progress, loop.epoch_loop.batch_progress
        for counter in (epoch.current, epoch.total):
            if counter.processed > counter.completed:
                counter.completed = counter.processed
        mid_epoch = epoch.current.started > epoch.current.processed and batch.current.processed > 0
        loop.restarted_mid_epoch = mid_epoch
        self._batch_is_unfinished = mid_epoch and batch.current.processed > batch.current.completed
        validation = loop.epoch_loop.val_loop.batch_progress
        if mid_epoch and not self._batch_is_unfinished:
            was_validating = validation.current.started > 0 and not (
                validation.is_last_batch and validation.current.completed == validation.current.ready
            )
            self._validation_is_unfinished = was_validating
        if mid_epoch:
            for counter in (batch.current, batch.total):
                counter.ready = counter.started = counter.processed
                counter.completed = counter.processed
        else:
            epoch.current.ready = epoch.current.started = epoch.current.processed
            if batch.current.ready:
                batch.reset()

    def follow(self, run: Run, feed: Feed, step: Any, exact: Optional[dict[str, Any]]) -> None:
        """Follow the data from here on, and go on where ``exact`` was collected."""
        trainer = run.trainer
        self._store = run.store
        self.position = Position()
        feed.track(self.position)
        self._loaded = None
        if exact is None:
            return
        self.position.load_state_dict(exact.get("data", {}))
        if not trainer.fit_loop.restarted_mid_epoch:
            self.position.finish()
        if trainer.fit_loop.restarted_mid_epoch and "window" in exact:
            self._loaded = exact
            step.load_state_dict(exact["window"])
            run.store.load_state_dict(exact.get("log_store", []))
            load_metric_states(run.module, exact.get("metrics", {}))
            trainer._metrics.callback.update(exact.get("callback_metrics", {}))
        tree.restore_rng(exact)

    def take_unfinished_batch(self) -> bool:
        """Whether the batch that the checkpoint was saved in still has its validation and logging to do."""
        is_unfinished = self._batch_is_unfinished or self._validation_is_unfinished
        self._batch_is_unfinished = self._validation_is_unfinished = False
        return is_unfinished

    def batches(self, feed: Feed, start: int) -> Generator[Any, None, None]:
        """Return the batches of the epoch from index ``start`` on."""
        loaded, self._loaded = self._loaded, None
        if start and (loaded is None or "data" not in loaded):
            rank_zero_warn(
                "The checkpoint was saved in the middle of an epoch without the position in the data: "
                f"the loader starts again, from batch {start} on."
            )
        return feed.iterate(start)
