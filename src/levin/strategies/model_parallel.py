"""Processes in two dimensions: some share the layers (tensor parallel), the others share data and weights (FSDP2)."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from datetime import timedelta
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import Module

from levin.strategies import collectives
from levin.strategies.data_parallel import DataParallelGroup
from levin.strategies.parallel import DEFAULT_TIMEOUT
from levin.strategies.sharded import ShardedStrategy
from levin.strategies.sharding import ShardingPlan, apply_sharding
from levin.utilities.exceptions import MisconfigurationException

DATA, TENSOR = "data_parallel", "tensor_parallel"
# The two dimensions of the data-parallel processes, where some of them keep copies.
COPIES, SHARDS = "copies", "shards"
STYLES: dict[str, type[ParallelStyle]] = {
    "column": ColwiseParallel, "row": RowwiseParallel, "sequence": SequenceParallel,
}  # fmt: skip


class ModelParallelStrategy(ShardedStrategy):
    """Cuts layers over some processes and data over the others.

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

    Raises:
        MisconfigurationException: The sizes are no counts, ``copies`` does not divide ``data_parallel_size``, or a style is
            unknown.

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
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        for name, size in (("data_parallel_size", data_parallel_size), ("tensor_parallel_size", tensor_parallel_size)):
            if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise MisconfigurationException(f"{name} must be 'auto' or an int >= 1, received {size!r}. Use 'auto'.")
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise MisconfigurationException(
                f"copies must be an int >= 1, received {copies!r}. Use 1 to cut without copies."
            )
        for pattern, style in (plan or {}).items():
            if not isinstance(style, ParallelStyle) and style not in STYLES:
                raise MisconfigurationException(
                    f"plan[{pattern!r}] must be one of {', '.join(map(repr, STYLES))} or a ParallelStyle, received {style!r}."
                )
        self.data_parallel_size: int | str = data_parallel_size
        self.tensor_parallel_size: int | str = tensor_parallel_size
        self.copies: int = copies
        # Both of its dimensions in one, where there are copies.
        self._all_data: DeviceMesh | None = None
        self.saves_folders = save_distributed_checkpoint
        self.plan: dict[str, str | ParallelStyle] = dict(plan or {})

    # How processes are laid out

    def _sizes(self) -> tuple[int, int]:
        data, tensor = self.data_parallel_size, self.tensor_parallel_size
        return (
            self.num_nodes if isinstance(data, str) else data,
            self.num_processes if isinstance(tensor, str) else tensor,
        )

    def check_mesh(self, world_size: int) -> None:
        """Raise before a process starts when the sizes do not multiply to the number of processes."""
        data, tensor = self._sizes()
        if data * tensor != world_size:
            raise MisconfigurationException(
                f"data_parallel_size={data} times tensor_parallel_size={tensor} must be the number of processes, which is "
                f"{world_size} (devices={self.num_processes}, num_nodes={self.num_nodes}). Choose sizes whose product is "
                f"{world_size}, or leave one out and set devices={data * tensor}."
            )
        if data % self.copies:
            raise MisconfigurationException(
                f"copies={self.copies} must divide data_parallel_size={data}: each copy of the weights is cut over as many "
                f"processes. Use copies={data} for copies that are not cut over data-parallel processes at all."
            )

    def make_mesh(self) -> DeviceMesh:
        """Return ``(data_parallel, tensor_parallel)``: processes next to each other share layers."""
        kind, (data, tensor) = self.root_device.type, self._sizes()
        if self.copies == 1:
            return init_device_mesh(kind, (data, tensor), mesh_dim_names=(DATA, TENSOR))
        mesh = init_device_mesh(
            kind, (self.copies, data // self.copies, tensor), mesh_dim_names=(COPIES, SHARDS, TENSOR)
        )
        self._all_data = mesh[COPIES, SHARDS]._flatten(DATA)
        return mesh

    @property
    def data_parallel(self) -> DataParallelGroup:
        """The processes that see different data; those that share layers see the same."""
        mesh = self.device_mesh
        if mesh is None:
            data, tensor = self._sizes()
            return DataParallelGroup(self.global_rank // tensor, data)
        line = mesh[DATA] if self._all_data is None else self._all_data
        ranks = line.mesh.flatten().tolist()
        return DataParallelGroup(line.get_local_rank(), len(ranks), line.get_group(), tuple(ranks))

    # Modules

    def wrap_module(self, module: Module, for_training: bool = True) -> Module:
        """Cut what ``configure_model`` left whole, in place, and return the module."""
        assert self.device_mesh is not None
        parts = list(module.modules())
        is_cut = any(isinstance(parameter, DTensor) for parameter in module.parameters())
        if not is_cut and not any(parameter.is_meta for parameter in module.parameters()):
            collectives.sync_tensors([*module.parameters(), *module.buffers()], device=self.root_device)
        if self.plan:
            apply_plan(module, self.device_mesh[TENSOR], self.plan)
        if self.device_mesh[TENSOR].size() > 1 and not any(map(_is_cut_over_layers, module.parameters())):
            raise MisconfigurationException(
                f"{self.device_mesh[TENSOR].size()} processes are to share each layer, and no layer of "
                f"{type(module).__name__} is cut. Cut it in `configure_model` with self.device_mesh['{TENSOR}'], or pass "
                "ModelParallelStrategy(plan={'blocks.*.up': 'column', 'blocks.*.down': 'row'})."
            )
        data = self.device_mesh[DATA] if self._all_data is None else self.device_mesh[COPIES, SHARDS]
        if not any(isinstance(part, FSDPModule) for part in parts) and data.size() > 1:
            return apply_sharding(module, ShardingPlan(mesh=data))
        return module


def _is_cut_over_layers(parameter: torch.nn.Parameter) -> bool:
    return isinstance(parameter, DTensor) and TENSOR in (parameter.device_mesh.mesh_dim_names or ())


def apply_plan(module: Module, mesh: DeviceMesh, plan: Mapping[str, str | ParallelStyle]) -> None:
    """Cut the layers that a plan names over a mesh of one dimension, in place.

    Args:
        module: The whole module.
        mesh: The processes that share layers.
        plan: Pattern of a submodule's name (as the shell matches files) -> style.

    Raises:
        MisconfigurationException: A pattern fits no submodule, or a layer cannot be cut into so many parts.
    """
    names = {name: part for name, part in module.named_modules() if name}
    found: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise MisconfigurationException(
                f"plan[{pattern!r}] fits no submodule of {type(module).__name__}. Its submodules are "
                f"{', '.join(list(names)[:20])}{', ...' if len(names) > 20 else ''}."
            )
        for name in fitting:
            _check_divisible(name, names[name], style, mesh.size())
            found[name] = STYLES[style]() if isinstance(style, str) else style
    parallelize_module(module, mesh, found)


def _check_divisible(name: str, part: Module, style: str | ParallelStyle, size: int) -> None:
    weight = getattr(part, "weight", None)
    if not isinstance(part, torch.nn.Linear) or weight is None or style not in ("column", "row"):
        return
    features = weight.shape[0] if style == "column" else weight.shape[1]
    if features % size:
        raise MisconfigurationException(
            f"{name} has {features} {'output' if style == 'column' else 'input'} features, which {size} processes cannot "
            f"share evenly. Choose a tensor_parallel_size that divides {features}, or another width."
        )
