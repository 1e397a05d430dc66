"""LightningModule: what the user subclasses to say what is computed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from torch import Tensor, nn

from levin import loading
from levin.exports import Exports
from levin.hooks import CheckpointHooks, DataHooks, ModelHooks
from levin.hparams import HyperparametersMixin
from levin.self_log import SelfLog
from levin.utilities.collections import apply_to_collection
from levin.utilities.exceptions import MisconfigurationException, require_choice
from levin.utilities.rank_zero import rank_zero_warn

if TYPE_CHECKING:
    from levin.hooks import Callback
    from levin.protocols import Run, Trainer
    from levin.utilities.types import STEP_OUTPUT, Closure, Group, OptimizerLRScheduler, StateDict, Tree

log = logging.getLogger("levin")

Numbers = Union[int, float]

# Where a module is and how it is trained, as long as nobody has said.
_FIELDS: dict[str, object] = dict.fromkeys(
    (
        "_trainer", "_fabric", "_fabric_optimizers", "_logging_run", "_example_input_array", "_strict_loading",
        "_device_mesh", "_compiler_ctx",
    )
) | {"_automatic_optimization": True, "_is_scripting": False}  # fmt: skip


class LightningModule(SelfLog, Exports, HyperparametersMixin, ModelHooks, DataHooks, CheckpointHooks, nn.Module):
    """A model with its training: layers in ``__init__``, a loss in ``training_step``, an optimizer in ``configure_optimizers``.

    Example:
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(28 * 28, 10)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return nn.functional.cross_entropy(self.layer(x), y)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    """

    CHECKPOINT_HYPER_PARAMS_KEY: str = "hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: str = "hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: str = "hparams_type"
    __jit_unused_properties__: list[str] = [
        "example_input_array", "on_gpu", "current_epoch", "global_step", "global_rank", "local_rank", "logger",
        "loggers", "automatic_optimization", "trainer", "fabric", "strict_loading", "device_mesh", "hparams",
        "hparams_initial", "device", "dtype",
    ]  # fmt: skip

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trainer: Optional[Trainer] = None
        self._fabric: Any = None
        self._fabric_optimizers: Any = None
        self._logging_run: Optional[Run] = None
        self._example_input_array: Any = None
        self._automatic_optimization: bool = True
        self._strict_loading: Optional[bool] = None
        self._device_mesh: Any = None
        self._requires_grad_before_toggle: dict[nn.Parameter, bool] = {}
        self._compiler_ctx: Any = None
        self._is_scripting: bool = False

    def __getstate__(self) -> StateDict:
        state = dict(self.__dict__)
        state["_trainer"] = None
        state["_fabric"] = state["_fabric_optimizers"] = None
        state["_logging_run"] = None
        return state

    def __setstate__(self, state: StateDict) -> None:
        # A module that Lightning pickled whole lacks some of the fields, and packages pop others out of `__dict__`.
        for name, default in _FIELDS.items():
            state.setdefault(name, default)
        state.setdefault("_requires_grad_before_toggle", {})
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch annotates only part of itself

    # ---------------------------------------------------------------- where the module is

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the present run.

        Raises:
            RuntimeError: No run has used this module yet.
        """
        if self._fabric is not None and self._trainer is None:
            shim: Trainer = self._fabric.trainer_shim(self)
            return shim
        if self._trainer is None:
            if self._is_scripting:
                return None  # type: ignore[return-value]  # TorchScript looks at every attribute
            raise RuntimeError(
                f"{type(self).__qualname__} is not attached to a `Trainer`. Call `trainer.fit(model)` first."
            )
        return self._trainer

    @trainer.setter
    def trainer(self, trainer: Optional[Trainer]) -> None:
        for child in self.children():
            if isinstance(child, LightningModule):
                child.trainer = trainer
        self._trainer = trainer

    @property
    def fabric(self) -> Any:
        """The Fabric this module is set up with, or None."""
        return self._fabric

    @fabric.setter
    def fabric(self, fabric: Any) -> None:
        for child in self.children():
            if isinstance(child, LightningModule):
                child.fabric = fabric
        self._fabric = fabric

    @property
    def device(self) -> torch.device:
        """Device of the parameters; the target device already inside ``setup``."""
        if self._trainer is not None and self._trainer.run is not None and self._trainer.run.is_setting_up:
            return self._trainer.strategy.root_device
        for tensor in (*self.parameters(), *self.buffers()):
            return tensor.device
        return self._trainer.strategy.root_device if self._trainer is not None else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the parameters."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return tensor.dtype
        return torch.get_default_dtype()

    @dtype.setter
    def dtype(self, value: torch.dtype) -> None:
        raise RuntimeError(f"Cannot set the dtype, received {value}. Use `module.to(dtype)`.")

    @property
    def on_gpu(self) -> bool:
        """Whether the module is on a CUDA device."""
        return self.device.type == "cuda"

    @property
    def device_mesh(self) -> Any:
        """The mesh of devices that a model-parallel strategy lays out, or None."""
        return self._device_mesh

    @property
    def current_epoch(self) -> int:
        """Completed epochs; 0 without a Trainer."""
        return self._trainer.current_epoch if self._trainer is not None else 0

    @property
    def global_step(self) -> int:
        """Optimizer steps taken; 0 without a Trainer."""
        return self._trainer.global_step if self._trainer is not None else 0

    @property
    def global_rank(self) -> int:
        """Rank among all processes; 0 without a Trainer."""
        owner = self._trainer or self._fabric
        return owner.global_rank if owner is not None else 0

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this machine; 0 without a Trainer."""
        owner = self._trainer or self._fabric
        return owner.local_rank if owner is not None else 0

    @property
    def logger(self) -> Any:
        """The first logger, or None."""
        owner = self._trainer or self._fabric
        return owner.logger if owner is not None else None

    @property
    def loggers(self) -> list[Any]:
        """All loggers."""
        owner = self._trainer or self._fabric
        return owner.loggers if owner is not None else []

    @property
    def automatic_optimization(self) -> bool:
        """Whether the Trainer runs backward and steps the optimizer (default True)."""
        return self._automatic_optimization

    @automatic_optimization.setter
    def automatic_optimization(self, value: bool) -> None:
        self._automatic_optimization = value

    @property
    def strict_loading(self) -> bool:
        """Whether a checkpoint must hold exactly this module's keys (default True)."""
        return True if self._strict_loading is None else self._strict_loading

    @strict_loading.setter
    def strict_loading(self, value: bool) -> None:
        self._strict_loading = value

    @property
    def example_input_array(self) -> Any:
        """Inputs for the summary and exports: a tensor, a tuple or list (positional) or a dict (keywords)."""
        return self._example_input_array

    @example_input_array.setter
    def example_input_array(self, example: Any) -> None:
        self._example_input_array = example

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0, above the progress bar when there is one."""
        trainer = self._trainer
        if self.global_rank == 0:
            bar = trainer.progress_bar_callback if trainer is not None else None
            if bar is not None and bar.is_enabled:
                bar.print(*args, **kwargs)
            else:
                print(*args, **kwargs)

    # ---------------------------------------------------------------- what the user writes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the output for an input; the user's to define."""
        return super().forward(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Compute the loss of ``(batch, batch_idx)``.

        Returns:
            The loss; a dict with ``"loss"``, and perhaps ``"weight"`` (samples or tokens behind the mean, by which
            accumulated batches and ranks are averaged); None to skip the batch.
        """
        rank_zero_warn("`training_step` must be implemented to be used with the Trainer.")
        return None

    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Evaluate ``(batch, batch_idx[, dataloader_idx])`` on validation data."""
        return None

    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Evaluate ``(batch, batch_idx[, dataloader_idx])`` on test data."""
        return None

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Return the prediction for ``(batch, batch_idx[, dataloader_idx])``; by default ``self(batch)``."""
        return self(kwargs.get("batch", args[0] if args else None))

    def configure_callbacks(self) -> Union[list[Callback], Callback]:
        """Return callbacks of this model; each replaces those of its class in the Trainer."""
        return []

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with or without a learning-rate scheduler."""
        rank_zero_warn("`configure_optimizers` must be implemented to be used with the Trainer.")
        return None

    # ---------------------------------------------------------------- optimization

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        """Return the optimizer, or the list of them when there are several.

        Args:
            use_pl_optimizer: False for the raw torch optimizers.
        """
        run = self.trainer.run if use_pl_optimizer and self._trainer is not None else None
        wrapped = self.trainer.optimizers if run is None else run.lightning_optimizers
        return wrapped[0] if len(wrapped) == 1 else wrapped

    def lr_schedulers(self) -> Any:
        """Return None, the scheduler, or the list of them when there are several."""
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        if not schedulers:
            return None
        return schedulers[0] if len(schedulers) == 1 else schedulers

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run backward through precision and strategy, in manual optimization.

        Raises:
            MisconfigurationException: ``automatic_optimization`` is True.
        """
        if self._fabric is not None and self._trainer is None:
            self._fabric.backward(loss, *args, **kwargs)
            return
        if self.automatic_optimization:
            raise MisconfigurationException(
                "`manual_backward` is for manual optimization, received automatic_optimization=True. "
                "Set `self.automatic_optimization = False` in `__init__`."
            )
        self.trainer.run.step.backward(loss, *args, **kwargs)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run ``loss.backward()``; override to do it another way."""
        if self._fabric is not None and self._trainer is None:
            self._fabric.backward(loss, *args, **kwargs)
        else:
            loss.backward(*args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Optional[Closure] = None,
    ) -> None:
        """Step the optimizer; an override must run ``optimizer_closure``, by hand or through ``optimizer.step``."""
        optimizer.step(closure=optimizer_closure)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Zero the gradients; override to do it another way."""
        optimizer.zero_grad()

    def lr_scheduler_step(self, scheduler: Any, metric: Optional[Any]) -> None:
        """Step a scheduler; override for one with another signature."""
        if metric is None:
            scheduler.step()
        else:
            scheduler.step(metric)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[Numbers] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        """Clip the gradients before each step; override to do it another way."""
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )

    def clip_gradients(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: Optional[Numbers] = None,
        gradient_clip_algorithm: Optional[str] = None,
    ) -> None:
        """Clip the gradients of the parameters of ``optimizer``.

        Args:
            optimizer: The optimizer.
            gradient_clip_val: Largest norm or value; by default the Trainer's.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``; by default the Trainer's.

        Raises:
            MisconfigurationException: A value differs from the Trainer's.
            TypeError: ``gradient_clip_val`` is not a number.
        """
        trainer = self.trainer
        is_under_fabric = self._fabric is not None and self._trainer is None
        for name, value, own in (
            ("gradient_clip_val", gradient_clip_val, trainer.gradient_clip_val),
            ("gradient_clip_algorithm", gradient_clip_algorithm, trainer.gradient_clip_algorithm),
        ):
            if value is not None and own is not None and value != own:
                raise MisconfigurationException(
                    f"clip_gradients({name}={value!r}) differs from Trainer({name}={own!r}). Set one of the two only."
                )
        value = gradient_clip_val if gradient_clip_val is not None else (trainer.gradient_clip_val or 0.0)
        if not isinstance(value, (int, float)):
            raise TypeError(f"gradient_clip_val must be an int or a float, received {value!r}.")
        algorithm = str(gradient_clip_algorithm or trainer.gradient_clip_algorithm or "norm").lower()
        require_choice("gradient_clip_algorithm", algorithm, ("norm", "value"))
        if is_under_fabric and gradient_clip_val is None:
            raise MisconfigurationException(
                "clip_gradients has no value under Fabric, which keeps none, received gradient_clip_val=None. "
                "Pass clip_gradients(optimizer, gradient_clip_val=1.0)."
            )
        if value > 0 or is_under_fabric:
            clip_val, max_norm = (value, None) if algorithm == "value" else (None, value)
            owner = self._fabric if is_under_fabric else trainer.strategy
            owner.clip_gradients(self, optimizer, clip_val, max_norm)

    def toggle_optimizer(self, optimizer: Any) -> None:
        """Let only the parameters of ``optimizer`` require gradients, until :meth:`untoggle_optimizer`."""
        kept = {id(param) for group in optimizer.param_groups for param in group["params"]}
        flags: dict[nn.Parameter, bool] = {}
        for other in self.trainer.optimizers:
            for group in other.param_groups:
                for param in group["params"]:
                    flags.setdefault(param, param.requires_grad)
        for param in flags:
            if id(param) not in kept:
                param.requires_grad = False
        self._requires_grad_before_toggle = flags

    def untoggle_optimizer(self, optimizer: Any) -> None:
        """Undo :meth:`toggle_optimizer`."""
        for param, flag in self._requires_grad_before_toggle.items():
            param.requires_grad = flag
        self._requires_grad_before_toggle = {}

    @contextlib.contextmanager
    def toggled_optimizer(self, optimizer: Any) -> Iterator[None]:
        """Let only the parameters of ``optimizer`` require gradients inside the block."""
        self.toggle_optimizer(optimizer)
        try:
            yield
        finally:
            self.untoggle_optimizer(optimizer)

    def freeze(self) -> LightningModule:
        """Stop all gradients and go to eval mode. Returns the module."""
        for param in self.parameters():
            param.requires_grad = False
        return self.eval()

    def unfreeze(self) -> LightningModule:
        """Let all parameters require gradients and go to train mode. Returns the module."""
        for param in self.parameters():
            param.requires_grad = True
        return self.train()

    def all_gather(self, data: Tree, group: Group = None, sync_grads: bool = False) -> Tree:
        """Gather tensors or numbers, alone or in a collection, from all ranks along a new first dimension.

        Without other ranks there is no new dimension: numbers become tensors, tensors stay as they are.

        Args:
            data: What to gather.
            group: The process group; all ranks by default.
            sync_grads: Whether gradients flow through.
        """
        strategy = self.trainer.strategy

        def as_tensor(value: object) -> Tensor:
            return value if isinstance(value, Tensor) else torch.tensor(value, device=self.device)

        tensors = apply_to_collection(data, (Tensor, int, float), as_tensor)
        return strategy.all_gather(tensors, group=group, sync_grads=sync_grads) if strategy.is_distributed else tensors

    # ---------------------------------------------------------------- loading

    @loading.restricted_classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: Optional[bool] = None,
        weights_only: Optional[bool] = None,
        **kwargs: Any,
    ) -> Any:
        """Build the module from a checkpoint's hyper-parameters and load its weights.

        Args:
            checkpoint_path: Path, URL or file object.
            map_location: As in ``torch.load``; by default tensors of absent devices go to the CPU.
            hparams_file: A ``.yaml`` or ``.csv`` file that replaces the saved hyper-parameters.
            strict: Whether the keys must match exactly; by default ``strict_loading``.
            weights_only: False allows the file to run code while it is read. Only for files you trust.
            kwargs: Arguments of ``__init__`` that override the saved ones.

        Example:
            >>> model = Classifier.load_from_checkpoint("last.ckpt")  # doctest: +SKIP
        """
        return loading.load_from_checkpoint(
            cls, checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )
