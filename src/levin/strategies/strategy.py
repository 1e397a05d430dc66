"""How a module is placed and wrapped, how processes talk, and how state is gathered: what every strategy answers."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from levin.precision.precision import Precision
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.move import move_data_to_device

if TYPE_CHECKING:
    import os

    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.environments.environment import ClusterEnvironment
    from levin.launchers.launcher import Launcher
    from levin.strategies.layer_sync import LayerSync

T = TypeVar("T")
STEP_NAMES = ("training_step", "validation_step", "test_step", "predict_step")


@dataclass
class GivenParts:
    """What the user passed to a strategy's constructor; None stands for "levin may choose"."""

    accelerator: Accelerator | None = None
    precision: Precision | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None
    parallel_devices: list[torch.device] | None = None


class Strategy(ABC):
    """Places and wraps the module, talks to the other processes, steps the optimizer, gathers the state.

    One tree of strategies serves Trainer and Fabric. A strategy knows neither loops nor callbacks.

    Args:
        accelerator: The hardware; chosen by the engine when None.
        checkpoint_io: Writes and reads checkpoints; local and remote files in torch's format when None.
        precision: The number format; chosen by the engine when None.
        precision_plugin: Another name for ``precision``.

    Raises:
        ValueError: Both ``precision`` and ``precision_plugin`` are given.
    """

    is_distributed: bool = False
    """Whether there is a process group to talk over."""

    handles_gradient_accumulation: bool = False
    """Whether the engine underneath accumulates gradients itself, so that the loop must not."""

    restore_checkpoint_after_setup: bool = False
    """Whether weights can be loaded only after the module was set up, because that is what shards it."""

    lightning_restore_optimizer: bool = True
    """Whether the checkpoint's optimizer states are loaded by the caller."""

    supports_inference_mode: bool = True
    """Whether evaluation may run under ``torch.inference_mode``; ``torch.no_grad`` otherwise."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        if precision is not None and precision_plugin is not None:
            raise MisconfigurationException(
                f"precision and precision_plugin are the same argument, received {precision!r} and "
                f"{precision_plugin!r}. Pass one of them."
            )
        self.given = GivenParts(
            accelerator=accelerator, precision=precision or precision_plugin, checkpoint_io=checkpoint_io
        )
        self._accelerator: Accelerator | None = accelerator
        self._checkpoint_io: CheckpointIO | None = checkpoint_io
        self.precision: Precision = self.given.precision or Precision()
        self.environment: ClusterEnvironment | None = None
        self.launcher: Launcher | None = None
        self.layer_sync: LayerSync | None = None
        self.num_nodes: int = 1
        self.model: Module | None = None
        self.lightning_module: Any = None
        self.optimizers: list[Optimizer] = []
        self.lr_scheduler_configs: list[Any] = []

    # What it is made of

    @property
    def accelerator(self) -> Accelerator:
        """The hardware.

        Raises:
            RuntimeError: None was given and no engine has chosen one yet.
        """
        if self._accelerator is None:
            raise RuntimeError(
                f"{type(self).__name__} has no accelerator yet. Pass it to Trainer(strategy=...), or give it accelerator=..."
            )
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes and reads checkpoints."""
        if self._checkpoint_io is None:
            from levin.checkpoint.io import TorchCheckpointIO

            self._checkpoint_io = TorchCheckpointIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: CheckpointIO) -> None:
        self._checkpoint_io = checkpoint_io

    @property
    def precision_plugin(self) -> Precision:
        """Another name for :attr:`precision`."""
        return self.precision

    @property
    def cluster_environment(self) -> ClusterEnvironment | None:
        """Another name for :attr:`environment`."""
        return self.environment

    def assemble(
        self,
        *,
        accelerator: Accelerator,
        precision: Precision,
        parallel_devices: list[torch.device],
        num_nodes: int = 1,
        environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        layer_sync: LayerSync | None = None,
    ) -> None:
        """Take the parts that the engine chose, before any process is started.

        Args:
            accelerator: The hardware.
            precision: The number format.
            parallel_devices: One device per process of this machine.
            num_nodes: Number of machines.
            environment: Who starts the processes; None in a single process.
            checkpoint_io: Writes and reads checkpoints; the default when None.
            layer_sync: Makes layers aware of other processes in training; none when None.
        """
        self._accelerator = accelerator
        self.precision = precision
        self.num_nodes = num_nodes
        self.environment = environment
        self._checkpoint_io = checkpoint_io or self.given.checkpoint_io
        self.layer_sync = layer_sync

    # Where this process stands

    @property
    @abstractmethod
    def root_device(self) -> torch.device:
        """The device of this process."""

    @property
    @abstractmethod
    def is_global_zero(self) -> bool:
        """Whether this process is the first of all."""

    @property
    def world_size(self) -> int:
        """Number of processes over all machines."""
        return 1

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return 0

    @property
    def local_rank(self) -> int:
        """Index of this process on its machine."""
        return 0

    @property
    def node_rank(self) -> int:
        """Index of this machine."""
        return 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` for samplers; None when every process shall see all data."""
        return None

    # From set-up to teardown

    def setup_environment(self) -> None:
        """Prepare the device of this process and connect it with the others. Runs in every process, once."""
        self.accelerator.setup_device(self.root_device)

    def connect(self, model: Module) -> None:
        """Take note of the user's module, before it is set up."""
        self.lightning_module = model
        self.model = model

    def setup_module(self, module: Module, for_training: bool) -> Module:
        """Bring the module into its number format and onto the device, and wrap it where the strategy does so.

        Args:
            module: The user's module.
            for_training: Whether gradients will be computed.

        Returns:
            The wrapped module, or ``module`` itself; also in :attr:`model`.
        """
        self.connect(self.precision.convert_module(module))
        self.model_to_device()
        self.model = self.wrap_module(self.lightning_module, for_training)
        return self.model

    @abstractmethod
    def model_to_device(self) -> None:
        """Move :attr:`lightning_module` to the device."""

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Return ``module``, which is on the device already, in what connects its copies on all processes."""
        return module

    def setup_optimizers(self, optimizers: list[Optimizer]) -> list[Optimizer]:
        """Return the optimizers as this strategy steps them; also in :attr:`optimizers`."""
        self.optimizers = optimizers
        return optimizers

    def watch_progress(self, place: Callable[[], Any]) -> None:
        """Take note of how to find out where this process is in its run; only those with other processes need it."""

    def annotate_error(self, error: BaseException) -> None:
        """Say in the message of an error what other processes have to do with it. Runs first when the run fails."""

    def on_exception(self, exception: BaseException) -> None:
        """Run when the run fails."""
        if self._checkpoint_io is not None:
            self._checkpoint_io.on_exception(exception)

    def teardown(self) -> None:
        """Move the module and the states of the optimizers to the CPU and free the device."""
        for optimizer in self.optimizers:
            optimizer_to_device(optimizer, torch.device("cpu"))
        if self.lightning_module is not None:
            self.lightning_module.cpu()
            self.model = self.lightning_module
        self.precision.teardown()
        if self._accelerator is not None:
            self._accelerator.teardown()
        if self._checkpoint_io is not None:
            self._checkpoint_io.teardown()

    # The step

    def step_function(self, name: str) -> Callable[..., Any]:
        """Return the callable that runs one step of the user's module.

        On one device in single precision this is the module's own bound method.

        Args:
            name: ``training_step``, ``validation_step``, ``test_step`` or ``predict_step``.

        Raises:
            ValueError: Another name.
        """
        if name not in STEP_NAMES:
            raise MisconfigurationException(f"name must be one of {', '.join(STEP_NAMES)}, received {name!r}.")
        # A strategy of the user's may replace a step; then that is what runs.
        if getattr(type(self), name) is not getattr(Strategy, name):
            return getattr(self, name)  # type: ignore[no-any-return]  # found by name
        return self.compose_step(name)

    def compose_step(self, name: str) -> Callable[..., Any]:
        """Return the module's own step in what the strategy puts around it; see :meth:`step_function`."""
        return in_forward_context(getattr(self.lightning_module, name), self.precision)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's training step; a subclass may replace this."""
        return self.compose_step("training_step")(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's validation step; a subclass may replace this."""
        return self.compose_step("validation_step")(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's test step; a subclass may replace this."""
        return self.compose_step("test_step")(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's predict step; a subclass may replace this."""
        return self.compose_step("predict_step")(*args, **kwargs)

    def pre_backward(self, loss: Tensor) -> None:
        """Prepare for a backward pass that happens inside of ``training_step`` (manual optimization)."""

    def post_backward(self, loss: Tensor) -> None:
        """Clean up after a backward pass that happened inside of ``training_step`` (manual optimization)."""

    def backward(self, loss: Tensor, *args: Any, module: Module | None = None, **kwargs: Any) -> Tensor:
        """Run the backward pass as precision and module want it.

        Args:
            loss: A scalar.
            args: Passed to ``loss.backward``.
            module: The module; by default the one that was set up.
            kwargs: Passed to ``loss.backward``.

        Returns:
            The loss as it comes out, scaled where there is a loss scale.
        """
        self.pre_backward(loss)
        owner = self.lightning_module if module is None else module
        loss = self.precision.pre_backward(loss, owner)
        run = getattr(owner, "backward", None)
        if callable(run):
            run(loss, *args, **kwargs)
        else:
            self.precision.backward(loss, owner, *args, **kwargs)
        loss = self.precision.post_backward(loss, owner)
        self.post_backward(loss)
        return loss

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any] | None = None,
        model: Module | None = None,
        before_step: Callable[[Optimizer], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step the optimizer; see :meth:`levin.precision.Precision.optimizer_step`."""
        owner = self.lightning_module if model is None else model
        return self.precision.optimizer_step(optimizer, model=owner, closure=closure, before_step=before_step, **kwargs)

    def no_sync(self, enabled: bool = True, module: Module | None = None) -> AbstractContextManager[Any]:
        """Return a context in which backward leaves the gradients of this process to itself.

        Args:
            enabled: Whether to; False gives a context that does nothing.
            module: The wrapped module; by default the one that was set up.
        """
        return nullcontext()

    # Talking to the other processes

    @abstractmethod
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the tensor reduced over all processes.

        Args:
            tensor: A tensor of the same shape in every process; a collection of tensors is reduced leaf by leaf.
            group: The processes that take part; all when None.
            reduce_op: ``"mean"`` (or ``"avg"``), ``"sum"``, ``"min"``, ``"max"``, ``"product"``, or a ``ReduceOp``.
        """

    def all_reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return the tensor reduced over all processes; another name for :meth:`reduce`."""
        return self.reduce(tensor, group=group, reduce_op=reduce_op)

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all processes, stacked along a new first dimension; on one device as it is.

        Args:
            tensor: Of the same shape in every process.
            group: The processes that take part; all when None.
            sync_grads: Whether gradients flow back to the process that a part came from.
        """

    @abstractmethod
    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return the object of rank ``src``, any that pickle can carry, in every process."""

    @abstractmethod
    def barrier(self, name: str | None = None) -> None:
        """Wait until all processes are here."""

    def abandon_peers(self) -> None:
        """Take note that the other processes cannot be counted on any more, because this one failed."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes (or any of them) say yes, the same answer everywhere."""
        return decision

    # Batches and state

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Return the batch on ``device``, by default the device of this process."""
        return move_data_to_device(batch, self.root_device if device is None else device)

    def process_dataloader(self, dataloader: object) -> object:
        """Return what is iterated in place of the user's loader."""
        return dataloader

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer as it is saved. Runs in every process."""
        return optimizer.state_dict()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights as they are saved. Runs in every process."""
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:
        """Load ``checkpoint["state_dict"]`` into the module."""
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Load ``checkpoint["optimizer_states"]`` into the optimizers."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint, from the process that has to; all processes call this."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, path: str | os.PathLike[str], weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint, its tensors on the CPU."""
        return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete a checkpoint, from the process that has to; all processes call this."""
        if self.is_global_zero:
            self.checkpoint_io.remove_checkpoint(path)

    # Contexts in which the user makes tensors and modules

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make new tensors on the device and in the number format of this run.

        Args:
            empty_init: Whether ``torch.nn.init`` leaves memory as it is, for weights that are loaded anyway.
        """
        with ExitStack() as stack:
            stack.enter_context(self.root_device)
            stack.enter_context(self.precision.tensor_init_context())
            if empty_init:
                stack.enter_context(SkipInit())
            yield

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make new modules on the device and in the number format of this run; see :meth:`tensor_init_context`."""
        with ExitStack() as stack:
            stack.enter_context(self.root_device)
            stack.enter_context(self.precision.module_init_context())
            if empty_init:
                stack.enter_context(SkipInit())
            yield

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Shard modules while they are made, where the strategy can."""
        yield

    # Moments that a subclass may want to know of

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

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Run when a training batch starts."""


def in_forward_context(step: Callable[..., Any], precision: Precision) -> Callable[..., Any]:
    """Return ``step`` run inside the precision's forward context; ``step`` itself where there is none."""
    if type(precision).forward_context is Precision.forward_context:
        return step
    context = precision.forward_context

    def step_in_context(*args: Any, **kwargs: Any) -> Any:
        with context():
            return step(*args, **kwargs)

    return step_in_context


def optimizer_to_device(optimizer: Optimizer, device: torch.device) -> None:
    """Move the tensors in the state of an optimizer, in place."""
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = move_data_to_device(state, device)


class SkipInit(TorchFunctionMode):
    """While this mode is on, the functions of ``torch.nn.init`` leave their tensor as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Skip ``torch.nn.init``, run everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        # Some of these functions are not announced themselves, only what they do to the tensor.
        is_in_place = getattr(func, "__name__", "").endswith("_") and not func.__name__.endswith("__")
        if is_in_place and sys._getframe(1).f_globals.get("__name__") == "torch.nn.init":
            return args[0]
        return func(*args, **kwargs)
