"""The hooks: their names and signatures. What a run makes of them is in loops/hook_table.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.modes import to_eval
from levin.utilities.move import move_data_to_device
from levin.utilities.parameters import free_gradients

if TYPE_CHECKING:
    from levin.utilities.types import EVAL_DATALOADERS, STEP_OUTPUT, TRAIN_DATALOADERS, Batch, StateDict

# Users override hooks with annotations of their own, which may be any class of theirs: these take all of them. Both
# classes stand above this file; what levin's own callbacks see of a Trainer is written down in protocols.py.
Trainer = Any
LightningModule = Any


class ModelHooks:
    """What a LightningModule may override around its steps. Nothing here does anything by default."""

    def on_fit_start(self) -> None:
        """At the very start of fit, with the module on its device."""

    def on_fit_end(self) -> None:
        """At the very end of fit."""

    def on_train_start(self) -> None:
        """Before the first epoch, after the sanity check."""

    def on_train_end(self) -> None:
        """After the last epoch."""

    def on_train_epoch_start(self) -> None:
        """Before the first batch of an epoch."""

    def on_train_epoch_end(self) -> None:
        """After the last batch of an epoch and its validation."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> Optional[int]:
        """Before ``training_step``; returning -1 ends the epoch."""

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """After the optimizer step of a batch."""

    def on_validation_start(self) -> None:
        """Before the first validation batch."""

    def on_validation_end(self) -> None:
        """After validation, its values logged."""

    def on_validation_epoch_start(self) -> None:
        """Before the first validation batch, after on_validation_start."""

    def on_validation_epoch_end(self) -> None:
        """After the last validation batch, before its epoch values are computed."""

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before ``validation_step``."""

    def on_validation_batch_end(
        self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """After ``validation_step``; ``outputs`` is what it returned."""

    def on_test_start(self) -> None:
        """Before the first test batch."""

    def on_test_end(self) -> None:
        """After the test, its values logged."""

    def on_test_epoch_start(self) -> None:
        """Before the first test batch, after on_test_start."""

    def on_test_epoch_end(self) -> None:
        """After the last test batch, before its epoch values are computed."""

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before ``test_step``."""

    def on_test_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After ``test_step``; ``outputs`` is what it returned."""

    def on_predict_start(self) -> None:
        """Before the first prediction."""

    def on_predict_end(self) -> None:
        """After the last prediction."""

    def on_predict_epoch_start(self) -> None:
        """Before the first prediction, after on_predict_start."""

    def on_predict_epoch_end(self) -> None:
        """After the last prediction."""

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Before ``predict_step``."""

    def on_predict_batch_end(self, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """After ``predict_step``; ``outputs`` is what it returned."""

    def on_validation_model_zero_grad(self) -> None:
        """Before validation inside fit: frees the gradients."""
        _zero_grad(self)

    def on_validation_model_eval(self) -> None:
        """Put the module into eval mode for validation."""
        _eval(self)

    def on_validation_model_train(self) -> None:
        """Put the module back after validation. When not overridden, each submodule gets its own mode back."""
        _train(self)

    def on_test_model_eval(self) -> None:
        """Put the module into eval mode for the test."""
        _eval(self)

    def on_test_model_train(self) -> None:
        """Put the module back after the test. When not overridden, each submodule gets its own mode back."""
        _train(self)

    def on_predict_model_eval(self) -> None:
        """Put the module into eval mode for predictions."""
        _eval(self)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the gradients are zeroed."""

    def on_before_backward(self, loss: torch.Tensor) -> None:
        """Before ``loss.backward()``; ``loss`` is divided by the accumulation window and scaled for 16-mixed."""

    def on_after_backward(self) -> None:
        """After ``loss.backward()``."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the parameters are updated, gradients unscaled and not yet clipped."""

    def configure_model(self) -> None:
        """Create layers on the right device and in the right dtype; called at each run, so make it idempotent."""


def _zero_grad(module: Any) -> None:
    free_gradients(module)


def _eval(module: Any) -> None:
    to_eval(module)


def _train(module: Any) -> None:
    module.train()


class DataHooks:
    """What a LightningModule or a LightningDataModule may override about data."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare_data_per_node: bool = True
        self.allow_zero_length_dataloader_with_multiple_devices: bool = False

    def prepare_data(self) -> None:
        """Download or write data. Runs in one process per node, so set no state here."""

    def setup(self, stage: str) -> None:
        """Build data sets or layers on every process; ``stage`` is fit, validate, test or predict."""

    def teardown(self, stage: str) -> None:
        """Undo :meth:`setup` at the end of a successful run."""

    def train_dataloader(self) -> TRAIN_DATALOADERS:
        """Return the loader, or a collection of loaders, for training."""
        raise _missing_loader("train_dataloader")

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return the loader, or a collection of loaders, for validation."""
        raise _missing_loader("val_dataloader")

    def test_dataloader(self) -> EVAL_DATALOADERS:
        """Return the loader, or a collection of loaders, for the test."""
        raise _missing_loader("test_dataloader")

    def predict_dataloader(self) -> EVAL_DATALOADERS:
        """Return the loader, or a collection of loaders, for predictions."""
        raise _missing_loader("predict_dataloader")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Any:
        """Change a batch before it goes to the device."""
        return batch

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Any:
        """Move a batch to ``device``; override for batches of your own kind."""
        return move_data_to_device(batch, device)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Any:
        """Change a batch on the device."""
        return batch


def _missing_loader(name: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"`{name}` must be implemented to be used with the Trainer. "
        f"Define it in the LightningModule or LightningDataModule, or pass loaders to the Trainer's method."
    )


class CheckpointHooks:
    """What may be added to a checkpoint, and read back."""

    def on_load_checkpoint(self, checkpoint: StateDict) -> None:
        """Read, or change, the checkpoint before its weights are loaded."""

    def on_save_checkpoint(self, checkpoint: StateDict) -> None:
        """Add to the checkpoint before it is written."""


class Callback:
    """Code that runs at the hooks of a Trainer without being part of the model. Override what you need.

    Example:
        >>> class PrintEpoch(Callback):
        ...     def on_train_epoch_end(self, trainer, pl_module):
        ...         print(trainer.current_epoch)
    """

    runs_last: bool = False
    """Whether the Trainer moves the callback behind all others."""
    is_monitor: bool = False
    """Whether on_train_epoch_end runs after the module's, so as to see what that logs."""
    saves_checkpoints: bool = False
    """Whether this is a :class:`~levin.callbacks.Checkpoint`."""
    is_on_all_ranks: bool = False
    """Whether training needs it on all ranks, where it stops them, or changes weights or steps; others may be on some alone."""

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint; two callbacks of one class need different ones."""
        return self.__class__.__qualname__

    def _generate_state_key(self, **kwargs: object) -> str:
        """Return a state key out of the class name and ``kwargs``."""
        return f"{self.__class__.__qualname__}{kwargs!r}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the start of fit, validate, test or predict."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """At the end of fit, validate, test or predict."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the very start of fit."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the very end of fit."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the validation that checks the code before training."""

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the validation that checks the code before training."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Before a training batch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """After a training batch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before an epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After an epoch."""

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the batches of a validation."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the batches of a validation."""

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the batches of a test."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the batches of a test."""

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the batches of a prediction run."""

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the batches of a prediction run."""

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a validation batch."""

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a validation batch."""

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a test batch."""

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: STEP_OUTPUT,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a test batch."""

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Before a prediction batch."""

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """After a prediction batch."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After the last epoch."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a validation."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a test."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a test."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a prediction run."""

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a prediction run."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """When anything raises."""

    def state_dict(self) -> StateDict:
        """Return what the callback needs to go on after a resume."""
        return {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take up what :meth:`state_dict` returned."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """Add to the checkpoint before it is written."""

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        """Read the checkpoint before the callbacks' states are loaded."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Before ``loss.backward()``."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After ``loss.backward()``."""

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the parameters are updated."""

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the gradients are zeroed."""
