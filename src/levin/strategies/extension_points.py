"""The names under which users' subclasses of a strategy change what the Trainer does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from levin.strategies.contexts import SkipInit
from levin.utilities.move import move_data_to_device
from levin.utilities.properties import reads
from levin.utilities.types import Batch, Function, Group, StateDict, Tree

if TYPE_CHECKING:
    from levin.environments.environment import ClusterEnvironment
    from levin.precision.precision import Precision


class ExtensionPoints:
    """Lightning's names on a strategy: each is called by the Trainer where a subclass overrides it, and costs nothing
    where none does. They speak of the one module of the Trainer and its optimizers, which are views of what it set up;
    everything else in levin uses the verbs of :class:`levin.strategies.Strategy`, which name the module they mean.
    """

    lightning_restore_optimizer: bool = True
    """Whether the checkpoint's optimizer states are loaded by the Trainer."""

    def __init__(self) -> None:
        # The one module of a Trainer: as the user wrote it, and as it was set up.
        self._lightning_module: Any = None
        self.model: Any = None
        self._optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []
        # Given by the Trainer for the time of a run, so that the defaults below do what it does.
        self.configure_optimizers: Callable[[], tuple[list[Optimizer], list[Any]]] | None = None
        self.when_exchanged: Callable[[], None] | None = None
        self.transfer_batch: Callable[[Batch, torch.device, int], Batch] | None = None
        self._run_backward: Function | None = None

    @property
    def optimizers(self) -> list[Optimizer]:
        """What the module steps; a program may exchange them in the middle of a fit."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, optimizers: list[Optimizer]) -> None:
        self._optimizers = optimizers
        if self.when_exchanged is not None:
            self.when_exchanged()

    @property
    def _strategy(self) -> Any:
        return self  # this class is mixed into Strategy alone, which stands above it

    def is_overridden(self, name: str) -> bool:
        """Return whether a subclass replaces one of the names of this class.

        Example:
            >>> from levin.strategies import SingleDeviceStrategy
            >>> SingleDeviceStrategy().is_overridden("batch_to_device")
            False
        """
        return getattr(type(self), name) is not getattr(ExtensionPoints, name)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Add this class to a registry under its names."""

    lightning_module: Any = reads(
        "_lightning_module", "The one module of a Trainer, as the user wrote it; None before there is one."
    )
    precision_plugin: Precision = reads("precision", "Another name for :attr:`precision`.")
    cluster_environment: ClusterEnvironment | None = reads("environment", "Another name for :attr:`environment`.")

    # From set-up to teardown

    def connect(self, model: Module) -> None:
        """Take note of the Trainer's module, before it is set up."""
        self._lightning_module = self.model = model

    def setup(self, trainer: Any) -> None:
        """Set up the module and, in fit, its optimizers.

        Args:
            trainer: The Trainer that runs.
        """
        self._strategy.accelerator.setup(trainer)
        self._strategy.setup_module(self.lightning_module, for_training=self.configure_optimizers is not None)
        if self.configure_optimizers is not None:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def model_to_device(self) -> None:
        """Move the module to the device of this process."""
        self._strategy.module_to_device(self.lightning_module)

    def setup_optimizers(self, trainer: Any) -> None:
        """Ask the module for its optimizers and set them up; they are in :attr:`optimizers` afterwards.

        Args:
            trainer: The Trainer that runs.
        """
        assert self.configure_optimizers is not None
        optimizers, self.lr_scheduler_configs = self.configure_optimizers()
        self.optimizers = [self._strategy.setup_optimizer(optimizer, self.lightning_module) for optimizer in optimizers]

    def setup_precision_plugin(self) -> None:
        """Let the precision replace the module, the optimizers or the schedulers."""
        model, self.optimizers, self.lr_scheduler_configs = self._strategy.precision.connect(
            self.model, self.optimizers, self.lr_scheduler_configs
        )
        self.model = model

    # The step

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step."""
        return self._strategy.compose_step(self.model, "training_step")(*args, **kwargs)

    def post_training_step(self) -> None:
        """Run after each training step, before its backward pass where the Trainer runs that."""

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's validation step."""
        return self._strategy.compose_step(self.model, "validation_step")(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's test step."""
        return self._strategy.compose_step(self.model, "test_step")(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's predict step."""
        return self._strategy.compose_step(self.model, "predict_step")(*args, **kwargs)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Run before each backward pass."""

    def post_backward(self, closure_loss: Tensor) -> None:
        """Run after each backward pass."""

    def block_backward_sync(self) -> AbstractContextManager[object]:
        """Return a context in which backward leaves the gradients of this process to itself."""
        context: AbstractContextManager[object] = self._strategy.no_sync(self.model)
        return context

    # Talking to the other processes

    def all_reduce(self, tensor: Tree, group: Group = None, reduce_op: object = "mean") -> Tree:
        """Return the tensor reduced over all processes; another name for :meth:`Strategy.reduce`."""
        return self._strategy.reduce(tensor, group=group, reduce_op=reduce_op)

    # Batches and state

    def transfer_function(
        self, chain: Callable[[Batch, torch.device, int], Batch] | None
    ) -> Callable[[Batch, torch.device, int], Batch] | None:
        """Return what brings the Trainer's batches to the device: ``chain``, or an override of :meth:`batch_to_device`.

        Args:
            chain: The module's own transfer hooks; None for the default alone.
        """
        self.transfer_batch = chain
        if not self.is_overridden("batch_to_device"):
            return chain

        def transfer(batch: object, device: torch.device, dataloader_idx: int) -> Any:
            return self.batch_to_device(batch, dataloader_idx=dataloader_idx)

        return transfer

    def process_dataloader(self, dataloader: object) -> object:
        """Return what is iterated in place of the user's loader."""
        return dataloader

    def batch_to_device(self, batch: Batch, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Return the batch on ``device``, by default the device of this process, through the module's transfer hooks."""
        device = self._strategy.root_device if device is None else device
        if self.transfer_batch is None:
            return move_data_to_device(batch, device)
        return self.transfer_batch(batch, device, dataloader_idx)

    def lightning_module_state_dict(self) -> StateDict:
        """Return the weights as they are saved. Runs in every process."""
        state: StateDict = self._strategy.module_state(self.model)
        return state

    def load_model_state_dict(self, checkpoint: StateDict, strict: bool = True) -> None:
        """Load ``checkpoint["state_dict"]`` into the module.

        Raises:
            KeyError: There is none.
        """
        if "state_dict" not in checkpoint:
            raise KeyError(f"The checkpoint has no 'state_dict', of weights; it holds {sorted(map(str, checkpoint))}.")
        self._strategy.load_module_state(self.model, checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: StateDict) -> None:
        """Load ``checkpoint["optimizer_states"]`` into the optimizers."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._strategy.load_optimizer_state(optimizer, state, self.model)

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make new tensors on the device and in the number format of this run.

        Args:
            empty_init: Whether ``torch.nn.init`` leaves memory as it is, for weights that are loaded anyway.
        """
        with ExitStack() as stack:
            stack.enter_context(self._strategy.root_device)
            stack.enter_context(self._strategy.precision.tensor_init_context())
            if empty_init:
                stack.enter_context(SkipInit())
            yield

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Stand around ``configure_model``, for strategies that shard modules while they are made."""
        yield

    # Moments

    def on_train_start(self) -> None:
        """Run when training starts."""

    def on_train_end(self) -> None:
        """Run when training ends."""

    def on_validation_start(self) -> None:
        """Run when a validation starts."""

    def on_validation_end(self) -> None:
        """Run when a validation ends."""

    def on_test_start(self) -> None:
        """Run when a test starts."""

    def on_test_end(self) -> None:
        """Run when a test ends."""

    def on_predict_start(self) -> None:
        """Run when a prediction starts."""

    def on_predict_end(self) -> None:
        """Run when a prediction ends."""

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Run when a training batch starts."""
