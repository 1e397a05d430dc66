"""Going on exactly where a run stopped: what a checkpoint holds for that beyond Lightning's keys, and its way back.

Between two batches the counters say where a run is. A checkpoint that was saved by a hook is saved in the middle of
something, which is finished before anything else: the other hooks of that moment, logging, validation, schedulers.
A validation that was under way is begun again, from the random states and the place in its data that it began with.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor
from torch.nn import Parameter

from levin.log_store import LogStore
from levin.resume import checkpoint_tree as tree
from levin.resume.metric_states import collect_metric_states, load_metric_states
from levin.resume.optimizer_groups import groups_by_name
from levin.resume.position import Position
from levin.utilities.collections import apply_to_collection
from levin.utilities.move import move_data_to_device
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.rng_states import DEVICES, PROCESS, ProcessRng
from levin.utilities.states import TrainerFn
from levin.utilities.types import Batch, StateDict

if TYPE_CHECKING:
    from levin.data.feed import Feed
    from levin.protocols import Run, StageLoaders


# What loads without running code, beside tensors and collections.
_SCALARS = (bool, int, float, complex, str, bytes, type(None))


class Phase(IntEnum):
    """Where in the work after a batch a run is, in the order of that work."""

    BATCH_END = 0
    VALIDATION = 1
    VALIDATION_END = 2
    EPOCH_END = 3


_PHASE_OF_HOOK = {
    "on_train_batch_end": Phase.BATCH_END,
    "on_validation_end": Phase.VALIDATION_END,
    "on_train_epoch_end": Phase.EPOCH_END,
}


@dataclass
class InterruptedPhase:
    """What a checkpoint was saved in the middle of.

    Args:
        phase: Where.
        num_hooks: How many hooks of that phase were not called yet.
        arguments: The outputs and the batch that they get, for ``on_train_batch_end``; None if they could not be saved.
    """

    phase: Phase
    num_hooks: int = 0
    arguments: Optional[tuple[object, object]] = None


def _last_logged(loggers: list[Any]) -> list[Optional[tuple[float, int]]]:
    """Return how far each logger is; None for those that do not count, and for those that only stand in for one."""
    found = [logger.last_logged() if hasattr(logger, "last_logged") else None for logger in loggers]
    return [last if isinstance(last, tuple) else None for last in found]


class ResumeState:
    """Where training is: in the data, in the accumulation window, in the running sums of logged values and metrics."""

    def __init__(self) -> None:
        self.position = Position()
        self.val_positions: list[Position] = []
        self._feed: Optional[Feed] = None
        self._step: Any = None
        self._has_warned_of_kept: bool = False
        self._store: Optional[LogStore] = None
        self._loaded: Optional[StateDict] = None
        self._unfinished: Optional[InterruptedPhase] = None
        # What a validation that is under way began with.
        self._validation: Optional[StateDict] = None
        self._rng = ProcessRng()
        # Where the validation data were, until validation begins.
        self._loaded_validation: Optional[StateDict] = None
        self._loaded_callbacks: StateDict = {}
        self._loaded_store: Optional[list[StateDict]] = None

    # ---------------------------------------------------------------- saving

    def state_dict(self, run: Run) -> StateDict:
        """Return what :meth:`follow` needs after a restart; empty outside fit."""
        step = self._step
        if run.state.fn != TrainerFn.FITTING or step is None:
            return {}
        state: StateDict = {
            "window": step.state_dict(),
            "log_store": self._store.state_dict() if self._store is not None else [],
            "data": self.position.state_dict(self._num_done(run)),
            "metrics": collect_metric_states(run.module),
            "reduced_metrics": tuple(dict(values) for values in run.metrics),
            "loaded_epoch": run.loaders.train.loaded_epoch,
            "eval_log_steps": dict(run.eval_log_steps),
            "last_logged": _last_logged(run.loggers),
            "validation_data": self._validation_data(run),
            "checkpoint_callbacks": {
                callback.state_key: kept for callback in run.checkpoint_callbacks if (kept := callback.run_state())
            },
        }
        groups = groups_by_name(run.optimizers, run.module)
        state["optimizer_groups"] = (run.configured_groups if groups != run.configured_groups else groups, groups)
        unfinished = self._find_unfinished(run)
        if unfinished is not None:
            state["unfinished"] = {**vars(unfinished), "phase": int(unfinished.phase)}
            if unfinished.phase == Phase.VALIDATION_END:
                # Their values are known, and nothing else will reset them for the next validation.
                over = [slot.metric for slot in run.store.slots()]
                state["metrics"] = collect_metric_states(run.module, without=over)
            if unfinished.phase == Phase.VALIDATION:
                state.update(self._validation or {})
        return state

    def _num_done(self, run: Run) -> int:
        """Return how many batches of the epoch are done with."""
        counter, feed = run.loops.fit.epoch_loop.batch_progress.current, self._feed
        if feed is None or not feed.is_on_demand:
            return counter.processed
        if feed.is_ahead and not feed.is_last and not self._has_warned_of_kept:
            self._has_warned_of_kept = True
            rank_zero_warn(
                f"The first step took {feed.first_take} batches from `dataloader_iter`, and each of the others "
                f"{feed.later_takes}, as steps do that fetch ahead. A checkpoint in the middle of an epoch does not hold "
                "the batches that a module keeps: the run that goes on from it leaves them out. Save them in "
                "`on_save_checkpoint`, or let the loader fetch ahead (`num_workers`, `prefetch_factor`)."
            )
        # A step takes as many batches as it likes.
        return feed.num_taken if counter.processed == counter.ready else feed.step_start

    def _find_unfinished(self, run: Run) -> Optional[InterruptedPhase]:
        """Return what the run is in the middle of, None between two batches."""
        name, iterator, arguments = run.under_way
        phase = _PHASE_OF_HOOK.get(name)
        if self._validation is not None and phase != Phase.VALIDATION_END:
            return InterruptedPhase(Phase.VALIDATION)
        if phase is None:
            return None
        num_hooks = iterator.__length_hint__()
        if phase != Phase.BATCH_END or not num_hooks:
            return InterruptedPhase(phase, num_hooks)
        outputs, batch, _ = arguments
        kept = (copied(outputs), copied(batch)) if is_plain((outputs, batch)) else None
        return InterruptedPhase(phase, num_hooks, kept)

    def begin_validation(self, run: Run) -> None:
        """Keep what it takes to begin this validation again."""
        progress = run.loops.fit.epoch_loop.val_loop.batch_progress
        self._validation = {
            "validation_rng": self._rng.read(PROCESS + DEVICES),
            "metrics": copied(collect_metric_states(run.module)),
            "eval_log_steps": dict(run.eval_log_steps),
            "last_logged": _last_logged(run.loggers),
            "val_total": [getattr(progress.total, name) for name in progress.total.__slots__],
            "validation_data": self._validation_data(run),
        }

    def _validation_data(self, run: Run) -> dict[str, object]:
        """Return when the validation loaders were loaded, and the place in each."""
        return self._loaded_validation or {
            "loaded_epoch": run.loaders.val.loaded_epoch,
            "positions": [position.state_dict() for position in self.val_positions],
        }

    def end_validation(self) -> None:
        """The validation is over."""
        for position in self.val_positions:
            position.finish()
        self._validation = None

    # ---------------------------------------------------------------- going on

    def settle_counters(self, run: Run, exact: Optional[dict[str, Any]]) -> None:
        """Turn what was being counted when the file was saved into where to go on.

        Args:
            run: With the counters of the file.
            exact: What :meth:`state_dict` returned then; None for a file of another framework.
        """
        loop = run.loops.fit
        epoch, batch = loop.epoch_progress, loop.epoch_loop.batch_progress
        for counter in (epoch.current, epoch.total):
            if counter.processed > counter.completed:
                counter.completed = counter.processed
        mid_epoch = epoch.current.started > epoch.current.processed and batch.current.processed > 0
        loop.restarted_mid_epoch = mid_epoch
        if exact is not None and "unfinished" in exact:
            self._unfinished = InterruptedPhase(**{**exact["unfinished"], "phase": Phase(exact["unfinished"]["phase"])})
        else:
            self._unfinished = self._guess_unfinished(run) if mid_epoch else None
        if mid_epoch:
            if batch.current.ready > batch.current.processed:
                batch.is_last_batch = False  # said of a batch that is still to be trained on
            is_counted = self._unfinished is None or self._unfinished.phase != Phase.BATCH_END
            for counter in (batch.current, batch.total):
                counter.ready = counter.started = counter.processed
                counter.completed = counter.processed - (not is_counted)
        else:
            epoch.current.ready = epoch.current.started = epoch.current.processed
            ends_epoch = self._unfinished is not None and self._unfinished.phase == Phase.EPOCH_END
            if batch.current.ready and not ends_epoch:
                batch.reset()

    @staticmethod
    def _guess_unfinished(run: Run) -> Optional[InterruptedPhase]:
        """Return what the counters alone tell."""
        loop = run.loops.fit.epoch_loop
        batch, validation = loop.batch_progress, loop.val_loop.batch_progress
        if batch.current.processed > batch.current.completed:
            return InterruptedPhase(Phase.BATCH_END)
        is_complete = validation.is_last_batch and validation.current.completed == validation.current.ready
        return InterruptedPhase(Phase.VALIDATION) if validation.current.started > 0 and not is_complete else None

    def follow(self, run: Run, feed: Feed, step: Any, exact: Optional[dict[str, Any]]) -> None:
        """Follow the data from here on, and go on where ``exact`` was collected."""
        self._store = run.store
        self.position = Position()
        self._feed, self._step = feed, step
        feed.track([self.position])
        self._loaded = None
        self._validation = None
        if exact is None:
            return
        self.position.load_state_dict(exact.get("data", {}))
        is_mid_epoch = run.loops.fit.restarted_mid_epoch
        if not is_mid_epoch and not _has_only_begun(exact.get("data", {})):
            self.position.finish()
        if "window" in exact:
            self._loaded = exact if is_mid_epoch else None
            step.load_state_dict(exact["window"])
            if is_mid_epoch or self._unfinished is not None:
                self._loaded_store = exact.get("log_store", [])
            load_metric_states(run.module, exact.get("metrics", {}))
            device = run.strategy.root_device
            for values, saved in zip(run.metrics, exact.get("reduced_metrics", ())):
                values.update(move_data_to_device(saved, device))
        if "validation_data" in exact:
            run.loaders.train.loaded_epoch = exact["loaded_epoch"]
            run.eval_log_steps.update(exact["eval_log_steps"])
            self._loaded_validation = exact["validation_data"]
            if run.loaders.val.combined is not None:
                run.loaders.val.loaded_epoch = exact["validation_data"]["loaded_epoch"]
        self._loaded_callbacks = exact.get("checkpoint_callbacks", {})
        if "val_total" in exact:
            total = run.loops.fit.epoch_loop.val_loop.batch_progress.total
            for name, value in zip(total.__slots__, exact["val_total"]):
                setattr(total, name, value)
        tree.restore_rng(exact)
        self._rng.write(exact.get("validation_rng", {}))

    def restore_after_start(self, run: Run) -> None:
        """Restore what ``on_train_start``, which is called after a restart too, would change."""
        if self._loaded_store is not None:
            run.store.load_state_dict(self._loaded_store)
        self._loaded_store = None
        for callback in run.checkpoint_callbacks:
            if (state := self._loaded_callbacks.get(callback.state_key)) is not None:
                callback.load_run_state(state)
        self._loaded_callbacks = {}

    def take_unfinished(self, *phases: Phase) -> Optional[InterruptedPhase]:
        """Return what the checkpoint was saved in the middle of, once, if it is one of ``phases``."""
        unfinished = self._unfinished
        if unfinished is None or unfinished.phase not in phases:
            return None
        self._unfinished = None
        return unfinished

    def call_rest(self, run: Run, name: str, unfinished: InterruptedPhase, batch_idx: int = 0) -> None:
        """Call those hooks ``name`` that were not called yet when the checkpoint was saved."""
        if not unfinished.num_hooks:
            return
        arguments: tuple[object, ...] = ()
        if name == "on_train_batch_end":
            if unfinished.arguments is None:
                rank_zero_warn(
                    "The checkpoint was saved in `on_train_batch_end`, before some of these hooks were called, and their "
                    "batch holds more than tensors and plain values and was not saved: they are not called for it."
                )
                return
            outputs, batch = move_data_to_device(unfinished.arguments, run.strategy.root_device)
            run.store.start_batch(batch)
            arguments = (outputs, batch, batch_idx)
        run.call(name, *arguments, num_last=unfinished.num_hooks)

    def batches(self, feed: Feed, start: int) -> Generator[Batch, None, None]:
        """Return the batches of the epoch from index ``start`` on."""
        loaded, self._loaded = self._loaded, None
        if start and (loaded is None or "data" not in loaded):
            rank_zero_warn(
                "The checkpoint was saved in the middle of an epoch without the position in the data: "
                f"the loader starts again, from batch {start} on."
            )
        elif start and feed.is_on_demand and loaded is not None:
            # The number of steps does not say how many batches they took.
            start = feed.num_taken = loaded["data"]["num_done"]
        return feed.iterate(start)

    def follow_reloaded(self) -> None:
        """The training loaders were made anew: what was known of those before does not count for them."""
        self.position.load_state_dict({})

    def follow_validation(self, feed: Feed, loaders: StageLoaders, is_new: bool, is_due: bool) -> None:
        """Follow the validation data.

        Args:
            feed: The feed of the validation that begins.
            loaders: Its loaders.
            is_new: Whether they were made for this validation.
            is_due: Whether they would have been made for it in any case, not only after a restart.
        """
        loaded, self._loaded_validation = self._loaded_validation, None
        if is_new or len(self.val_positions) != len(feed.sources):
            self.val_positions = [Position() for _ in feed.sources]
        if loaded is not None and not is_due:
            loaders.loaded_epoch = loaded["loaded_epoch"]
            for position, state in zip(self.val_positions, loaded["positions"]):
                position.load_state_dict(state)
                position.finish()
        feed.track(self.val_positions)

    def is_validation_due_to_load(self, every_n_epochs: int, epoch: int) -> bool:
        """Whether the unbroken run, too, would make its validation loaders now."""
        loaded = self._loaded_validation
        if loaded is None:
            return True
        was_loaded = loaded["loaded_epoch"] >= 0
        return not was_loaded or bool(every_n_epochs and epoch - loaded["loaded_epoch"] >= every_n_epochs)


def _has_only_begun(data: dict[str, object]) -> bool:
    """Whether the loader had begun its epoch, and so had drawn its order, when no batch was done with yet."""
    is_open = not data.get("is_finished", True) and not data["is_ended"]
    return is_open and data["kind"] == "index" and not data["num_done"]


def is_plain(value: Any) -> bool:
    """Return whether ``value`` is made of tensors and plain values only.

    Example:
        >>> is_plain({"x": [1, 2.0, "a"]}), is_plain(object())
        (True, False)
    """
    kind = type(value)
    if kind in _SCALARS or kind in (Tensor, Parameter):
        return True
    if kind in (list, tuple):
        return all(is_plain(item) for item in value)
    if kind in (dict, OrderedDict):
        return all(type(key) in _SCALARS and is_plain(item) for key, item in value.items())
    return False


def copied(value: object) -> object:
    """Return ``value`` with a detached copy of each tensor in it, on its own device."""
    return apply_to_collection(value, Tensor, lambda tensor: tensor.detach().clone())
