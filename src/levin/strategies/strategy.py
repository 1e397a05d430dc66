"""How a module is placed and wrapped, how processes talk, and how state is gathered: what every strategy answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from levin.checkpoint.io import save_tree
from levin.checkpoint.layout import is_sharded
from levin.precision.choose import choose_precision
from levin.precision.precision import Precision
from levin.strategies.contexts import in_forward_context, run_as_forward
from levin.strategies.data_parallel import DataParallelGroup
from levin.strategies.extension_points import ExtensionPoints
from levin.strategies.parts import StrategyParts
from levin.utilities.clipping import by_mesh, clip_by_norm, clip_by_value
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.move import move_module, move_optimizer
from levin.utilities.states import GradClipAlgorithmType
from levin.utilities.types import Closure, Function, Group, StateDict, Tree

if TYPE_CHECKING:
    import os

T = TypeVar("T")


class Strategy(StrategyParts, ExtensionPoints, ABC):
    """Places and wraps modules, talks to the other processes, steps optimizers, gathers state.

    One tree of strategies serves Trainer and Fabric. A strategy knows neither loops nor callbacks, and keeps no list of
    what it set up: each verb names the module or the optimizer that it speaks of, so that there can be several of them.
    What a new strategy must implement is abstract here; what it may change, by the question it answers::

        where is everything     root_device, is_global_zero, world_size, global_rank, local_rank, node_rank, data_parallel,
                                distributed_sampler_kwargs
        number formats          precision_for
        modules                 check_module, module_init_context, module_to_device, wrap_module, unwrap, copied_parameters
        the step                setup_optimizer, compose_step, backward, no_sync, scale_gradients, clip_gradients, optimizer_step
        other processes         reduce, all_gather, broadcast, barrier, meet, reduce_boolean_decision, abandon_peers
        state                   module_state, load_module_state, optimizer_state, own_optimizer_state, load_optimizer_state,
                                window_gradients, load_window_gradients
        files                   default_checkpoint_io, save_checkpoint, finish_saves, load_checkpoint, remove_checkpoint
        the life of a run       assemble, take_devices, setup_environment, on_exception, teardown

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

    keeps_open_windows: bool = True
    """Whether the gradients of an accumulation window that is open can be saved; otherwise a signal waits for its end."""

    restore_checkpoint_after_setup: bool = False
    """Whether weights can be loaded only after the module was set up, because that is what shards it."""

    supports_inference_mode: bool = True
    """Whether evaluation may run under ``torch.inference_mode``; ``torch.no_grad`` otherwise."""

    def precision_for(self, name: str, device: torch.device) -> Precision:
        """Return the number format of a name for modules that this strategy sets up.

        Args:
            name: In full, for example ``"bf16-mixed"``.
            device: The device of a process.

        Raises:
            ValueError: This strategy, or the device, cannot do it.
        """
        return choose_precision(name, device.type)

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
    def data_parallel(self) -> DataParallelGroup:
        """The processes that see different data: all of them, unless a subclass cuts modules over some."""
        return DataParallelGroup(self.global_rank, self.world_size)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any] | None:
        """``num_replicas`` and ``rank`` for samplers; None when every process shall see all data."""
        return None

    # Modules and optimizers

    def setup_environment(self) -> None:
        """Prepare the device of this process and connect it with the others. Runs in every process, once."""
        self.accelerator.setup_device(self.root_device)

    def setup_module(self, module: Module, for_training: bool = True, move_to_device: bool = True) -> Module:
        """Bring a module into its number format and onto the device, and wrap it where the strategy does so.

        Args:
            module: The user's module.
            for_training: Whether gradients will be computed.
            move_to_device: Whether to move it; otherwise the user has placed it.

        Returns:
            The wrapped module, or ``module`` itself.
        """
        is_trainers = module is self.lightning_module
        module = self.precision.convert_module(module)
        if is_trainers:
            self._lightning_module = self.model = module
        if move_to_device and is_trainers:
            self.model_to_device()
        elif move_to_device:
            self.module_to_device(module)
        wrapped = self.wrap_module(module, for_training)
        if is_trainers:
            self.model = wrapped
        return wrapped

    def module_to_device(self, module: Module) -> None:
        """Move a module to the device of this process."""
        move_module(module, self.root_device)

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Return ``module``, which is on the device already, in what connects its copies or parts on all processes."""
        return module

    def unwrap(self, module: Module) -> Module:
        """Return the user's module inside of what :meth:`setup_module` returned."""
        return module

    def copied_parameters(self, module: Module) -> list[Tensor]:
        """Return the parameters of which every process shall hold the same copy; none where they are spread.

        Args:
            module: The user's module.
        """
        return []

    def setup_optimizer(self, optimizer: Optimizer, module: Module | None = None) -> Optimizer:
        """Return an optimizer as this strategy steps it.

        Args:
            optimizer: The user's, made of parameters of the module after it was set up.
            module: The module whose parameters it steps, where that is known.
        """
        return optimizer

    def on_exception(self, exception: BaseException) -> None:
        """Run when the run fails."""
        self.checkpoint_io.on_exception(exception)

    def teardown(self) -> None:
        """Move the Trainer's module and the states of its optimizers to the CPU and free the device."""
        for optimizer in self.optimizers:
            move_optimizer(optimizer, torch.device("cpu"))
        if self.lightning_module is not None:
            move_module(self.lightning_module, torch.device("cpu"))
            self.model = self.lightning_module
        self.configure_optimizers = self.when_exchanged = self.transfer_batch = self._run_backward = None
        self.precision.before_step = None
        self.precision.teardown()
        if self._accelerator is not None:
            self._accelerator.teardown()
        self.checkpoint_io.teardown()

    # The step

    def step_function(self, module: Module, name: str) -> Function:
        """Return the callable that runs a method of a module that was set up.

        On one device in single precision this is the module's own bound method.

        Args:
            module: As :meth:`setup_module` returned it.
            name: For example ``training_step``.

        Raises:
            ValueError: The module has no such method.
        """
        user_module = self.lightning_module if module is self.model else self.unwrap(module)
        if not callable(getattr(user_module, name, None)):
            raise MisconfigurationException(
                f"name must be a method of {type(user_module).__name__}, received {name!r}. Define it, or correct the name."
            )
        if module is not self.model or not hasattr(ExtensionPoints, name):
            return self.compose_step(module, name)
        # A strategy of the user's may replace a step of the Trainer's module; then that is what runs.
        step: Function = getattr(self, name) if self.is_overridden(name) else self.compose_step(module, name)
        return self._followed(step) if name == "training_step" and self.is_overridden("post_training_step") else step

    def compose_step(self, module: Module, name: str) -> Function:
        """Return the module's method in what the strategy puts around it; see :meth:`step_function`."""
        step = getattr(module, name, None)
        if step is None:  # of what a precision put around the Trainer's module
            step = run_as_forward(module, self.lightning_module, getattr(self.lightning_module, name))
        return in_forward_context(step, self.precision, name)

    def _followed(self, step: Callable[..., object]) -> Callable[..., object]:
        def followed(*args: object, **kwargs: object) -> object:
            result = step(*args, **kwargs)
            self.post_training_step()
            return result

        return followed

    def backward_function(self, optimizer: Optimizer | None, inner: Function) -> Function:
        """Return ``backward(loss, *args, **kwargs)`` for the Trainer: ``inner`` in what strategy and precision add.

        Args:
            optimizer: Shown to overrides; None where the user steps optimizers.
            inner: Runs the Trainer's hooks and the backward pass itself.
        """
        names = ("pre_backward", "post_backward")
        is_plain = all(getattr(type(self.precision), name) is getattr(Precision, name) for name in names)
        if is_plain and type(self).backward is Strategy.backward and not any(map(self.is_overridden, names)):
            return inner
        self._run_backward = inner

        def backward(loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.backward(loss, optimizer, *args, **kwargs)

        return backward

    def backward(
        self,
        closure_loss: Tensor,
        optimizer: Optimizer | None = None,
        *args: Any,
        module: Module | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run a backward pass as the precision wants it.

        Args:
            closure_loss: The loss, a scalar.
            optimizer: The optimizer that is stepped next, for precisions that need it.
            args: Passed to ``Tensor.backward``.
            module: The module it is of; by default that of the Trainer.
            kwargs: Passed to ``Tensor.backward``.

        Returns:
            The loss as it comes out, scaled where there is a loss scale.
        """
        owner = self.lightning_module if module is None else module
        self.pre_backward(closure_loss)
        loss = self.precision.pre_backward(closure_loss, owner)
        if module is None and self._run_backward is not None:
            self._run_backward(loss, *args, **kwargs)
        else:
            self.precision.backward(loss, owner, optimizer, *args, **kwargs)
        loss = self.precision.post_backward(loss, owner)
        self.post_backward(loss)
        return loss

    def no_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[object]:
        """Return a context in which backward leaves the gradients of this process to itself.

        Args:
            module: As :meth:`setup_module` returned it.
            enabled: Whether to; False gives a context that does nothing.
        """
        return nullcontext()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Closure | None = None,
        model: Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step an optimizer; see :meth:`levin.precision.Precision.optimizer_step`.

        Args:
            optimizer: As :meth:`setup_optimizer` returned it.
            closure: Computes the loss and the gradients; None where they are there.
            model: The module whose parameters are stepped; by default that of the Trainer.
            kwargs: Passed to the optimizer.
        """
        owner = self.lightning_module if model is None else model
        return self.precision.optimizer_step(optimizer, model=owner, closure=closure, **kwargs)

    def scale_gradients(self, optimizer: Optimizer, factor: Any) -> None:
        """Multiply the gradients of an optimizer's parameters by a number, or a tensor with one."""
        for parameters in by_mesh(p for group in optimizer.param_groups for p in group["params"]).values():
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def clip_gradients(
        self,
        module: Module,
        optimizer: Optimizer,
        clip_val: float | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
    ) -> Tensor | None:
        """Clip the gradients of the parameters of an optimizer, which are unscaled already.

        Args:
            module: The module whose parameters they are.
            optimizer: As :meth:`setup_optimizer` returned it.
            clip_val: Largest absolute value.
            max_norm: Largest norm over all parameters. One of the two is given.
            norm_type: p of the p-norm; ``inf`` for the largest absolute value.
            error_if_nonfinite: Whether a norm that is nan or infinite is an error.

        Returns:
            The norm before clipping; None with ``clip_val``, and where a precision of the user's clips.

        Raises:
            ValueError: None, or both, of ``clip_val`` and ``max_norm`` are given.
            RuntimeError: The optimizer unscales gradients itself, inside of its step; or the norm is not finite and
                ``error_if_nonfinite`` is set.
        """
        if (clip_val is None) == (max_norm is None):
            raise MisconfigurationException(
                f"clip_gradients takes one of clip_val and max_norm, received {clip_val!r} and {max_norm!r}. "
                "Use max_norm to bound the length of the gradient, clip_val to bound each element."
            )
        if self.precision.clips_gradients:
            algorithm = GradClipAlgorithmType.VALUE if max_norm is None else GradClipAlgorithmType.NORM
            self.precision.clip_gradients(optimizer, clip_val or max_norm or 0.0, algorithm)
            return None
        self.precision.check_unscaled(optimizer)
        parameters = self.precision.main_params(optimizer)
        if max_norm is None:
            assert clip_val is not None
            clip_by_value(parameters, clip_val)
            return None
        return clip_by_norm(parameters, max_norm, norm_type, error_if_nonfinite, self.join_norms, self.counts_in_norm)

    # Talking to the other processes

    @abstractmethod
    def reduce(self, tensor: Tree, group: Group = None, reduce_op: object = "mean") -> Tree:
        """Return the tensor reduced over all processes.

        Args:
            tensor: A tensor of the same shape in every process; a collection of tensors is reduced leaf by leaf.
            group: The processes that take part; all when None.
            reduce_op: ``"mean"`` (or ``"avg"``), ``"sum"``, ``"min"``, ``"max"``, ``"product"``, or a ``ReduceOp``.
        """

    @abstractmethod
    def all_gather(self, tensor: Tensor, group: Group = None, sync_grads: bool = False) -> Tensor:
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

    def meet(self, what: str) -> None:
        """Wait, over the CPU, until all processes are about to do ``what``; raise in all where some are about to do something else."""

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether all processes (or any of them) say yes, the same answer everywhere."""
        return decision

    # State

    def module_state(self, module: Module) -> StateDict:
        """Return the weights of a module as they are saved. Runs in every process.

        Args:
            module: As :meth:`setup_module` returned it.
        """
        state: StateDict = self.unwrap(module).state_dict()
        return state

    def load_module_state(self, module: Module, state: StateDict, strict: bool = True) -> None:
        """Load the weights of a module. Runs in every process.

        Args:
            module: As :meth:`setup_module` returned it; the user's module before that, unless
                :attr:`restore_checkpoint_after_setup`.
            state: As :meth:`module_state` returned it.
            strict: Whether the names must be the same.
        """
        self.unwrap(module).load_state_dict(state, strict=strict)

    def optimizer_state(self, optimizer: Optimizer, module: Module | None = None) -> StateDict:
        """Return the state of an optimizer as it is saved. Runs in every process.

        Args:
            optimizer: As :meth:`setup_optimizer` returned it.
            module: The module whose parameters it steps; by default that of the Trainer.
        """
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: StateDict, module: Module | None = None) -> None:
        """Load the state of an optimizer. Runs in every process.

        Args:
            optimizer: As :meth:`setup_optimizer` returned it.
            state: As :meth:`optimizer_state` returned it.
            module: The module whose parameters it steps; by default that of the Trainer.
        """
        optimizer.load_state_dict(state)

    def window_gradients(self, module: Module) -> list[Tensor | None]:
        """Return a copy of the gradients of an accumulation window that is still open, in the order of parameters.

        Args:
            module: As :meth:`setup_module` returned it.
        """
        return [None if param.grad is None else param.grad.detach().clone() for param in module.parameters()]

    def load_window_gradients(self, module: Module, gradients: list[Tensor | None]) -> None:
        """Take up :meth:`window_gradients`. Runs in every process."""
        for param, gradient in zip(module.parameters(), gradients):
            param.grad = None if gradient is None else gradient.to(param.device, param.dtype)

    def save_checkpoint(
        self, checkpoint: StateDict, filepath: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        """Write a checkpoint, from the process that has to; all processes call this."""
        save_tree(self.checkpoint_io, checkpoint, filepath, storage_options, self.is_global_zero)

    def finish_saves(self) -> None:
        """Wait for what is being saved in the background; all processes call this.

        Raises:
            Exception: What a save failed with.
        """
        self.checkpoint_io.wait()
        self.checkpoint_io.check()

    def load_checkpoint(self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None) -> StateDict:
        """Return a checkpoint, its tensors on the CPU; the folder that several processes wrote as one tree, too."""
        if is_sharded(checkpoint_path):
            from levin.checkpoint.folder import consolidate

            self.checkpoint_io.wait()
            return consolidate(checkpoint_path)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Delete a checkpoint, from the process that has to; all processes call this."""
        if self.is_global_zero or self.checkpoint_io.is_collective:
            self.checkpoint_io.remove_checkpoint(filepath)

    # Contexts in which the user makes tensors and modules

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make new modules on the device and in the number format of this run; see :meth:`tensor_init_context`."""
        with self.tensor_init_context(empty_init), self.precision.module_init_context():
            yield
