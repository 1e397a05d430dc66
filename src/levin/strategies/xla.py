"""XLA devices: one process for each, and models cut over all devices of one process."""

from __future__ import annotations

import os
from abc import ABC
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from levin.checkpoint.io import on_host
from levin.precision.choose import choose_precision
from levin.precision.xla import XLAPrecision
from levin.strategies import collectives
from levin.strategies.parallel import DEFAULT_TIMEOUT, ParallelStrategy, check_start_method
from levin.strategies.single_device import OneProcess, SingleDeviceStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.collections import apply_to_collection
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.move import move_data_to_device
from levin.utilities.types import Closure, Function, Group, StateDict, Tree
from levin.utilities.xla_generator import XLA_GENERATOR

if TYPE_CHECKING:
    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.environments.environment import ClusterEnvironment
    from levin.precision.precision import Precision

CPU = torch.device("cpu")


class XLASteps(Strategy, ABC):
    """What all strategies on XLA devices have in common.

    Operations are recorded, and run when somebody reads a value, or when they are sent off. That is done at the beginning of
    each step, for all that came before: a step, its backward pass, its update and its logged values are one program, which is
    compiled once.
    """

    is_for_xla = True
    # A tensor made under it could not be part of a later program that needs gradients.
    supports_inference_mode = False

    @override
    def precision_for(self, name: str, device: torch.device) -> Precision:
        if name in ("32-true", "bf16-true", "16-true"):
            return XLAPrecision(name)
        if name != "bf16-mixed":
            raise MisconfigurationException(
                f"precision={name!r} cannot be used on XLA devices. Use 'bf16-mixed', 'bf16-true', '16-true' or '32-true'."
            )
        return choose_precision(name, "xla")

    @override
    def compose_step(self, module: Module, name: str) -> Function:
        import torch_xla
        import torch_xla.debug.profiler as xp

        step = super().compose_step(module, name)
        arrange = self.arrange_inputs

        def begun(*args: object, **kwargs: object) -> object:
            # A step that is named for the profiler cannot be begun inside of its name, and is sent off at its end.
            if not xp.get_tracer_marked_step():
                torch_xla.sync()
            XLA_GENERATOR.begin_step()
            arrange((args, kwargs))
            return step(*args, **kwargs)

        return begun

    def arrange_inputs(self, inputs: Tree) -> None:
        """Tell XLA how the inputs of a step lie on the devices, where there are several in one process."""

    @override
    def teardown(self) -> None:
        if XLA_GENERATOR.state is not None:
            import torch_xla

            # Each tensor that is moved would be a program of its own.
            torch_xla.sync()
        super().teardown()

    @override
    def save_checkpoint(
        self, checkpoint: StateDict, filepath: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        import torch_xla

        torch_xla.sync()
        super().save_checkpoint(on_host(checkpoint), filepath, storage_options)


class SingleDeviceXLAStrategy(XLASteps, SingleDeviceStrategy):
    """One process on one XLA device.

    Args:
        device: The device, or its index.
        accelerator: The hardware.
        checkpoint_io: Writes and reads checkpoints.
        precision: The number format.
        precision_plugin: Another name for ``precision``.
        debug: Whether torch_xla tells why it compiles and waits.

    Example:
        >>> SingleDeviceXLAStrategy(0).root_device
        device(type='xla', index=0)
    """

    strategy_name = "single_xla"

    def __init__(
        self,
        device: torch.device | str | int = 0,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        debug: bool = False,
    ) -> None:
        place = torch.device("xla", device) if isinstance(device, int) else device
        super().__init__(place, accelerator, checkpoint_io, precision, precision_plugin)
        self._debug = debug

    @override
    def setup_environment(self) -> None:
        set_debug(self._debug)
        super().setup_environment()


class XLAStrategy(XLASteps, ParallelStrategy):
    """A process for each XLA device; gradients are averaged right before the optimizer steps.

    Gradients go from device to device. All else that processes say to each other goes over the hosts, by Gloo. Where the
    devices of several processes are not connected, as on processors that stand in for TPUs, gradients go over the hosts, too.

    Args:
        accelerator: The hardware.
        parallel_devices: One device per process of this machine.
        checkpoint_io: Writes and reads checkpoints.
        precision_plugin: The number format.
        debug: Whether torch_xla tells why it compiles and waits.
        sync_module_states: Whether all processes start from the weights of rank 0.
        cluster_environment: Who starts the processes.
        precision: Another name for ``precision_plugin``.
        timeout: How long a process waits for the others before it gives up.
        start_method: ``"popen"`` starts the script again for each process; ``"spawn"`` and ``"fork"`` start processes that run
            the function alone and bring its results back.
        uneven: When an epoch ends for ranks with different numbers of batches; see :class:`ParallelStrategy`.

    Raises:
        ValueError: ``start_method`` is unknown.

    Example:
        >>> XLAStrategy(debug=True).is_distributed
        True
    """

    process_group_backend = "gloo"

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        debug: bool = False,
        sync_module_states: bool = True,
        cluster_environment: ClusterEnvironment | None = None,
        precision: Precision | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        start_method: str = "popen",
        uneven: str = "longest",
    ) -> None:
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            precision_plugin=precision_plugin,
            timeout=timeout,
            uneven=uneven,
        )
        check_start_method(start_method)
        self._start_method = start_method
        self._debug = debug
        self._should_copy_weights = sync_module_states

    @override
    def _configure_launcher(self) -> None:
        self.launch_by(self._start_method)

    @property
    @override
    def root_device(self) -> torch.device:
        # Each process sees its own device alone.
        return torch.device("xla", 0)

    @property
    def supports_inference_mode(self) -> bool:  # type: ignore[override]  # see ParallelStrategy
        """False: see :class:`XLASteps`."""
        return False

    @override
    def setup_environment(self) -> None:
        from torch_xla._internal import pjrt

        set_debug(self._debug)
        if self.num_processes == 1 and self.num_nodes == 1:
            pjrt.initialize_singleprocess()
        else:
            pjrt.initialize_multiprocess(self.local_rank, self.num_processes)
        super().setup_environment()

    @override
    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        if self._should_copy_weights:
            self.check_same_module(module, for_training)
            collectives.sync_tensors([*module.parameters(), *module.buffers()], device=CPU)
        return module

    # The step

    @override
    def optimizer_step(
        self, optimizer: Optimizer, closure: Closure | None = None, model: Module | None = None, **kwargs: Any
    ) -> Any:
        if closure is None:
            self._average_gradients(optimizer)
            return super().optimizer_step(optimizer, None, model, **kwargs)

        def averaged() -> Tree:
            loss = closure()
            self._average_gradients(optimizer)
            return loss

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    def _average_gradients(self, optimizer: Optimizer) -> None:
        import torch_xla
        import torch_xla.core.xla_model as xm
        from torch_xla import runtime

        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if runtime.world_size() == self.world_size:
            xm.all_reduce(xm.REDUCE_SUM, gradients, scale=1.0 / self.world_size)
            return
        # Each gradient that is read would be a program of its own.
        torch_xla.sync()
        for gradient, mean in zip(gradients, collectives.reduce(gradients, device=CPU), strict=True):
            gradient.copy_(mean)

    # Talking to the other processes

    @property
    @override
    def _transport_device(self) -> torch.device:
        return CPU

    @override
    def reduce(self, tensor: Tree, group: Group = None, reduce_op: object = "mean") -> Tree:
        return move_data_to_device(super().reduce(tensor, group, reduce_op), self.root_device)

    @override
    def all_gather(self, tensor: Tree, group: Group = None, sync_grads: bool = False) -> Tree:
        return move_data_to_device(super().all_gather(tensor, group, sync_grads), self.root_device)


class XLAFSDPStrategy(XLASteps, OneProcess):
    """Weights, gradients and optimizer states cut over all XLA devices of this machine, by one process (SPMD).

    The process sees the model, its batches and its checkpoints whole, as on one device; XLA's compiler cuts the program. A
    batch is that of all devices together.

    Args:
        accelerator: The hardware.
        parallel_devices: The devices.
        checkpoint_io: Writes and reads checkpoints.
        precision: The number format.
        precision_plugin: Another name for ``precision``.
        activation_checkpointing_policy: Classes of modules whose activations are computed again in backward.
        auto_wrap_policy: Taken for compatibility: the compiler decides what is gathered at once.
        state_dict_type: ``"full"``: there is one process, which writes one file.
        sequential_save: Taken for compatibility: there is one process that saves.

    Raises:
        ValueError: ``state_dict_type`` is another one.

    Example:
        >>> XLAFSDPStrategy(activation_checkpointing_policy={torch.nn.Linear}).world_size
        1
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        activation_checkpointing_policy: Collection[type[Module]] | None = None,
        auto_wrap_policy: Collection[type[Module]] | Callable[..., bool] | None = None,
        state_dict_type: str = "full",
        sequential_save: bool = False,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision, precision_plugin)
        if state_dict_type != "full":
            raise MisconfigurationException(
                f"state_dict_type must be 'full' for XLAFSDPStrategy, received {state_dict_type!r}: one process holds all "
                "devices and writes one file. Leave it out."
            )
        self.user_parts.parallel_devices = parallel_devices
        self._num_devices = len(parallel_devices or ())
        self._recomputed = tuple(activation_checkpointing_policy or ())
        self._mesh: Any = None

    @override
    def take_devices(self, parallel_devices: list[torch.device]) -> None:
        self._num_devices = len(parallel_devices)
        if self.num_nodes > 1:
            raise MisconfigurationException(
                f"strategy='xla_fsdp' cuts a model over the devices of one machine, received num_nodes={self.num_nodes}. "
                "Use num_nodes=1, or strategy='xla'."
            )

    @property
    @override
    def root_device(self) -> torch.device:
        return torch.device("xla", 0)

    @override
    def setup_environment(self) -> None:
        from torch_xla import runtime
        from torch_xla.distributed import spmd

        if not runtime.is_spmd():
            runtime.use_spmd()
        super().setup_environment()
        found = runtime.global_runtime_device_count()
        if found != self._num_devices:
            raise MisconfigurationException(
                f"strategy='xla_fsdp' takes all devices, received devices={self._num_devices} where there are {found}. Use "
                f"devices={found}; processors that stand in for TPUs are counted by CPU_NUM_DEVICES."
            )
        self._mesh = spmd.Mesh(list(range(found)), (found,), ("fsdp",))

    @override
    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        from torch_xla.distributed.fsdp import checkpoint_module

        for part in module.modules():
            if isinstance(part, self._recomputed) and not hasattr(part, "_xla_checkpointed_forward_original"):
                checkpoint_module(part)
        for tensor in module.parameters():
            self._cut(tensor)
        return module

    @override
    def arrange_inputs(self, inputs: Tree) -> None:
        apply_to_collection(inputs, Tensor, self._cut)

    def _cut(self, tensor: Tensor) -> None:
        """Cut a tensor in its first dimension, if it can be; a part of a smaller one would be no gain."""
        from torch_xla.distributed import spmd

        if tensor.dim() and tensor.device.type == "xla" and not tensor.shape[0] % self._num_devices:
            spmd.mark_sharding(tensor, self._mesh, ("fsdp", *[None] * (tensor.dim() - 1)))


def set_debug(is_on: bool) -> None:
    """Let torch_xla tell why it compiles and waits, from the start of its runtime on."""
    if is_on:
        os.environ["PT_XLA_DEBUG_LEVEL"] = "2"
