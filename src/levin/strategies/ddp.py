"""A copy of the module in every process, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from levin.strategies import collectives
from levin.strategies.contexts import in_forward_context, run_as_forward
from levin.strategies.late_parameters import LateParameters
from levin.strategies.parallel import DEFAULT_TIMEOUT, ParallelStrategy, check_start_method
from levin.utilities.exceptions import MisconfigurationException, add_hint
from levin.utilities.types import Function, Kwargs

if TYPE_CHECKING:
    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.environments.environment import ClusterEnvironment
    from levin.precision.precision import Precision

_EVALUATION_STEPS = ("validation_step", "test_step", "predict_step")
_SET_BY_US = ("self", "module", "device_ids", "output_device")
# Of a wrapper that is made again, beside its hooks.
_KEPT = ("training", "require_backward_grad_sync", "require_forward_param_sync")


class DDPStrategy(ParallelStrategy):
    """A copy of the module in every process; gradients are averaged while the backward pass runs.

    The module is wrapped in DistributedDataParallel for training only, and each training step goes through the wrapper's
    ``forward``. Evaluation runs the plain module: it needs nothing from other processes, so it cannot hang on them.

    Args:
        accelerator: The hardware.
        parallel_devices: One device per process of this machine.
        cluster_environment: Who starts the processes.
        checkpoint_io: Writes and reads checkpoints.
        precision: The number format.
        precision_plugin: Another name for ``precision``.
        ddp_comm_state: State of ``ddp_comm_hook``.
        ddp_comm_hook: Exchanges the gradients in place of DistributedDataParallel, for example
            ``torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook``.
        ddp_comm_wrapper: Wraps ``ddp_comm_hook``.
        model_averaging_period: With a ``PostLocalSGDState``: average the weights every so many steps.
        process_group_backend: torch.distributed's transport; NCCL on CUDA, otherwise Gloo, when None.
        timeout: How long a process waits for the others before it gives up, until its first batch is done.
        start_method: ``"popen"`` starts the script again for each process; ``"spawn"``, ``"fork"`` and ``"forkserver"``
            start processes that run the function alone and bring its results back.
        step_timeout: How long a process waits from its first batch on. When None, 10 minutes, or ``timeout`` where
            another one is given.
        uneven: When an epoch ends for ranks with different numbers of training batches: ``"longest"``, ``"shortest"``
            or ``"error"``; see :class:`ParallelStrategy`.
        kwargs: Passed to DistributedDataParallel, for example ``find_unused_parameters=True`` or ``static_graph=True``.

    Raises:
        ValueError: ``start_method`` or a keyword is unknown, or the machine cannot fork.

    Example:
        >>> DDPStrategy(find_unused_parameters=True).ddp_kwargs
        {'find_unused_parameters': True}
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        ddp_comm_state: object | None = None,
        ddp_comm_hook: Function | None = None,
        ddp_comm_wrapper: Function | None = None,
        model_averaging_period: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: str = "popen",
        precision_plugin: Precision | None = None,
        step_timeout: timedelta | None = None,
        uneven: str = "longest",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            step_timeout=step_timeout,
            uneven=uneven,
        )
        check_start_method(start_method)
        _check_ddp_kwargs(kwargs)
        if ddp_comm_wrapper is not None and ddp_comm_hook is None:
            raise MisconfigurationException(
                f"ddp_comm_wrapper wraps a ddp_comm_hook, received {ddp_comm_wrapper!r} without one. Pass ddp_comm_hook."
            )
        self.ddp_kwargs: Kwargs = kwargs
        self._start_method = start_method
        self._comm_state = ddp_comm_state
        self._comm_hook = ddp_comm_hook
        self._comm_wrapper = ddp_comm_wrapper
        self._averaging_period = _averaging_period(ddp_comm_state, model_averaging_period)
        self._averagers: list[RemovableHandle] = []
        self._stepping: list[ref[Optimizer]] = []
        self._has_replaced_layers = False

    def _configure_launcher(self) -> None:
        """Start the script again, or processes that run one function, as ``start_method`` says."""
        self.launch_by(self._start_method)

    # From set-up to teardown

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Return the module in DistributedDataParallel; for evaluation, and when nothing learns, the module itself.

        Either way all processes end up with the weights of rank 0.
        """
        is_trainers = module is self.lightning_module
        self.check_same_module(module, for_training)
        if for_training and self.layer_sync is not None:
            module = self.layer_sync.apply(module)
            self._has_replaced_layers = True
        if not for_training or not any(parameter.requires_grad for parameter in module.parameters()):
            collectives.sync_tensors(_tensors_to_sync(module))
            return module
        if not is_trainers:
            return self._in_ddp(module)
        self.model = module
        self.configure_ddp()
        wrapped: Module = self.model
        return wrapped

    def configure_ddp(self) -> None:
        """Put :attr:`model`, the Trainer's module, into DistributedDataParallel; called in fit alone."""
        self.model = self._in_ddp(self.model)

    def determine_ddp_device_ids(self) -> list[int] | None:
        """Return the ``device_ids`` of DistributedDataParallel: the GPU of this process, None on the CPU."""
        return [self.root_device.index] if self.root_device.type == "cuda" else None

    def _in_ddp(self, module: Module) -> Module:
        wrapper = DistributedDataParallel(module, device_ids=self.determine_ddp_device_ids(), **self.ddp_kwargs)
        self._register_comm_hook(wrapper)
        vars(wrapper)["late_parameters"] = LateParameters(wrapper, self._stepping)
        # A compiler cannot trace it; where none was imported, none has the wrapper.
        has_compiler = "torch._dynamo" in sys.modules
        wrapper.register_forward_pre_hook(torch.compiler.disable(self._follow) if has_compiler else self._follow)
        return wrapper

    def _follow(self, wrapper: Any, args: object) -> None:
        """Before a forward pass: average what has come to learn."""
        if wrapper.late_parameters.are_there(wrapper):
            self._wrap_again(wrapper)

    def _register_comm_hook(self, wrapper: DistributedDataParallel) -> None:
        if self._comm_hook is not None:
            hook = self._comm_hook if self._comm_wrapper is None else self._comm_wrapper(self._comm_hook)
            wrapper.register_comm_hook(state=self._comm_state, hook=hook)

    def _wrap_again(self, wrapper: Any) -> None:
        """Let the wrapper average the gradients of the parameters that learn now; new ones get the values of rank 0."""
        new = wrapper.late_parameters.made_since(wrapper)
        self.check_same_module(wrapper.module)
        collectives.sync_tensors(new)
        # The same object again, since others hold it. What they hung on it stays, as does its place in a window.
        kept = {name: value for name, value in vars(wrapper).items() if name in _KEPT or "hook" in name}
        kwargs = {**self.ddp_kwargs, "init_sync": False}
        DistributedDataParallel.__init__(wrapper, wrapper.module, device_ids=self.determine_ddp_device_ids(), **kwargs)
        vars(wrapper).update(kept, _comm_hooks=[])
        if wrapper.static_graph:  # see no_sync
            wrapper.require_backward_grad_sync = True
        self._register_comm_hook(wrapper)
        vars(wrapper)["late_parameters"] = LateParameters(wrapper, self._stepping)

    def unwrap(self, module: Module) -> Module:
        """Return the module inside of DistributedDataParallel."""
        return module.module if isinstance(module, DistributedDataParallel) else module

    @override
    def copied_parameters(self, module: Module) -> list[Tensor]:
        if self._comm_hook is not None:  # which may let them drift apart on purpose
            return []
        ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
        # A user's strategy may spread parameters over the processes: those with `to_local` are parts and no copies.
        return [
            parameter
            for name, parameter in module.named_parameters()
            if name not in ignored and not hasattr(parameter, "to_local")
        ]

    def setup_optimizer(self, optimizer: Optimizer, module: Module | None = None) -> Optimizer:
        """Return the optimizer, and let it average the weights after its steps where that is asked for."""
        self._stepping.append(ref(optimizer))
        if self._averaging_period is not None:
            warmup_steps = getattr(self._comm_state, "start_localSGD_iter", 0)
            self._averagers.append(average_after_steps(optimizer, self._averaging_period, warmup_steps))
        return optimizer

    def _remove_averagers(self) -> None:
        for handle in self._averagers:
            handle.remove()
        self._averagers = []

    def on_exception(self, exception: BaseException) -> None:
        """Say what to do about the commonest error of DistributedDataParallel."""
        super().on_exception(exception)
        add_hint(
            exception,
            "Expected to have finished reduction in the prior iteration",
            "Some parameters took no part in computing the loss. If that is intended, use "
            "strategy='ddp_find_unused_parameters_true', or DDPStrategy(find_unused_parameters=True).",
        )

    def teardown(self) -> None:
        """Unwrap the module, put replaced layers back and free the device."""
        if self.lightning_module is not None:
            if self._has_replaced_layers and self.layer_sync is not None:
                self.layer_sync.revert(self.lightning_module)
                self._has_replaced_layers = False
            self.model = self.lightning_module
        self._remove_averagers()
        self._stepping.clear()
        super().teardown()

    # The step

    def compose_step(self, module: Module, name: str) -> Function:
        """Return the method; but for steps of evaluation it goes through the wrapper's ``forward``."""
        if not isinstance(module, DistributedDataParallel) or name in _EVALUATION_STEPS:
            return super().compose_step(self.unwrap(module), name)
        # The context is inside of the wrapper, where torch.compile finds one function in it and not the wrapper's parts.
        step = in_forward_context(getattr(module.module, name), self.precision, name)
        return run_through(module, module.module, step)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Arm the gradient reduction for a backward pass inside of ``training_step`` (manual optimization).

        Also for one of parameters that were thawed in the step.
        """
        wrapper = self.model
        if not isinstance(wrapper, DistributedDataParallel):
            return
        late = vars(wrapper).get("late_parameters")
        if late is not None and late.are_thawed():
            self._wrap_again(wrapper)
        elif _is_automatic(self.lightning_module):
            return
        # DistributedDataParallel does this itself at the end of its forward, which has not been reached yet.
        if torch.is_grad_enabled() and wrapper.require_backward_grad_sync:
            wrapper.require_forward_param_sync = True
            # Also left to the next forward by torch; another backward may come before it.
            wrapper.reducer._rebuild_buckets()
            should_search = wrapper.find_unused_parameters and not wrapper.static_graph
            wrapper.reducer.prepare_for_backward([closure_loss] if should_search else [])
        else:
            wrapper.require_forward_param_sync = False

    def post_backward(self, closure_loss: Tensor) -> None:
        """Reduce the gradients of the first backward pass of a static graph that began with :meth:`pre_backward`."""
        wrapper = self.model
        if not isinstance(wrapper, DistributedDataParallel):
            return
        if _is_learning_its_graph(wrapper) and wrapper.require_backward_grad_sync:
            # Which parameters take part is known only now. DistributedDataParallel would have reduced them by a mark that
            # it sets at the end of its forward.
            wrapper.reducer._delay_all_reduce()  # type: ignore[attr-defined]  # torch leaves it out of its stubs
            wrapper._static_graph_delay_allreduce_enqueued = True

    def no_sync(self, module: Module, enabled: bool = True) -> AbstractContextManager[object]:
        """Return a context in which backward leaves the gradients of this process to itself.

        Raises:
            TypeError: The module is not wrapped in DistributedDataParallel.
        """
        if not enabled:
            return nullcontext()
        if not isinstance(module, DistributedDataParallel):
            raise TypeError(
                f"no_sync needs a module in DistributedDataParallel, received {type(module).__name__}. Set the module up "
                "for training first."
            )
        if _is_learning_its_graph(module):
            # Its first backward pass has to be reduced. The sum of the window is the same: means of means.
            return nullcontext()
        context: AbstractContextManager[object] = module.no_sync()
        return context

    def on_validation_start(self) -> None:
        """Give all processes the buffers of rank 0, for example the statistics of batch normalization."""
        wrapper = self.model
        if isinstance(wrapper, DistributedDataParallel) and wrapper.broadcast_buffers:
            collectives.sync_tensors(buffer for name, buffer in _named_buffers(self.lightning_module))


def average_after_steps(optimizer: Optimizer, period: int, warmup_steps: int) -> RemovableHandle:
    """Let an optimizer average its parameters over all processes after some of its steps.

    Args:
        optimizer: The optimizer.
        period: Average after every so many steps.
        warmup_steps: Steps at the beginning that are not followed by an average.

    Returns:
        A handle that takes it back.

    Raises:
        ValueError: The optimizer spreads or averages parameters itself.
    """
    if type(optimizer).__name__ in ("PostLocalSGDOptimizer", "ZeroRedundancyOptimizer", "DistributedOptimizer"):
        raise MisconfigurationException(
            f"model_averaging_period cannot be used with {type(optimizer).__name__}, which spreads or averages weights "
            "itself. Leave one of them out."
        )
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

    averager: Any = PeriodicModelAverager(period=period, warmup_steps=warmup_steps)

    def average(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        averager.average_parameters(optimizer.param_groups)

    return optimizer.register_step_post_hook(average)


def run_through(wrapper: DistributedDataParallel, module: Module, step: Function) -> Function:
    """Return a callable that runs ``step`` where ``wrapper.forward`` expects ``module.forward``.

    The wrapper prepares and finishes its work in its own ``forward``, and calls the module there.
    """
    if _is_automatic(module):
        return run_as_forward(wrapper, module, step)

    def without_sync(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        # The backward passes are over: the wrapper must not wait for one after its forward.
        wrapper.require_backward_grad_sync = False
        return result

    redirected = run_as_forward(wrapper, module, without_sync)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return redirected(*args, **kwargs)
        finally:
            wrapper.require_backward_grad_sync = True

    return run


def _is_learning_its_graph(wrapper: DistributedDataParallel) -> bool:
    """Whether the wrapper was told that its graph is always the same, and has not seen a backward pass of it yet."""
    return bool(wrapper.static_graph) and not wrapper._static_graph_delay_allreduce_enqueued


def _is_automatic(module: Any) -> bool:
    return bool(getattr(module, "automatic_optimization", True))


def _tensors_to_sync(module: Module) -> Iterator[Tensor]:
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, parameter in module.named_parameters():
        if name not in ignored:
            yield parameter
    for _, buffer in _named_buffers(module):
        yield buffer


def _named_buffers(module: Module) -> Iterator[tuple[str, Tensor]]:
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    return ((name, buffer) for name, buffer in module.named_buffers() if name not in ignored)


def _check_ddp_kwargs(kwargs: Kwargs) -> None:
    known = [name for name in inspect.signature(DistributedDataParallel.__init__).parameters if name not in _SET_BY_US]
    unknown = [name for name in kwargs if name not in known]
    if unknown:
        raise MisconfigurationException(
            f"DDPStrategy takes the keywords of DistributedDataParallel, received {', '.join(unknown)}. "
            f"Use one of: {', '.join(known)}."
        )


def _averaging_period(state: object | None, period: int | None) -> int | None:
    is_local = type(state).__name__ == "PostLocalSGDState"
    if period is None:
        if is_local:
            raise MisconfigurationException(
                "ddp_comm_state is a PostLocalSGDState, with which processes drift apart, and model_averaging_period is "
                "None. Set model_averaging_period to the number of steps between two averages."
            )
        return None
    if not isinstance(period, int) or period < 1:
        raise MisconfigurationException(
            f"model_averaging_period must be an int >= 1, received {period!r}. Use 4 to average every fourth step."
        )
    if not is_local:
        raise MisconfigurationException(
            f"model_averaging_period={period} needs ddp_comm_state=PostLocalSGDState(...), received "
            f"{type(state).__name__}: without it the gradients are averaged in every step already."
        )
    return period
