"""Processes in several dimensions: some share each layer (tensor parallel), some have layers of their own (pipeline), the
others share data and weights (FSDP2).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from levin.checkpoint.layout import StateElsewhere
from levin.strategies import collectives, stage_state, state_of
from levin.strategies.context import share_sequences
from levin.strategies.contexts import in_forward_context
from levin.strategies.data_parallel import DataParallelGroup
from levin.strategies.gathered import cut_as
from levin.strategies.layer_plan import STYLES, apply_plan, first_names
from levin.strategies.order import prepare
from levin.strategies.parallel import DEFAULT_TIMEOUT
from levin.strategies.recomputation import SELECTIVE, checked
from levin.strategies.sharded import ShardedStrategy
from levin.strategies.sharding import (
    ShardingPlan,
    WeightMaker,
    check_cutting_on,
    made_tensors,
    recomputation_of,
    repeated_blocks,
)
from levin.strategies.stages import PipelinePlan, body_of, leave_out, parts_of, stages_in, stages_of, users_of
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Function, Group, StateDict

if TYPE_CHECKING:
    from levin.precision.precision import Precision
    from levin.strategies.pipeline import Pipeline
    from levin.strategies.replay import Replay

DATA, TENSOR, PIPELINE, CONTEXT = "data_parallel", "tensor_parallel", "pipeline_parallel", "context_parallel"
# The two dimensions of the data-parallel processes, where some of them keep copies.
COPIES, SHARDS = "copies", "shards"


class ModelParallelStrategy(ShardedStrategy):
    """Cuts layers over some processes, gives others layers of their own, and cuts data over the rest.

    ``configure_model`` may cut the module itself, with torch's functions and ``self.device_mesh``, whose dimensions are
    ``"data_parallel"`` and ``"tensor_parallel"``. What it leaves whole is cut here: layers that ``plan`` names over the
    tensor-parallel processes, and blocks over the data-parallel ones.

    Source: https://docs.pytorch.org/docs/stable/distributed.tensor.parallel.html

    Args:
        data_parallel_size: Processes that see different data; ``"auto"`` for the number of machines.
        tensor_parallel_size: Processes that share each layer; ``"auto"`` for the processes of a machine.
        save_distributed_checkpoint: Whether every process writes its part into a folder; otherwise rank 0 writes one file.
        process_group_backend: torch.distributed's transport; on CUDA NCCL with Gloo for the CPU, otherwise Gloo, when None.
        timeout: How long a process waits for the others before it gives up, until its first batch is done.
        plan: Pattern of a submodule's name -> ``"column"``, ``"row"``, ``"sequence"`` or a ``ParallelStyle``.
        copies: Of the weights, among the data-parallel processes: each copy is cut over ``data_parallel_size / copies`` of
            them. The mesh has the dimensions ``"copies"`` and ``"shards"`` then, in the place of ``"data_parallel"``.
        pipeline_parallel_size: Processes that have layers of their own, through which parts of a batch go one after another.
            Its layers are found in the order in which the module holds them; ``"pipeline_parallel"`` is the first dimension of
            the mesh then.
        pipeline_split: Names of the layers that the later processes begin with; None for as many layers each.
        pipeline_schedule: ``"1f1b"``; ``"gpipe"`` runs all forward passes first; ``"interleaved"`` gives each process two
            stages, or more that ``pipeline_split`` names.
        num_microbatches: Parts of a batch; twice ``pipeline_parallel_size`` when None. A batch that cannot be cut into so
            many equal parts is cut into fewer.
        context_parallel_size: Processes that share each sequence, in the repeated blocks of the module: there each has a part
            of it, and in ``scaled_dot_product_attention`` a part of the heads. Inputs of blocks are ``(batch, sequence,
            features)``. ``"context_parallel"`` is a dimension of the mesh then, after ``"data_parallel"``.
        activation_checkpointing: As for :class:`FSDPStrategy`.

    Raises:
        MisconfigurationException: The sizes are no counts, ``copies`` does not divide ``data_parallel_size``, a style is
            unknown, or what is said of the pipeline does not fit together; or sequences are to be shared beside copies or a
            pipeline.

    Example:
        >>> strategy = ModelParallelStrategy(2, 2, plan={"net.*.up": "column", "net.*.down": "row"})
        >>> strategy.tensor_parallel_size
        2
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        plan: Mapping[str, str | ParallelStyle] | None = None,
        copies: int = 1,
        pipeline_parallel_size: int = 1,
        pipeline_split: Sequence[str] | None = None,
        pipeline_schedule: str = "1f1b",
        num_microbatches: int | None = None,
        context_parallel_size: int = 1,
        activation_checkpointing: Any = None,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise MisconfigurationException(f"{name} must be 'auto' or an int >= 1, received {size!r}. Use 'auto'.")
        for name, count in (("copies", copies), ("context_parallel_size", context_parallel_size)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise MisconfigurationException(
                    f"{name} must be an int >= 1, received {count!r}. Use 1 to cut without {name}."
                )
        if context_parallel_size > 1 and (copies > 1 or pipeline_parallel_size > 1):
            raise MisconfigurationException(
                f"context_parallel_size={context_parallel_size} goes beside data_parallel_size and tensor_parallel_size alone, received "
                f"copies={copies} and pipeline_parallel_size={pipeline_parallel_size}. Leave these out."
            )
        if activation_checkpointing == SELECTIVE and context_parallel_size > 1:
            raise MisconfigurationException(
                "activation_checkpointing='selective' cannot be used with context_parallel_size > 1, where blocks are tried out in "
                f"their first step, received {context_parallel_size}. Use 'full'."
            )
        self._recomputes = checked(activation_checkpointing)
        if self._recomputes is not None and pipeline_parallel_size > 1:
            raise MisconfigurationException(
                f"activation_checkpointing={activation_checkpointing!r} does not go with pipeline_parallel_size > 1, received "
                f"{pipeline_parallel_size}. Use torch.utils.checkpoint in the layers."
            )
        for pattern, style in (plan or {}).items():
            if not isinstance(style, ParallelStyle) and style not in STYLES:
                raise MisconfigurationException(
                    f"plan[{pattern!r}] must be one of {', '.join(map(repr, STYLES))} or a ParallelStyle, received {style!r}."
                )
        self.data_parallel_size: int | str = data_parallel_size
        self.tensor_parallel_size: int | str = tensor_parallel_size
        self.copies: int = copies
        self.context_parallel_size: int = context_parallel_size
        # Both of its dimensions in one, where there are copies.
        self._all_data: DeviceMesh | None = None
        # Those with other data and those with other parts of a sequence in one, where sequences are shared.
        self._sharers: DeviceMesh | None = None
        self.saves_folders = save_distributed_checkpoint
        self.plan: dict[str, str | ParallelStyle] = dict(plan or {})
        self.pipeline_plan = PipelinePlan(pipeline_parallel_size, pipeline_split, pipeline_schedule, num_microbatches)
        self._pipeline: Pipeline | None = None
        # Those of the whole module.
        self._state_names: list[str] = []
        self._own_state: set[str] = set()
        self._first_names: dict[str, str] = {}
        self._counted_elsewhere: set[str] = set()
        self._parameter_names: list[str] = []

    # How processes are laid out

    def _sizes(self) -> tuple[int, int]:
        data, tensor = self.data_parallel_size, self.tensor_parallel_size
        return (
            self.num_nodes if isinstance(data, str) else data,
            self.num_processes if isinstance(tensor, str) else tensor,
        )

    def check_mesh(self, world_size: int) -> None:
        """Raise before a process starts when the sizes do not multiply to the number of processes, or torch cannot cut there."""
        if self.pipeline_plan.size > 1 and self.root_device.type == "cpu":
            from levin.strategies.pipeline import check_cpu  # slow to import

            check_cpu()
        data, tensor = self._sizes()
        others = {
            "pipeline_parallel_size": self.pipeline_plan.size,
            "context_parallel_size": self.context_parallel_size,
        }
        needed = data * tensor * math.prod(others.values())
        if needed != world_size:
            times = "".join(f" times {name}={size}" for name, size in others.items() if size > 1)
            raise MisconfigurationException(
                f"data_parallel_size={data} times tensor_parallel_size={tensor}{times} must be the number of processes, which is "
                f"{world_size} (devices={self.num_processes}, num_nodes={self.num_nodes}). Choose sizes whose product is "
                f"{world_size}, or leave one out and set devices={needed}."
            )
        if data % self.copies:
            raise MisconfigurationException(
                f"copies={self.copies} must divide data_parallel_size={data}: each copy of the weights is cut over as many "
                f"processes. Use copies={data} for copies that are not cut over data-parallel processes at all."
            )
        if data * self.context_parallel_size > 1:
            check_cutting_on(self.root_device)

    def make_mesh(self) -> DeviceMesh:
        """Return ``(data_parallel, tensor_parallel)``: processes next to each other share layers, those far apart have others."""
        data, tensor = self._sizes()
        sizes = {PIPELINE: self.pipeline_plan.size} if self.pipeline_plan.size > 1 else {}
        sizes |= {DATA: data} if self.copies == 1 else {COPIES: self.copies, SHARDS: data // self.copies}
        sizes |= {CONTEXT: self.context_parallel_size} if self.context_parallel_size > 1 else {}
        sizes |= {TENSOR: tensor}
        mesh = init_device_mesh(self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        if self.copies > 1:
            self._all_data = mesh[COPIES, SHARDS]._flatten(DATA)
        if self.context_parallel_size > 1:
            self._sharers = mesh[DATA, CONTEXT]._flatten("weights")
        return mesh

    @property
    def data_parallel(self) -> DataParallelGroup:
        """The processes that see different data; those that share layers or sequences, or have other layers, see the same."""
        mesh = self.device_mesh
        if mesh is None:
            data, tensor = self._sizes()
            return DataParallelGroup(self.global_rank // (tensor * self.context_parallel_size) % data, data)
        line = mesh[DATA] if self._all_data is None else self._all_data
        ranks = line.mesh.flatten().tolist()
        return DataParallelGroup(line.get_local_rank(), len(ranks), line.get_group(), tuple(ranks))

    # Modules

    @override
    def precision_for(self, name: str, device: torch.device) -> Precision:
        if self.pipeline_plan.size > 1 and name == "16-mixed":
            raise MisconfigurationException(
                "precision='16-mixed' scales the loss before its backward pass, and a pipeline runs both in one. Use 'bf16-mixed'."
            )
        return super().precision_for(name, device)

    @override
    def check_module(self, module: Module) -> None:
        if self.pipeline_plan.size == 1 or self._is_cut(module):
            return
        if not getattr(module, "automatic_optimization", True):
            raise MisconfigurationException(
                f"A pipeline runs forward and backward of a batch at once, in parts, and {type(module).__name__} has "
                "automatic_optimization=False. Use automatic optimization, or another strategy."
            )
        if next(module.parameters(), None) is None:
            return  # layers that `configure_model` makes are checked after that
        stages_in(module, self.pipeline_plan)

    def module_to_device(self, module: Module) -> None:
        """Move the module to the device; one that is not made yet, and that of a pipeline, when it has been cut."""
        if self.pipeline_plan.size == 1 and not any(parameter.is_meta for parameter in module.parameters()):
            super().module_to_device(module)

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Cut what ``configure_model`` left whole, in place, and return the module."""
        assert self.device_mesh is not None
        if self._is_cut(module):
            module.to(self.root_device)
            return module
        is_cut = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        if not is_cut:
            self.check_same_module(module, for_training)
            collectives.sync_tensors(made_tensors(module), device=self.root_device)
        is_by_hand = any(isinstance(part, FSDPModule) for part in module.modules())
        data = self._sharers or (self.device_mesh[DATA] if self._all_data is None else self.device_mesh[COPIES, SHARDS])
        is_cut_here = not is_by_hand and data.size() > 1
        make_weights = self._weight_maker(module)
        cut_stages = None
        if self.pipeline_plan.size > 1:
            from levin.strategies.replay import Replay  # slow to import

            self._check_trains_by_itself(module)
            layers, stages = stages_in(module, self.pipeline_plan)
            # What layers give is found out with whole ones, before they are shared or left out.
            cut_stages = partial(
                self._cut_into_stages,
                stages=stages,
                replay=Replay(module, layers, stages, self.root_device),
                make_weights=make_weights,
            )
        prepare(
            module,
            ShardingPlan(
                mesh=data if is_cut_here else None,
                recomputes=recomputation_of(self._recomputes, module),
                make_weights=make_weights,
            ),
            cut_layers=self._cut_layers,
            cut_stages=cut_stages,
            share_sequences=partial(self._share_sequences, is_by_hand=is_by_hand)
            if self.context_parallel_size > 1
            else None,
        )
        if not is_cut_here:
            _make_all(module, make_weights, self.root_device)
        self.let_go_in_hooks(module)
        return module

    @override
    def wholes(self) -> Sequence[Module]:
        return super().wholes() if self._pipeline is None else self._pipeline.stages

    def _weight_maker(self, module: Module) -> WeightMaker:
        """Return what makes the module's layers for all processes that have them."""
        assert self.device_mesh is not None
        names = [name for name in self.device_mesh.mesh_dim_names or () if name != PIPELINE]
        return WeightMaker(module, self.root_device, self.device_mesh[tuple(names)])

    def _cut_layers(self, module: Module) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh[TENSOR]
        if self.plan:
            apply_plan(module, mesh, self.plan)
        if mesh.size() > 1 and not any(map(_is_cut_over_layers, module.parameters())):
            raise MisconfigurationException(
                f"{mesh.size()} processes are to share each layer, and no layer of {type(module).__name__} is cut. Cut it in "
                f"`configure_model` with self.device_mesh['{TENSOR}'], or pass "
                "ModelParallelStrategy(plan={'blocks.*.up': 'column', 'blocks.*.down': 'row'})."
            )

    def _share_sequences(self, module: Module, is_by_hand: bool) -> None:
        blocks = repeated_blocks(module)
        if is_by_hand or not blocks:
            what = "is cut by `fully_shard` in `configure_model`" if is_by_hand else "has no repeated blocks"
            raise MisconfigurationException(
                f"context_parallel_size={self.context_parallel_size} shares sequences in the repeated blocks of a module (of a "
                f"ModuleList, ModuleDict or Sequential), which it cuts itself, and {type(module).__name__} {what}. Change that, or "
                "use context_parallel_size=1."
            )
        assert self.device_mesh is not None
        share_sequences(blocks, self.device_mesh[CONTEXT].get_group())

    def _is_cut(self, module: Module) -> bool:
        return self._pipeline is not None and self._pipeline.module is module

    def _check_trains_by_itself(self, module: Module) -> None:
        if module is not self.lightning_module:
            raise MisconfigurationException(
                "A pipeline runs forward and backward of a batch at once, in parts, which a loop of one's own does not, received "
                f"a {type(module).__name__} in Fabric. Use the Trainer, or torch.distributed.pipelining itself."
            )

    def _cut_into_stages(
        self, module: Module, stages: list[list[str]], replay: Replay, make_weights: WeightMaker
    ) -> Sequence[Module]:
        from levin.strategies.pipeline import Pipeline, local_of  # slow to import

        assert self.device_mesh is not None
        plan = self.pipeline_plan
        own = range(self.device_mesh[PIPELINE].get_local_rank(), plan.num_stages, plan.size)
        self._state_names = list(module.state_dict())
        self._parameter_names = [name for name, _ in module.named_parameters()]
        stage_of_state = stages_of(self._state_names, stages)
        self._own_state = {name for name, stage in stage_of_state.items() if stage in own}
        users = users_of(module, stages)
        self._first_names = first_names(module)
        leave_out(module, [name for name, found in users.items() if found.isdisjoint(own)], replay.without_values)
        _make_all(module, make_weights, self.root_device)
        of_several = {
            name: sorted(users[name])
            for name, _ in module.named_parameters()
            if len(users[name]) > 1 and not users[name].isdisjoint(own)
        }
        shared = {name: self._group_of_stages(found) for name, found in of_several.items()}
        for name, group in shared.items():
            # Those that were made here are made anew in each.
            dist.broadcast(local_of(module.get_parameter(name).detach()), group=group, group_src=0)
        self._counted_elsewhere = {name for name, found in of_several.items() if found[0] not in own}
        data = self.data_parallel
        self._pipeline = Pipeline(
            plan,
            module,
            body_of(stages),
            replay,
            [parts_of(module, {name for name, found in users.items() if number in found}) for number in own],
            self.device_mesh[PIPELINE].get_group(),
            data.group if data.size > 1 else None,
            shared,
            self.root_device,
        )
        self.join_norms, self.counts_in_norm = self._join_norms, self._counts_in_norm
        return self._pipeline.stages

    def _group_of_stages(self, numbers: Sequence[int]) -> Group:
        """Return a process group of the processes that have these stages, this one among them."""
        assert self.device_mesh is not None
        ranks = self.device_mesh[PIPELINE].mesh[[number % self.pipeline_plan.size for number in numbers]].tolist()
        group: Group = dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True)
        return group

    # The step

    @override
    def compose_step(self, module: Module, name: str) -> Function:
        if self._pipeline is None:
            return super().compose_step(module, name)
        if name != "training_step":
            return self._pipeline.evaluation_step(super().compose_step(module, name))
        return self._pipeline.training_step(in_forward_context(getattr(module, name), self.precision, name))

    def _join_norms(self, norm: Tensor) -> Tensor:
        norms: Tensor = collectives.all_gather(norm, group=self._stage_group, device=self.root_device)
        return norms

    def _counts_in_norm(self, parameter: Tensor) -> bool:
        assert self._pipeline is not None
        return not any(parameter is self._pipeline.module.get_parameter(name) for name in self._counted_elsewhere)

    # State

    @property
    def _stage_group(self) -> Group:
        assert self.device_mesh is not None
        return self.device_mesh[PIPELINE].get_group()

    @override
    def module_state(self, module: Module) -> StateDict:
        state = super().module_state(module)
        if self._pipeline is None:
            return state
        # Buffers are in all stages.
        state = {name: value for name, value in state.items() if name in self._own_state}
        if self.saves_folders:
            return state
        others = {name: first for name, first in self._first_names.items() if name != first}
        state = {name: value for name, value in state.items() if name not in others}
        state = stage_state.gathered(state, self._state_names, self._stage_group)
        shared = {name: state[first] for name, first in others.items() if first in state}
        return stage_state.in_order({**state, **shared}, self._state_names)

    @override
    def names_elsewhere(self) -> Collection[str]:
        return self._state_names

    @override
    def load_module_state(self, module: Module, state: Any, strict: bool = True) -> None:
        if self._pipeline is not None and not isinstance(state, StateElsewhere):
            elsewhere = set(self._state_names) - set(module.state_dict())
            state = {name: value for name, value in state.items() if name not in elsewhere}
        super().load_module_state(module, state, strict)

    @override
    def optimizer_state(self, optimizer: Optimizer, module: Module | None = None) -> StateDict:
        if self._pipeline is None:
            return super().optimizer_state(optimizer, module)
        state = state_of.optimizer_state(self._pipeline.module, optimizer, is_numbered=False)
        state["param_groups"] = stage_state.joined_groups(
            state["param_groups"], self._parameter_names, self._stage_group
        )
        if self.saves_folders:
            return state
        state["state"] = stage_state.gathered(state["state"], self._parameter_names, self._stage_group)
        return state_of.numbered(state) if self._pipeline.is_first else {}

    @override
    def own_optimizer_state(self, optimizer: Optimizer, state: Any) -> Any:
        if self._pipeline is None or isinstance(state, StateElsewhere):
            return state
        groups = state_of.optimizer_state(self._pipeline.module, optimizer, is_numbered=False)["param_groups"]
        joined = stage_state.joined_groups(groups, self._parameter_names, self._stage_group)
        return stage_state.own_numbers(
            state, [group["params"] for group in groups], [group["params"] for group in joined]
        )

    @override
    def window_gradients(self, module: Module) -> list[Tensor | None]:
        if self._pipeline is None:
            gradients = super().window_gradients(module)
            if self.context_parallel_size > 1:
                # Those of a block are of a part of the sequence in each process; loaded in all, they count as often.
                assert self.device_mesh is not None
                gradients = collectives.reduce(gradients, group=self.device_mesh[CONTEXT].get_group())
            return gradients
        own = {name: parameter.grad for name, parameter in module.named_parameters()}
        return list(stage_state.gathered(own, self._parameter_names, self._stage_group).values())

    @override
    def load_window_gradients(self, module: Module, gradients: list[Tensor | None]) -> None:
        if self._pipeline is None:
            super().load_window_gradients(module, gradients)
            return
        # torch's schedules have reduced them, so they belong to the parameters that the module shows.
        of_name = dict(zip(self._parameter_names, gradients, strict=True))
        for name, parameter in module.named_parameters():
            gradient = of_name[name]
            parameter.grad = None if gradient is None else cut_as(parameter, gradient.to(parameter.dtype))


def _make_all(module: Module, make_weights: WeightMaker, device: torch.device) -> None:
    for part in module.modules():
        make_weights(part)
    module.to(device)


def _is_cut_over_layers(parameter: torch.nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and TENSOR in (parameter.device_mesh.mesh_dim_names or ())
