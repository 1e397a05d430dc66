"""StochasticWeightAveraging: an average of the weights at the starts of the last epochs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import SWALR
from typing_extensions import override

from levin.callbacks.weight_averaging import require_whole_weights
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException, require_choice, value_error
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.types import LRSchedulerConfig, StateDict

AverageFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


class StochasticWeightAveraging(Callback):
    """Averages the weights over the last epochs, at a learning rate of its own, and leaves the average in the module.

    The learning rate anneals to ``swa_lrs``; the module's scheduler is replaced for that. A module with batch norms gets
    one more epoch in which nothing is learned, to collect the statistics that go with the average.

    Args:
        swa_lrs: Learning rate to anneal to, or one for each parameter group.
        swa_epoch_start: First epoch to average, counted from 1, or the share of ``max_epochs`` that comes before.
        annealing_epochs: Epochs until the learning rate has arrived.
        annealing_strategy: ``"cos"`` or ``"linear"``: the way of the learning rate.
        avg_fn: ``(average, current, number averaged so far) -> new average``; by default the mean.
        device: Where the average is kept; None keeps it where the module is.

    Raises:
        MisconfigurationException: Arguments out of range; in fit, more than one optimizer or scheduler, no limit of
            epochs, or a strategy that shards the weights.

    Example:
        >>> averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=0.75)
    """

    is_on_all_ranks = True

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AverageFunction | None = None,
        device: torch.device | str | None = torch.device("cpu"),  # noqa: B008  (a constant)
    ) -> None:
        lrs = swa_lrs if isinstance(swa_lrs, list) else [swa_lrs]
        if not lrs or not all(isinstance(lr, (int, float)) and lr > 0 for lr in lrs):
            raise value_error("swa_lrs", swa_lrs, "must be a number > 0, or a list of them")
        is_share = isinstance(swa_epoch_start, float)
        if not (0 <= swa_epoch_start <= 1 if is_share else swa_epoch_start >= 1):
            raise value_error("swa_epoch_start", swa_epoch_start, "must be an int >= 1 or a float in [0.0, 1.0]")
        if annealing_epochs < 0:
            raise value_error("annealing_epochs", annealing_epochs, "must be >= 0")
        require_choice("annealing_strategy", annealing_strategy, ("cos", "linear"))
        if avg_fn is not None and not callable(avg_fn):
            raise value_error("avg_fn", avg_fn, "must be a function")
        if device is not None and not isinstance(device, (torch.device, str)):
            raise value_error("device", device, "must be a torch.device, a string or None")
        self._swa_lrs: float | list[float] = swa_lrs
        self._swa_epoch_start: int | float = swa_epoch_start
        self._annealing_epochs: int = annealing_epochs
        self._annealing_strategy: Literal["cos", "linear"] = annealing_strategy
        self._avg_fn: AverageFunction = avg_fn or self.avg_fn
        self._device: torch.device | str | None = device

        self._begin()
        self._max_epochs: int = 0
        self._undo: list[Callable[[], None]] = []
        self._momenta: list[tuple[_BatchNorm, float | None]] = []

    def _begin(self) -> None:
        self.n_averaged: Tensor = torch.tensor(0)
        self._latest_update_epoch: int = -1
        self._average_model: LightningModule | None = None
        self._swa_scheduler: SWALR | None = None
        # What was loaded, until there is something to take it.
        self._scheduler_state: dict[str, object] | None = None
        self._average_model_state: dict[str, object] | None = None

    @property
    def swa_start(self) -> int:
        """The first epoch, from 0, at whose start the weights are averaged."""
        start = self._swa_epoch_start
        if isinstance(start, float):
            start = int(self._max_epochs * start)
        return max(start - 1, 0)

    @property
    def swa_end(self) -> int:
        """The last one."""
        return self._max_epochs - 1

    @staticmethod
    def avg_fn(averaged_model_parameter: Tensor, model_parameter: Tensor, num_averaged: Tensor) -> Tensor:
        """Return the mean, to which ``num_averaged`` were added before."""
        return averaged_model_parameter + (model_parameter - averaged_model_parameter) / (num_averaged + 1)

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: nn.Module) -> bool:
        """Return whether there are statistics to collect."""
        return any(isinstance(module, _BatchNorm) for module in pl_module.modules())

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._begin()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_whole_weights(self, trainer)
        if len(trainer.optimizers) != 1 or len(trainer.lr_scheduler_configs) > 1:
            raise MisconfigurationException(
                f"StochasticWeightAveraging needs one optimizer and at most one scheduler, received "
                f"{len(trainer.optimizers)} and {len(trainer.lr_scheduler_configs)}."
            )
        max_epochs = trainer.fit_loop.max_epochs
        if max_epochs is None or max_epochs < 0:
            raise MisconfigurationException(
                f"StochasticWeightAveraging must know the number of epochs, received max_epochs={max_epochs}. Set it."
            )
        self._max_epochs = max_epochs
        self._average_model = copy.deepcopy(pl_module)
        if self._device is not None:
            self._average_model.to(self._device)
        if self._average_model_state is not None:
            self._average_model.load_state_dict(self._average_model_state)
            self._average_model_state = None
        if self._scheduler_state is not None:
            # Ours takes its place, with a state of its own.
            trainer.strategy.lr_scheduler_configs.clear()
        if self.pl_module_contains_batch_norm(pl_module):
            self._set_for_now(trainer.fit_loop, "max_epochs", max_epochs + 1)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.swa_start <= epoch <= self.swa_end:
            if self._swa_scheduler is None:
                self._replace_scheduler(trainer)
            if epoch > self._latest_update_epoch:
                assert self._average_model is not None, "the average exists from on_fit_start on"
                self.update_parameters(self._average_model, pl_module, self.n_averaged, self._avg_fn)
                self._latest_update_epoch = epoch
        elif epoch == self.swa_end + 1 and self.n_averaged > 0:
            self._begin_statistics(trainer, pl_module)

    def _replace_scheduler(self, trainer: Trainer) -> None:
        optimizer = trainer.optimizers[0]
        groups = optimizer.param_groups
        lrs = self._swa_lrs if isinstance(self._swa_lrs, list) else [self._swa_lrs] * len(groups)
        present = [group["lr"] for group in groups]
        for group, lr in zip(groups, lrs):
            group["initial_lr"] = lr
        self._swa_scheduler = SWALR(
            optimizer,
            lrs,  # type: ignore[arg-type]  # torch takes a list, one per group
            anneal_epochs=self._annealing_epochs,
            anneal_strategy=self._annealing_strategy,
        )
        if self._scheduler_state is not None:
            self._swa_scheduler.load_state_dict(self._scheduler_state)
            self._scheduler_state = None
            for group, lr in zip(groups, present):
                group["lr"] = lr
        configs = trainer.strategy.lr_scheduler_configs
        if configs:
            replaced = configs[0]
            if replaced.interval != "epoch" or replaced.frequency != 1:
                rank_zero_warn(
                    f"StochasticWeightAveraging steps once per epoch, but replaces a scheduler with interval="
                    f"{replaced.interval!r} and frequency={replaced.frequency}."
                )
            name = type(replaced.scheduler).__name__
            rank_zero_info(f"Swapping scheduler `{name}` for `SWALR`")
        configs[:] = [LRSchedulerConfig(self._swa_scheduler)]

    @staticmethod
    @torch.no_grad()
    def update_parameters(
        average_model: LightningModule, model: LightningModule, n_averaged: Tensor, avg_fn: AverageFunction
    ) -> None:
        """Add the weights of ``model`` to the average, and one to ``n_averaged``."""
        for average, current in zip(average_model.parameters(), model.parameters()):
            new = current.to(average.device)
            average.copy_(new if n_averaged == 0 else avg_fn(average, new, n_averaged))
        n_averaged += 1

    @staticmethod
    @torch.no_grad()
    def transfer_weights(src_pl_module: LightningModule, dst_pl_module: LightningModule) -> None:
        """Copy the weights of one module into the other."""
        for source, target in zip(src_pl_module.parameters(), dst_pl_module.parameters()):
            target.copy_(source)

    def reset_batch_norm_and_save_state(self, pl_module: LightningModule) -> None:
        """Let the statistics of batch norms begin anew, as the plain mean over the epoch that follows."""
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm):
                module.reset_running_stats()
                self._momenta.append((module, module.momentum))
                module.momentum = None

    def reset_momenta(self) -> None:
        """Give batch norms their own momenta again."""
        while self._momenta:
            module, momentum = self._momenta.pop()
            module.momentum = momentum

    def _begin_statistics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the module and let an epoch run that changes nothing but running statistics."""
        assert self._average_model is not None, "the average exists from on_fit_start on"
        self.transfer_weights(self._average_model, pl_module)
        self.reset_batch_norm_and_save_state(pl_module)
        self._set_for_now(trainer.run.step, "backward", lambda loss, *args, **kwargs: None)
        # One window for the whole epoch: no reduction of gradients that are not there, and no more than one step.
        num_batches = max(int(min(trainer.num_training_batches, 10**9)), 1)
        self._set_for_now(trainer, "accumulate_grad_batches", num_batches)

    def _set_for_now(self, owner: object, name: str, value: object) -> None:
        """Set an attribute until training ends, however it does."""
        self._undo.append(partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()
        if self.n_averaged > 0 and not self.pl_module_contains_batch_norm(pl_module):
            assert self._average_model is not None, "the average exists from on_fit_start on"
            self.transfer_weights(self._average_model, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.reset_momenta()

    @override
    def state_dict(self) -> StateDict:
        scheduler, average = self._swa_scheduler, self._average_model
        return {
            "n_averaged": int(self.n_averaged),
            "latest_update_epoch": self._latest_update_epoch,
            "scheduler_state": self._scheduler_state if scheduler is None else scheduler.state_dict(),
            "average_model_state": None if average is None else average.state_dict(),
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: StateDict) -> None:
        if checkpoint["callbacks"].get(self.state_key, {}).get("scheduler_state") is not None:
            # The one state in the file is that of our scheduler, which has it from its own.
            checkpoint["lr_schedulers"] = []

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self.n_averaged = torch.tensor(state_dict["n_averaged"])
        self._latest_update_epoch = state_dict["latest_update_epoch"]
        self._scheduler_state = state_dict["scheduler_state"]
        self._average_model_state = state_dict["average_model_state"]
