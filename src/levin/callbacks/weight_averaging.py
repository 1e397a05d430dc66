"""WeightAveraging: an average of the weights over training, used for validation and as the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import STEP_OUTPUT, Batch, Kwargs, StateDict

_PREFIX = "module."


def require_whole_weights(callback: Callback, trainer: Trainer) -> None:
    """Raise if the strategy leaves no process with all weights, as ``callback`` needs them.

    Raises:
        MisconfigurationException: It does.
    """
    if trainer.strategy.restore_checkpoint_after_setup:
        raise MisconfigurationException(
            f"{type(callback).__name__} does not work with weights that are sharded, received "
            f"{type(trainer.strategy).__name__}. Use DDP."
        )


class WeightAveraging(Callback):
    """Averages the weights during training, validates with the average and leaves it in the module at the end.

    A checkpoint holds the average as its ``state_dict``, ready for inference, and the weights that are trained as
    ``current_model_state``. Before the first update the average is the trained weights themselves.

    Args:
        device: Where the average is kept; by default where the module is.
        use_buffers: Whether buffers, such as the statistics of batch norms, are averaged too; otherwise they are copied.
        kwargs: Passed to :class:`torch.optim.swa_utils.AveragedModel`, for example ``avg_fn`` or ``multi_avg_fn``.

    Example:
        >>> class AverageOfEpochs(WeightAveraging):
        ...     def should_update(self, step_idx=None, epoch_idx=None):
        ...         return epoch_idx is not None and epoch_idx >= 10
    """

    def __init__(
        self, device: torch.device | str | int | None = None, use_buffers: bool = True, **kwargs: object
    ) -> None:
        self._device: torch.device | str | int | None = device
        self._use_buffers: bool = use_buffers
        self._kwargs: Kwargs = kwargs
        self._begin()

    def _begin(self) -> None:
        self._average_model: AveragedModel | None = None
        # A state that was loaded before there was an average to take it: weights, and the rest of the average.
        self._restored: tuple[StateDict, StateDict] | None = None
        self._is_swapped = self._has_ended = False
        self._latest_step: int = 0
        self._latest_update_step: int = 0
        self._latest_update_epoch: int = -1

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the weights are taken into the average now; by default after each optimizer step.

        Args:
            step_idx: Index of the optimizer step that was just done, or None.
            epoch_idx: Index of the epoch that has just ended, or None.
        """
        return step_idx is not None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_whole_weights(self, trainer)
        device = torch.device(pl_module.device if self._device is None else self._device)
        self._average_model = AveragedModel(pl_module, device=device, use_buffers=self._use_buffers, **self._kwargs)
        self._take_restored()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._latest_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step > self._latest_step:
            self._latest_step = step
            if self.should_update(step_idx=step - 1):
                self._average().update_parameters(pl_module)
                self._latest_update_step = step

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if epoch > self._latest_update_epoch and self.should_update(epoch_idx=epoch):
            self._average().update_parameters(pl_module)
            self._latest_update_epoch = epoch

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_average():
            self._swap(pl_module)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap_back(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_average():
            self._swap(pl_module)
            self._has_ended = True

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._has_ended:
            self._swap_back(pl_module)

    @override
    def state_dict(self) -> StateDict:
        return {"latest_update_step": self._latest_update_step, "latest_update_epoch": self._latest_update_epoch}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self._latest_update_step = state_dict["latest_update_step"]
        self._latest_update_epoch = state_dict.get("latest_update_epoch", -1)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        if self._average_model is None:
            return
        other = self._average_model.module.state_dict()
        present = checkpoint["state_dict"]
        if not self._has_average():
            average = current = present
        else:
            average, current = (present, other) if self._is_swapped else (other, present)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, current
        checkpoint["averaging_state"] = {
            name: value for name, value in self._average_model.state_dict().items() if not name.startswith(_PREFIX)
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        if trainer.state.fn != "fit":
            return
        if "current_model_state" not in checkpoint:
            rank_zero_warn(
                "The checkpoint was saved without WeightAveraging. The average starts with the weights that it holds."
            )
            return
        self._restored = (checkpoint["state_dict"], checkpoint["averaging_state"])
        checkpoint["state_dict"] = checkpoint["current_model_state"]
        trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)
        if self._average_model is not None:
            self._take_restored()

    def _take_restored(self) -> None:
        if self._restored is not None:
            weights, rest = self._restored
            self._average().load_state_dict({**{_PREFIX + name: value for name, value in weights.items()}, **rest})
            self._restored = None

    def _average(self) -> AveragedModel:
        assert self._average_model is not None, "the average exists from on_fit_start on"
        return self._average_model

    def _has_average(self) -> bool:
        return self._average_model is not None and int(self._average_model.n_averaged) > 0

    def _swap_back(self, pl_module: LightningModule) -> None:
        if self._is_swapped:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for average, current in zip(_tensors(self._average().module), _tensors(pl_module)):
            kept = average.clone()
            average.copy_(current)
            current.copy_(kept)
        self._is_swapped = not self._is_swapped


class EMAWeightAveraging(WeightAveraging):
    """Keeps an exponential moving average of the weights.

    Args:
        device: Where the average is kept; by default where the module is.
        use_buffers: Whether buffers are averaged too; otherwise they are copied.
        decay: How much of the old average an update keeps.
        update_every_n_steps: Optimizer steps between updates.
        update_starting_at_step: Index of the first optimizer step to update after.
        update_starting_at_epoch: Index of the first epoch to update after, besides the updates after steps.
        kwargs: Passed to :class:`torch.optim.swa_utils.AveragedModel`.

    Example:
        >>> average = EMAWeightAveraging(decay=0.99, update_starting_at_step=100)
        >>> average.should_update(step_idx=99), average.should_update(step_idx=100)
        (False, True)
    """

    def __init__(
        self,
        device: torch.device | str | int | None = None,
        use_buffers: bool = True,
        decay: float = 0.999,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
        update_starting_at_epoch: int | None = None,
        **kwargs: object,
    ) -> None:
        kwargs.setdefault("multi_avg_fn", get_ema_multi_avg_fn(decay))
        super().__init__(device=device, use_buffers=use_buffers, **kwargs)
        self.update_every_n_steps: int = update_every_n_steps
        self.update_starting_at_step: int | None = update_starting_at_step
        self.update_starting_at_epoch: int | None = update_starting_at_epoch

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        if step_idx is not None:
            return step_idx >= (self.update_starting_at_step or 0) and step_idx % self.update_every_n_steps == 0
        if epoch_idx is not None and self.update_starting_at_epoch is not None:
            return epoch_idx >= self.update_starting_at_epoch
        return False


def _tensors(module: torch.nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())
