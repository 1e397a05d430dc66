"""Finetuning: parts of a module are frozen at first and trained from a certain epoch on."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Union

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.types import ParamGroup, StateDict

Modules = Union[nn.Module, Iterable[Union[nn.Module, Iterable[Any]]]]


class BaseFinetuning(Callback):
    """Derive from it and say what is frozen before training and what is trained from which epoch on.

    Create the optimizer with the trainable parameters alone; :meth:`unfreeze_and_add_param_group` adds the others.
    Parameter groups, and what is frozen, are as they were after a resume.

    Example:
        >>> class UnfreezeAtTen(BaseFinetuning):
        ...     def freeze_before_training(self, pl_module):
        ...         self.freeze(pl_module.backbone)
        ...
        ...     def finetune_function(self, pl_module, epoch, optimizer):
        ...         if epoch == 10:
        ...             self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)
    """

    is_on_all_ranks = True

    def __init__(self) -> None:
        self._internal_optimizer_metadata: dict[int, list[dict[str, object]]] = {}
        self._trainable: list[str] | None = None
        self._restarting: bool = False

    # What the user overrides ------------------------------------------------------------------------------------------

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        """Freeze what is not trained from the start.

        Args:
            pl_module: The module.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `freeze_before_training`.")

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        """Unfreeze what is trained from ``epoch`` on; called at the start of each epoch for each optimizer.

        Args:
            pl_module: The module.
            epoch: The epoch, from 0.
            optimizer: One of the optimizers.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `finetune_function`.")

    # Freezing and unfreezing ------------------------------------------------------------------------------------------

    @staticmethod
    def flatten_modules(modules: Modules) -> list[nn.Module]:
        """Return the modules that have no children or have parameters of their own.

        Args:
            modules: A module, or any nesting of iterables of them.
        """
        if isinstance(modules, nn.Module):
            flat = list(modules.modules())
        else:
            flat = [child for module in modules for child in BaseFinetuning.flatten_modules(module)]
        return [module for module in flat if not list(module.children()) or module._parameters]

    @staticmethod
    def filter_params(
        modules: Modules, train_bn: bool = True, requires_grad: bool = True
    ) -> Generator[nn.Parameter, None, None]:
        """Yield the parameters that are trained, or those that are not.

        Args:
            modules: A module, or any nesting of iterables of them.
            train_bn: Whether to look at batch norms too.
            requires_grad: Which of the two.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and not train_bn:
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad == requires_grad:
                    yield parameter

    @staticmethod
    def make_trainable(modules: Modules) -> None:
        """Unfreeze all parameters, and let batch norms track their statistics.

        Args:
            modules: A module, or any nesting of iterables of them.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm):
                module.track_running_stats = True
            for parameter in module.parameters():
                parameter.requires_grad = True

    @staticmethod
    def freeze_module(module: nn.Module) -> None:
        """Freeze the parameters of a module, though not those of its children, and the statistics of a batch norm.

        Args:
            module: The module.
        """
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad = False

    @staticmethod
    def freeze(modules: Modules, train_bn: bool = True) -> None:
        """Freeze all parameters.

        Args:
            modules: A module, or any nesting of iterables of them.
            train_bn: Whether batch norms are trained all the same.
        """
        for module in BaseFinetuning.flatten_modules(modules):
            if isinstance(module, _BatchNorm) and train_bn:
                BaseFinetuning.make_trainable(module)
            else:
                BaseFinetuning.freeze_module(module)

    @staticmethod
    def filter_on_optimizer(optimizer: Optimizer, params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that the optimizer does not have yet; warn about the others.

        Args:
            optimizer: The optimizer.
            params: The parameters.
        """
        present = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        params = list(params)
        new = [parameter for parameter in params if parameter not in present]
        if len(new) < len(params):
            rank_zero_warn(
                "The provided params to be unfrozen already exist within another group of this optimizer. Those parameters will be skipped. "
                "Create the optimizer in `configure_optimizers` out of `filter(lambda p: p.requires_grad, self.parameters())`."
            )
        return new

    @staticmethod
    def unfreeze_and_add_param_group(
        modules: Modules,
        optimizer: Optimizer,
        lr: float | None = None,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
    ) -> None:
        """Unfreeze modules and give their parameters to an optimizer, as a group of their own.

        Args:
            modules: A module, or any nesting of iterables of them.
            optimizer: The optimizer.
            lr: Learning rate of the new group; by default that of the first group over ``initial_denom_lr``.
            initial_denom_lr: Divides the default learning rate.
            train_bn: Whether batch norms are added too.
        """
        BaseFinetuning.make_trainable(modules)
        lr = optimizer.param_groups[0]["lr"] / initial_denom_lr if lr is None else lr
        params = BaseFinetuning.filter_params(modules, train_bn=train_bn, requires_grad=True)
        new = BaseFinetuning.filter_on_optimizer(optimizer, params)
        if new:
            optimizer.add_param_group({"params": new, "lr": lr})

    # The run ----------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if any("DeepSpeed" in kind.__name__ for kind in type(trainer.strategy).__mro__):
            raise NotImplementedError(
                f"{type(self).__name__} does not work with DeepSpeed, whose optimizers take no more parameters. "
                "Use another strategy."
            )
        self.freeze_before_training(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._restarting:
            self._internal_optimizer_metadata = {}
            return
        self._restarting = False
        parameters = dict(pl_module.named_parameters())
        for index, optimizer in enumerate(trainer.optimizers):
            saved = self._internal_optimizer_metadata.get(index)
            if saved is None:
                continue
            num_groups = len(optimizer.param_groups)
            optimizer.param_groups = self._apply_mapping_to_param_groups(saved, parameters)
            for group in optimizer.param_groups[num_groups:] if self._trainable is None else ():
                # A file that does not say what was frozen: what was added later had been unfrozen.
                for parameter in group["params"]:
                    parameter.requires_grad = True
        if self._trainable is not None:
            trainable = set(self._trainable)
            for name, parameter in parameters.items():
                parameter.requires_grad = name in trainable
        for module in pl_module.modules():
            if isinstance(module, _BatchNorm) and any(parameter.requires_grad for parameter in module.parameters()):
                module.track_running_stats = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for index, optimizer in enumerate(trainer.optimizers):
            num_groups = len(optimizer.param_groups)
            if index not in self._internal_optimizer_metadata:
                num_groups = 0
            self.finetune_function(pl_module, trainer.current_epoch, optimizer)
            self._store(pl_module, index, num_groups, optimizer.param_groups)
        self._trainable = [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad]

    def _store(
        self,
        pl_module: LightningModule,
        opt_idx: int,
        num_param_groups: int,
        current_param_groups: list[ParamGroup],
    ) -> None:
        """Remember the groups from ``num_param_groups`` on, by the names of their parameters."""
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        new = self._apply_mapping_to_param_groups(current_param_groups[num_param_groups:], names)
        self._internal_optimizer_metadata.setdefault(opt_idx, []).extend(new)

    @staticmethod
    def _apply_mapping_to_param_groups(param_groups: list[ParamGroup], mapping: Mapping[Any, Any]) -> list[ParamGroup]:
        """Return copies of the groups with each parameter replaced by what it is mapped to."""
        return [{**group, "params": [mapping[parameter] for parameter in group["params"]]} for group in param_groups]

    @override
    def state_dict(self) -> StateDict:
        state: dict[str, object] = {"internal_optimizer_metadata": self._internal_optimizer_metadata}
        if self._trainable is not None:
            state["trainable"] = self._trainable
        return state

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self._restarting = True
        self._internal_optimizer_metadata = state_dict["internal_optimizer_metadata"]
        self._trainable = state_dict.get("trainable")


def multiplicative(epoch: int) -> float:
    """Return 2: the learning rate of the backbone doubles with each epoch."""
    return 2.0


class BackboneFinetuning(BaseFinetuning):
    """Trains ``pl_module.backbone`` from a certain epoch on, with a learning rate that grows from then.

    Args:
        unfreeze_backbone_at_epoch: First epoch in which the backbone is trained.
        lambda_func: Epoch -> factor by which the backbone's learning rate grows in it.
        backbone_initial_ratio_lr: The backbone starts with so much of the learning rate of the first group.
        backbone_initial_lr: The backbone starts with this learning rate instead.
        should_align: Whether the backbone's learning rate stops growing once it reaches that of the first group.
        initial_denom_lr: Divides the learning rate of the first group where no other one is given.
        train_bn: Whether the batch norms of the backbone are trained from the start.
        verbose: Whether to log both learning rates at each epoch.
        rounding: Digits of the logged learning rates.

    Raises:
        MisconfigurationException: In fit, the module has no ``backbone``.

    Example:
        >>> finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=5, lambda_func=lambda epoch: 1.5)
    """

    def __init__(
        self,
        unfreeze_backbone_at_epoch: int = 10,
        lambda_func: Callable[[int], float] = multiplicative,
        backbone_initial_ratio_lr: float = 10e-2,
        backbone_initial_lr: float | None = None,
        should_align: bool = True,
        initial_denom_lr: float = 10.0,
        train_bn: bool = True,
        verbose: bool = False,
        rounding: int = 12,
    ) -> None:
        super().__init__()
        self.unfreeze_backbone_at_epoch: int = unfreeze_backbone_at_epoch
        self.lambda_func: Callable[[int], float] = lambda_func
        self.backbone_initial_ratio_lr: float = backbone_initial_ratio_lr
        self.backbone_initial_lr: float | None = backbone_initial_lr
        self.should_align: bool = should_align
        self.initial_denom_lr: float = initial_denom_lr
        self.train_bn: bool = train_bn
        self.verbose: bool = verbose
        self.rounding: int = rounding
        self.previous_backbone_lr: float | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(getattr(pl_module, "backbone", None), nn.Module):
            raise MisconfigurationException(
                "BackboneFinetuning needs a module with a `backbone`, received "
                f"{type(pl_module).__name__} without one. Give it `self.backbone = ...` in `__init__`."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.get_submodule("backbone"), self.train_bn)

    @override
    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Optimizer) -> None:
        if epoch < self.unfreeze_backbone_at_epoch:
            return
        head_lr = float(optimizer.param_groups[0]["lr"])
        if epoch == self.unfreeze_backbone_at_epoch or self.previous_backbone_lr is None:
            ratio_lr = head_lr * self.backbone_initial_ratio_lr
            lr = ratio_lr if self.backbone_initial_lr is None else self.backbone_initial_lr
            self.unfreeze_and_add_param_group(
                pl_module.get_submodule("backbone"),
                optimizer,
                lr,
                initial_denom_lr=self.initial_denom_lr,
                train_bn=self.train_bn,
            )
        else:
            lr = self.lambda_func(epoch + 1) * self.previous_backbone_lr
            lr = min(lr, head_lr) if self.should_align else lr
            optimizer.param_groups[-1]["lr"] = lr
        self.previous_backbone_lr = lr
        if self.verbose:
            rank_zero_info(f"Current lr: {round(head_lr, self.rounding)}, Backbone lr: {round(lr, self.rounding)}")

    @override
    def state_dict(self) -> StateDict:
        return {**super().state_dict(), "previous_backbone_lr": self.previous_backbone_lr}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        self.previous_backbone_lr = state_dict["previous_backbone_lr"]
        super().load_state_dict(state_dict)
