"""What extensions read of a Trainer under Lightning's private names, shown from where it is in levin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

from levin.callbacks.defaults import reorder
from levin.checkpoint.migrate import migrate
from levin.hooks import Callback
from levin.resume import checkpoint_tree as tree
from levin.utilities.states import RunningStage, TrainerFn
from levin.utilities.types import PathLike, StateDict


def evaluation_loop(trainer: Any) -> Any:
    """Return the loop that evaluates in the call under way (lightning-ir).

    Raises:
        RuntimeError: None of the present method does.
    """
    loops = {
        TrainerFn.FITTING: trainer.fit_loop.epoch_loop.val_loop,
        TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop,
    }
    if trainer.state.fn not in loops:
        raise RuntimeError(
            f"Only fit, validate and test have a loop that evaluates, received the method {trainer.state.fn}."
        )
    return loops[trainer.state.fn]


def active_loop(trainer: Any) -> Any:
    """Return the loop under way, None between calls (otx)."""
    stage = trainer.state.stage
    if stage in (RunningStage.TRAINING, RunningStage.PREDICTING):
        return trainer.fit_loop if stage == RunningStage.TRAINING else trainer.predict_loop
    return None if stage is None else evaluation_loop(trainer)


class _CheckpointConnector:
    """Reads a checkpoint into a run that is under way, part by part (finetuning-scheduler).

    Args:
        trainer: The Trainer, which runs.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._loaded_checkpoint: StateDict = {}

    def resume_start(self, checkpoint_path: Optional[PathLike] = None, weights_only: Optional[bool] = None) -> None:
        """Read a file, if there is one to read."""
        path = checkpoint_path or self.trainer.ckpt_path
        if path:
            loaded = self.trainer.strategy.load_checkpoint(path, weights_only=weights_only)
            self._loaded_checkpoint = migrate(loaded, source=path)

    def _restore(self, part: Callable[[Any, StateDict], None]) -> None:
        if self._loaded_checkpoint:
            part(self.trainer.run, self._loaded_checkpoint)

    def restore_datamodule(self) -> None:
        """Give the data module its state."""
        self._restore(tree.restore_datamodule)

    def restore_model(self) -> None:
        """Give the module its weights."""
        self._restore(tree.restore_weights)

    def restore_callbacks(self) -> None:
        """Give the callbacks their states."""
        self._restore(tree.restore_callbacks)

    def restore_precision_plugin_state(self) -> None:
        """Give the precision, such as a gradient scaler, its state."""
        self._restore(tree.restore_precision)

    def restore_optimizers_and_schedulers(self) -> None:
        """Give optimizers and schedulers their states."""
        self._restore(tree.restore_optimizers)

    def resume_end(self) -> None:
        """Let go of what was read, once all processes have done so."""
        self._loaded_checkpoint = {}
        self.trainer.strategy.barrier("_CheckpointConnector.resume_end")


class _CallbackConnector:
    """Puts callbacks into the order in which they are called (finetuning-scheduler).

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    @staticmethod
    def _reorder_callbacks(callbacks: list[Callback]) -> list[Callback]:
        return reorder(callbacks)
