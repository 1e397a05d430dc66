"""What a run will need on many processes, found out on one machine: ``levin plan PACKAGE.MODULE:FUNCTION MESH``.

The real module is cut by the real strategies over the mesh, and trains two steps, with tensors that have a shape and no
memory (torch's ``FakeTensorMode``) and processes that are not there (torch's fake process group). What goes wrong on 512
processes because of shapes goes wrong here, too.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from levin.module import LightningModule
from levin.strategies import microbatches
from levin.strategies.context import share_sequences
from levin.strategies.contexts import run_as_forward
from levin.strategies.layer_plan import apply_plan
from levin.strategies.mesh import DEGREES, parse_mesh
from levin.strategies.model_parallel import CONTEXT, COPIES, PIPELINE, SHARDS, TENSOR
from levin.strategies.order import prepare
from levin.strategies.replay import ReachedError, Replay
from levin.strategies.sharding import META, ShardingPlan, repeated_blocks
from levin.strategies.stages import PipelinePlan, leave_out, parts_of, stages_in, users_of
from levin.utilities.exceptions import MisconfigurationException

MakeModule = Callable[[], tuple[nn.Module, Any]]
_MIB = 2**20
_NAMES = {
    "_allgather_base_": "all_gather", "all_gather_into_tensor": "all_gather", "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter", "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce", "all_reduce": "all_reduce", "all_to_all_single": "all_to_all",
    "alltoall_base_": "all_to_all", "broadcast_": "broadcast", "send": "send",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one process of a run needs; sizes in bytes.

    Args:
        num_processes: Of the mesh.
        parameters: Kept by a process.
        gradients: The same, after backward.
        optimizer_states: After the first step.
        activations: Kept for backward at the moment at which most memory is used.
        peak: All memory at that moment, with gathered weights and what is computed on.
        collectives: Name -> how often in a step, and how many bytes in all. A gather counts what comes out, a
            scatter what goes in; ``"send"`` is what goes to the stages beside that of the process.
        bubble: What part of a step a process of a pipeline waits for others, where all stages take as long.
        stages: The plan of each stage of a pipeline; the numbers above are those of the one that needs most memory then.
    """

    num_processes: int
    parameters: int
    gradients: int
    optimizer_states: int
    activations: int
    peak: int
    collectives: Mapping[str, tuple[int, int]]
    bubble: float = 0.0
    stages: tuple[Plan, ...] = ()

    def __str__(self) -> str:
        if self.stages:
            each = f", each of {count} processes" if (count := self.stages[0].num_processes) > 1 else ""
            of_stages = (f"stage {number}{each}\n{stage._sizes()}" for number, stage in enumerate(self.stages))
            return "\n".join([*of_stages, f"waiting for other stages: {self.bubble:.0%} of a step"])
        return f"each of {self.num_processes} processes\n{self._sizes()}"

    def _sizes(self) -> str:
        sizes = ("parameters", "gradients", "optimizer_states", "activations", "peak")
        lines = [f"{name.replace('_', ' '):18}{getattr(self, name) / _MIB:12.1f} MiB" for name in sizes]
        moved = [f"{name:18}{size / _MIB:12.1f} MiB in {count}" for name, (count, size) in self.collectives.items()]
        return "\n".join([*lines, "moved in each step", *(moved or ["nothing"])])


def plan_run(
    make: MakeModule,
    mesh: str,
    optimizer: Callable[..., Optimizer] = torch.optim.AdamW,
    plan: Mapping[str, object] | None = None,
) -> Plan:
    """Return what a run needs on each process of a mesh. Nothing of its size takes memory here.

    Args:
        make: Returns the module and a batch of one process. A LightningModule runs its ``training_step`` and has the first
            optimizer of its ``configure_optimizers``; another module is called with the batch, and with its items when that
            is a tuple.
        mesh: For example ``"mesh:dp=512"``; see :func:`levin.strategies.mesh.parse_mesh`. ``pp`` has as many layers in each
            stage, the schedule 1F1B and twice as many parts of the batch as stages.
        optimizer: Makes the optimizer of parameters, where the module does not.
        plan: As for :class:`levin.strategies.ModelParallelStrategy`.

    Raises:
        ValueError: The mesh is none, or does not fit the layers.
        RuntimeError: This process is connected with others, or a step reads a value, which is not there.

    Example:
        >>> def large():
        ...     return nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8))), torch.ones(4, 4096)
        >>> plan_run(large, "mesh:dp=512").parameters * 512 / 2**20
        512.125
    """
    degrees = parse_mesh(mesh)
    copies, shards, tensor, stages, context = (degrees.get(name, 1) for name in DEGREES)
    size = math.prod(degrees.values())
    if context > 1 and (copies > 1 or stages > 1):
        raise MisconfigurationException(
            f"cp goes beside dp and tp alone, received {mesh!r}. Use dp in the place of ddp, and leave pp out."
        )
    found = []
    for number in range(stages):
        with _processes_that_are_not_there(size, rank=number * size // stages):
            layout = init_device_mesh(
                "cpu",
                (stages, copies, shards, context, tensor),
                mesh_dim_names=(PIPELINE, COPIES, SHARDS, CONTEXT, TENSOR),
            )
            # Those that share sequences share weights, too.
            sharers = layout[SHARDS, CONTEXT]._flatten("weights") if context > 1 else layout[SHARDS]
            # DDP, which is all copies and nothing else, sends gradients and cuts nothing.
            is_cut = copies * shards * context > 1 and copies < size
            meshes = _Meshes(
                (layout[COPIES, SHARDS] if copies > 1 else sharers) if is_cut else None,
                layout[TENSOR] if tensor > 1 else None,
                layout[CONTEXT] if context > 1 else None,
            )
            try:
                found.append(_measure(make, meshes, PipelinePlan(stages), number, optimizer, plan))
            except DataDependentOutputException as error:
                raise RuntimeError(
                    "The step reads a value of a tensor (.item(), float(), if tensor:), and a plan has shapes alone, received "
                    f"{error}. Leave such lines out of what is planned."
                ) from error
    most = max(found, key=lambda stage: stage.peak)
    return replace(most, num_processes=size, stages=tuple(found) if stages > 1 else ())


class _Meshes(NamedTuple):
    """The processes that share weights, layers and sequences; None for no others."""

    data: DeviceMesh | None
    tensor: DeviceMesh | None
    context: DeviceMesh | None


def _measure(
    make: MakeModule,
    meshes: _Meshes,
    pipeline: PipelinePlan,
    number: int,
    make_optimizer: Callable[..., Optimizer],
    plan: Mapping[str, Any] | None,
) -> Plan:
    data, tensor, context = meshes
    without_memory = FakeTensorMode()
    with without_memory:
        module, batch = make()
        batch = tree_map(partial(_shape_of, mode=without_memory), batch)
        if isinstance(module, LightningModule):
            module.configure_model()
        _make_weights(module)
        stage = _Stage(module, batch, pipeline, number) if pipeline.size > 1 else None
    # Cut outside of the mode: meshes compute with tensors that are there.
    prepare(
        module,
        ShardingPlan(mesh=data),
        cut_layers=None if tensor is None else lambda whole: apply_plan(whole, tensor, plan or {}),
        cut_stages=None if stage is None else stage.cut,
        share_sequences=None
        if context is None
        else lambda whole: share_sequences(repeated_blocks(whole), context.get_group(), is_tried=True),
    )
    root = module if stage is None else stage.module
    with without_memory:
        optimizer = _optimizer_of(module, make_optimizer)
        tracker, moved = _tracker(root, optimizer), Collectives()
        for _ in range(2):
            # The first step makes the states of the optimizer, and buffers that stay.
            tracker.reset_mod_stats()
            moved.seen.clear()
            optimizer.zero_grad()
            with tracker, moved, warnings.catch_warnings():
                # A step calls the module that it belongs to.
                warnings.filterwarnings("ignore", "The module hierarchy tracking maybe be messed up")
                if stage is None:
                    _loss(module, batch).backward()
                else:
                    stage.step(moved, between=tracker.reset_mod_stats)
            parameters = list(module.parameters())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if data is None and tensor is None and stage is None and dist.get_world_size() > 1:
                moved.add("all_reduce", _bytes_of(gradients))
            optimizer.step()
    found = Counter[str]()
    for kinds in tracker.get_tracker_snapshot("peak").values():
        for kind, count in kinds.items():
            found[str(getattr(kind, "value", kind)).lower()] += count
    states = _bytes_of(value for values in optimizer.state.values() for value in values.values())
    return Plan(
        num_processes=dist.get_world_size() // pipeline.size,
        parameters=_bytes_of(parameters),
        gradients=_bytes_of(gradients),
        optimizer_states=states,
        activations=found["activation"] if stage is None else stage.activations,
        peak=found["total"] - found["optstate"] + states,
        collectives=dict(moved.seen),
        bubble=0.0 if stage is None else (pipeline.size - 1) / (len(stage.parts) + pipeline.size - 1),
    )


class _Stage:
    """What one process of a pipeline does in a step: forward and backward of each part of a batch, for its layers.

    Args:
        module: Whole.
        batch: Of one process.
        plan: How many stages there are.
        number: Of the stage.

    Raises:
        MisconfigurationException: The module cannot be cut so.
    """

    def __init__(self, module: nn.Module, batch: object, plan: PipelinePlan, number: int) -> None:
        size = microbatches.size_of(batch)
        self.parts = microbatches.split(batch, size // math.gcd(size, plan.parts), size)
        self.activations = 0
        layers, self._names = stages_in(module, plan)
        self._replay = Replay(module, layers, self._names, torch.device("cpu"))
        self._whole, self._number = module, number
        first = partial(_loss, module, self.parts[0])
        self._received = self._replay.lacks(number, first)
        self._wanted = [] if number + 1 == plan.size else self._replay.lacks(number + 1, first)
        self._shared: list[str] = []
        # Of forward passes, before the first backward (1F1B, and GPipe where there are too few parts for it).
        self._num_ahead = len(self.parts) if len(self.parts) % plan.size else plan.size - number

    def cut(self, module: nn.Module) -> list[nn.Module]:
        """Leave out what belongs to other stages; return the module of this one."""
        from levin.strategies.pipeline import Stage  # slow to import

        users = users_of(module, self._names)
        leave_out(
            module, [name for name, found in users.items() if self._number not in found], self._replay.without_values
        )
        own = {name for name, found in users.items() if self._number in found}
        self._shared = [name for name, _ in module.named_parameters() if len(users[name]) > 1]
        self.module: nn.Module = Stage(parts_of(module, own), self._compute)
        return [self.module]

    def _compute(self, number: int, received: tuple[Tensor, ...]) -> Any:
        try:
            return self._replay.run(
                self._number, partial(_loss, self._whole, self.parts[number]), received, self._wanted
            )
        except ReachedError as reached:
            return tuple(reached.tensors)
        except MisconfigurationException as error:
            # What earlier stages compute was found not to be read: it is a value of this stage's, which a run has.
            if isinstance(error.__cause__, DataDependentOutputException):
                raise error.__cause__ from None
            raise

    def step(self, moved: Collectives, between: Callable[[], None]) -> None:
        """Run all parts, in the order of the schedule.

        Args:
            moved: Told what goes to other stages.
            between: Called before each forward pass.
        """
        under_way: deque[list[Tensor]] = deque()
        for number in range(len(self.parts)):
            if number >= self._num_ahead:
                self._backward(under_way.popleft(), moved, is_last=False)
            between()
            under_way.append(self._forward(number, moved))
        while under_way:
            self._backward(under_way.popleft(), moved, is_last=not under_way)
        for name in self._shared:
            moved.add("all_reduce", _num_bytes(self._whole.get_parameter(name)))

    def _forward(self, number: int, moved: Collectives) -> list[Tensor]:
        received = [
            torch.empty(shape, dtype=dtype, requires_grad=dtype.is_floating_point) for _, shape, dtype in self._received
        ]
        there_anyway = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves(self.parts[number]) if isinstance(leaf, Tensor)
        }
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = _local(tensor).untyped_storage()
            is_weight = isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter)
            if not is_weight and storage._cdata not in there_anyway:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = self.module(*received, number=number)
        self.activations = sum(kept.values()) * min(len(self.parts), self._num_ahead)
        outputs = list(result) if isinstance(result, tuple) else [result]
        for _, shape, dtype in self._wanted:
            moved.add("send", shape.numel() * dtype.itemsize)
        return [tensor for tensor in outputs if tensor.requires_grad]

    def _backward(self, outputs: list[Tensor], moved: Collectives, is_last: bool) -> None:
        if isinstance(self.module, FSDPModule):
            # As torch's schedules do: weights stay gathered, and gradients are added up, until the last part is through.
            self.module.set_is_last_backward(is_last)
            self.module.set_reshard_after_backward(is_last)
            self.module.set_requires_gradient_sync(is_last)
        torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
        for _, shape, dtype in self._received:
            if dtype.is_floating_point:
                moved.add("send", shape.numel() * dtype.itemsize)


class Collectives(TorchDispatchMode):
    """Counts what is said to other processes while it is on, and its bytes."""

    def __init__(self) -> None:
        initialize: Callable[[], None] = super().__init__
        initialize()
        self.seen: dict[str, tuple[int, int]] = {}

    def add(self, name: str, num_bytes: int) -> None:
        """Count one more."""
        count, size = self.seen.get(name, (0, 0))
        self.seen[name] = (count + 1, size + num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        """Run ``func``; look at it when it is a collective."""
        result = func(*args, **(kwargs or {}))
        name = _NAMES.get(func._schema.name.partition("::")[2])
        if func.namespace in ("c10d", "_c10d_functional") and name is not None:
            leaves = [leaf for leaf in tree_flatten((args, kwargs, result))[0] if isinstance(leaf, Tensor)]
            # A list of tensors is one message.
            given = [leaf for leaf in tree_flatten(args[:1])[0] if isinstance(leaf, Tensor)]
            self.add(name, max([sum(map(_num_bytes, given)), *map(_num_bytes, leaves)]))
        return result


@contextmanager
def _processes_that_are_not_there(size: int, rank: int) -> Iterator[None]:
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("A plan needs a process that is not connected with others. Make it before the run.")
    # What DTensor has found out for a mesh it takes again for one like it, with the groups of the first, which are gone.
    _clear_sharding_prop_cache()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()


def _tracker(module: nn.Module, optimizer: Optimizer) -> Any:
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    if isinstance(module, FSDPModule):
        return FSDPMemTracker(module, optimizer)
    tracker = MemTracker()
    tracker.track_external(module, optimizer)
    return tracker


def _optimizer_of(module: nn.Module, make: Callable[..., Optimizer]) -> Optimizer:
    found: Any = module.configure_optimizers() if isinstance(module, LightningModule) else make(module.parameters())
    while not isinstance(found, Optimizer):
        if not found:
            raise ValueError(f"A plan needs an optimizer, received {found!r} from configure_optimizers. Return one.")
        found = found["optimizer"] if isinstance(found, dict) else found[0]
    return found


class _Step(nn.Module):
    """A module around the one that is planned, whose step may call the module itself: torch's tracker takes a second call of
    the outermost module for another step.
    """

    def __init__(self, step: Callable[..., object]) -> None:
        super().__init__()
        self.forward = step


def _loss(module: nn.Module, batch: object) -> Any:
    loss: Any
    if isinstance(module, LightningModule):
        step: Callable[..., object] = module.training_step
        # Weights that belong to no block are gathered around what runs as forward.
        step = _Step(run_as_forward(module, module, step)) if isinstance(module, FSDPModule) else step
        loss = step(batch, 0)
    else:
        loss = module(*batch) if isinstance(batch, tuple) else module(batch)
    loss = loss["loss"] if isinstance(loss, Mapping) else loss
    return loss if loss.ndim == 0 else loss.sum()


def _make_weights(module: nn.Module) -> None:
    """Give what is on the meta device, in a plan, a place on the CPU."""
    made: dict[int, Tensor] = {}
    for part in module.modules():
        tensors: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for store in tensors:
            for name, tensor in store.items():
                if tensor is not None and tensor.device == META:
                    new = torch.empty_like(tensor, device="cpu")
                    new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                    store[name] = made.setdefault(id(tensor), new)


def _shape_of(leaf: object, mode: FakeTensorMode) -> object:
    """Return a tensor that was there before the plan without its values."""
    return mode.from_tensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) else leaf


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _num_bytes(tensor: Tensor) -> int:
    return _local(tensor).numel() * tensor.element_size()


def _bytes_of(values: Any) -> int:
    return sum(_num_bytes(value) for value in values if isinstance(value, Tensor))


def main(words: Sequence[str]) -> int:
    """Run ``levin plan``; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="levin plan",
        description="Say what each process of a run will need, without these processes and without their memory.",
        epilog="Example: levin plan project.large:make mesh:dp=512, where make() returns the module and a batch.",
    )
    parser.add_argument("function", metavar="PACKAGE.MODULE:FUNCTION", help="returns the module and a batch")
    parser.add_argument("mesh", metavar="MESH", help="for example mesh:dp=512 or mesh:dp=64,tp=8")
    parser.add_argument(
        "--cut", metavar="PATTERN=STYLE", action="append", default=[], help="layers to cut: blocks.*.up=column"
    )
    options = parser.parse_args(list(words))
    path, _, name = options.function.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(path), name)
        print(plan_run(make, options.mesh, plan=dict(word.rpartition("=")[::2] for word in options.cut)))
    except (ImportError, AttributeError, ValueError, RuntimeError) as error:
        parser.error(f"{type(error).__name__}: {error}")
    finally:
        sys.path.remove(os.getcwd())
    return 0
