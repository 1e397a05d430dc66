"""Weights, gradients and optimizer states cut over all processes, by torch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.nn import Module
from typing_extensions import override

from levin.strategies import collectives
from levin.strategies.order import prepare
from levin.strategies.parallel import DEFAULT_TIMEOUT
from levin.strategies.recomputation import checked
from levin.strategies.sharded import ShardedStrategy
from levin.strategies.sharding import ShardingPlan, as_policy, check_cutting_on, made_tensors, recomputation_of
from levin.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.environments.environment import ClusterEnvironment
    from levin.precision.precision import Precision

SHARDING = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2")
# What torch's older class took and ``fully_shard`` does by itself, so that it can be left out.
_DONE_ANYWAY = ("limit_all_gathers", "forward_prefetch", "backward_prefetch", "sync_module_states", "device_id")
_REFUSED = {
    "process_group": "Give device_mesh, for example device_mesh=(2, 4).",
    "param_init_fn": "Make the layers in `configure_model`: their weights are made by `reset_parameters`, block by block.",
    "ignored_modules": "Give ignored_states, the parameters themselves.",
    # The names of fully_shard itself.
    "mp_policy": "Give it as mixed_precision.",
    "offload_policy": "Give it as cpu_offload.",
    "mesh": "Give it as device_mesh.",
    "ignored_params": "Give them as ignored_states.",
    "reshard_after_forward": "Give sharding_strategy: 'FULL_SHARD' is True, 'SHARD_GRAD_OP' is False.",
}


class FSDPStrategy(ShardedStrategy):
    """Every process keeps a part of the weights, gradients and optimizer states, and gathers a block when it is needed.

    The module is cut into blocks, which are found by themselves: the repeated submodules, such as the layers of a
    transformer. Layers that are made in ``configure_model`` are made block by block, so that the whole module never lies
    in the memory of one process. The same strategy runs on GPUs (NCCL) and on CPUs (Gloo).

    Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

    Args:
        accelerator: The hardware.
        parallel_devices: One device per process of this machine.
        cluster_environment: Who starts the processes.
        precision: The number format.
        process_group_backend: torch.distributed's transport; on CUDA NCCL with Gloo for the CPU, otherwise Gloo, when None.
        timeout: How long a process waits for the others before it gives up, until its first batch is done.
        cpu_offload: Whether the parts lie in the memory of the host, and the optimizer steps there.
        mixed_precision: Number formats of gathered weights and of the reduction of gradients, as torch's
            ``MixedPrecisionPolicy``; by default what ``Trainer(precision=...)`` says.
        auto_wrap_policy: What becomes a block: a set of classes, a ``ModuleWrapPolicy``, or a function of a submodule.
        activation_checkpointing: The same as ``activation_checkpointing_policy``.
        activation_checkpointing_policy: ``"full"``: blocks keep their input alone, and compute the rest again in backward;
            ``"selective"``: their matrix products and attention, too; ``"none"``. A number from 0 to 1: how much of the
            blocks' activations may be kept, by leaving out blocks evenly. Or which submodules, chosen as by
            ``auto_wrap_policy``.
        sharding_strategy: ``"FULL_SHARD"``; ``"SHARD_GRAD_OP"`` keeps gathered weights until backward is over;
            ``"HYBRID_SHARD"`` cuts within a machine and copies between machines.
        state_dict_type: ``"full"`` saves one file, ``"sharded"`` a folder into which every process writes its part.
        device_mesh: ``(replicas, shards)``, or a DeviceMesh of these two dimensions.
        checkpoint_io: Writes and reads full checkpoints.
        precision_plugin: Another name for ``precision``.
        step_timeout: How long a process waits from its first batch on; see :class:`ParallelStrategy`.
        uneven: When an epoch ends for ranks with different numbers of batches; see :class:`ParallelStrategy`.
        ignored_states: Parameters that every process keeps whole.
        kwargs: Further arguments of torch's older class, which are done in any case, or refused.

    Raises:
        MisconfigurationException: An argument that cannot be met, with the way out.

    Example:
        >>> FSDPStrategy(auto_wrap_policy={torch.nn.TransformerEncoderLayer}).sharding_strategy
        'FULL_SHARD'
    """

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        precision: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        cpu_offload: Any = None,
        mixed_precision: Any = None,
        auto_wrap_policy: Any = None,
        activation_checkpointing: Any = None,
        activation_checkpointing_policy: Any = None,
        sharding_strategy: Any = "FULL_SHARD",
        state_dict_type: Literal["full", "sharded"] = "full",
        device_mesh: tuple[int, int] | DeviceMesh | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
        step_timeout: timedelta | None = None,
        uneven: str = "longest",
        ignored_states: Any = None,
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
        _check_older_arguments(kwargs)
        if state_dict_type not in ("full", "sharded"):
            raise MisconfigurationException(
                f"state_dict_type must be 'full' or 'sharded', received {state_dict_type!r}. Use 'full' for one file."
            )
        if activation_checkpointing is not None and activation_checkpointing_policy is not None:
            raise MisconfigurationException(
                "activation_checkpointing and activation_checkpointing_policy are the same argument, received both. "
                "Pass activation_checkpointing_policy."
            )
        self.sharding_strategy: str = _sharding_name(sharding_strategy)
        self.state_dict_type: str = state_dict_type
        self.saves_folders = state_dict_type == "sharded"
        self.cpu_offload: bool = bool(getattr(cpu_offload, "offload_params", cpu_offload))
        self._mixed_precision = _mixed_precision(mixed_precision)
        self._auto_wrap_policy = auto_wrap_policy
        given = activation_checkpointing if activation_checkpointing_policy is None else activation_checkpointing_policy
        self._recomputes = checked(given)
        self._given_mesh = device_mesh
        self._ignored = frozenset(ignored_states or ())

    def check_mesh(self, world_size: int) -> None:
        """Raise before a process starts when the mesh does not fit the number of processes, or torch cannot cut there."""
        check_cutting_on(self.root_device)
        if isinstance(self._given_mesh, tuple) and self._given_mesh[0] * self._given_mesh[1] != world_size:
            replicas, shards = self._given_mesh
            raise MisconfigurationException(
                f"device_mesh={self._given_mesh} is made for {replicas * shards} processes, but there are {world_size} "
                f"(devices={self.num_processes}, num_nodes={self.num_nodes}). Choose numbers whose product is {world_size}."
            )

    # Modules and optimizers

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self.cpu_offload and self.root_device.type != "cpu" and "cpu:" not in dist.get_backend_config():
            raise MisconfigurationException(
                "cpu_offload=True keeps weights on the CPU, and the process group of this process carries "
                f"{dist.get_backend_config()!r} alone. Leave process_group_backend out, and make no process group before."
            )

    def make_mesh(self) -> DeviceMesh:
        """Return ``(shards,)``, or ``(replicas, shards)``."""
        if isinstance(self._given_mesh, DeviceMesh):
            return self._given_mesh
        device = self.root_device.type
        shape = self._given_mesh or (self.num_nodes, self.num_processes)
        if self._given_mesh is not None or "HYBRID" in self.sharding_strategy:
            return init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(device, (self.world_size,), mesh_dim_names=("shard",))

    def module_to_device(self, module: Module) -> None:
        """Leave the module where it is: its blocks come to the device one by one, when they are cut."""

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Cut the module, in place, and return it. All processes begin with the weights of rank 0."""
        if isinstance(module, FSDPModule):
            return module
        assert self.device_mesh is not None
        self.check_same_module(module, for_training)
        collectives.sync_tensors(made_tensors(module), device=self.root_device)
        is_on_gpu = self.root_device.type != "cpu"
        is_unit = as_policy(self._auto_wrap_policy, module, "auto_wrap_policy")
        plan = ShardingPlan(
            mesh=self.device_mesh,
            is_unit=is_unit,
            recomputes=recomputation_of(self._recomputes, module, is_unit),
            reshard_after_forward=self.sharding_strategy in ("FULL_SHARD", "HYBRID_SHARD"),
            mixed_precision=self._mixed_precision or _policy_of(self.precision.precision),
            offload=CPUOffloadPolicy() if self.cpu_offload and is_on_gpu else None,
            ignored=self._ignored,
            cuts_children=not getattr(module, "automatic_optimization", True),
        )
        prepare(module, plan)
        self.let_go_in_hooks(module)
        return module

    # Contexts

    @contextmanager
    def module_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Make new modules without memory; they get it block by block when they are cut.

        Args:
            empty_init: False makes them at once, on the CPU.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.device("cpu" if empty_init is False else "meta"))
            stack.enter_context(self.precision.tensor_init_context())
            stack.enter_context(self.precision.module_init_context())
            yield


def _policy_of(precision: str) -> MixedPrecisionPolicy | None:
    """Return in which format weights are gathered for a precision; the sum of gradients stays in single precision."""
    formats = {"bf16-mixed": torch.bfloat16, "float8": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in formats:
        return None
    # Autocast converts the inputs of each operation, and keeps those in single precision that need it.
    return MixedPrecisionPolicy(param_dtype=formats[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)


def _mixed_precision(value: object) -> MixedPrecisionPolicy | None:
    """Return torch's policy, also out of its older class, which has a format for buffers as well."""
    if value is None or isinstance(value, MixedPrecisionPolicy):
        return value
    if not hasattr(value, "param_dtype") or not hasattr(value, "reduce_dtype"):
        raise MisconfigurationException(
            f"mixed_precision must be a torch.distributed.fsdp.MixedPrecisionPolicy, received {value!r}. "
            "Use MixedPrecisionPolicy(param_dtype=torch.bfloat16), or Trainer(precision='bf16-mixed')."
        )
    return MixedPrecisionPolicy(
        param_dtype=value.param_dtype,
        reduce_dtype=value.reduce_dtype,
        cast_forward_inputs=getattr(value, "cast_forward_inputs", True),
    )


def _sharding_name(value: object) -> str:
    name = str(getattr(value, "name", value))
    if name == "NO_SHARD":
        raise MisconfigurationException(
            "sharding_strategy='NO_SHARD' keeps a copy of everything in every process. Use strategy='ddp' for that."
        )
    if name not in SHARDING:
        raise MisconfigurationException(
            f"sharding_strategy must be one of {', '.join(SHARDING)}, received {value!r}. Use 'FULL_SHARD'."
        )
    return name


def _check_older_arguments(kwargs: dict[str, object]) -> None:
    """Raise where an argument of torch's older class asks for what ``fully_shard`` does not do."""
    if kwargs.pop("use_orig_params", True) is False:
        raise MisconfigurationException(
            "use_orig_params=False joins parameters, which fully_shard never does. Leave it out."
        )
    for name in _DONE_ANYWAY:
        kwargs.pop(name, None)
    for name in kwargs:
        way_out = _REFUSED.get(name, "Leave it out.")
        raise MisconfigurationException(f"FSDPStrategy cannot do {name}={kwargs[name]!r}. {way_out}")
