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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from levin.module import LightningModule
from levin.strategies import microbatches
from levin.strategies.context import share_sequences
from levin.strategies.contexts import run_as_forward
from levin.strategies.layer_plan import apply_plan
from levin.strategies.mesh import DEGREES, parse_mesh
from levin.strategies.model_parallel import CONTEXT, COPIES, SHARDS, TENSOR
from levin.strategies.order import prepare
from levin.strategies.replay import Announced, ReachedError, Replay
from levin.strategies.sharding import META, ShardingPlan, repeated_blocks
from levin.strategies.stages import PipelinePlan, leave_out, stages_in, users_of
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
            of_stages = (f"stage {number}\n{stage._sizes()}" for number, stage in enumerate(self.stages))
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
        mesh: For example ``"mesh:dp=512"``; see :func:`levin.strategies.mesh.parse_mesh`. ``pp`` by itself is planned, with as many
            layers in each stage, the schedule 1F1B and twice as many parts of the batch as stages.
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
    if stages > 1 and stages < size:
        raise MisconfigurationException(
            f"A plan of a pipeline is for processes with a stage each, received {mesh!r}. Plan for mesh:pp={stages}, and for the layers of "
            f"one stage with the other degrees."
        )
    if context > 1 and copies > 1:
        raise MisconfigurationException(
            f"cp goes beside dp and tp alone, received {mesh!r}. Use dp in the place of ddp."
        )
    with _processes_that_are_not_there(size):
        layout = init_device_mesh(
            "cpu", (copies, shards, context, tensor), mesh_dim_names=(COPIES, SHARDS, CONTEXT, TENSOR)
        )
        # Those that share sequences share weights, too.
        sharers = layout[SHARDS, CONTEXT]._flatten("weights") if context > 1 else layout[SHARDS]
        data = layout[COPIES, SHARDS] if copies > 1 else sharers
        meshes = _Meshes(
            data if shards * context > 1 else None,
            layout[TENSOR] if tensor > 1 else None,
            layout[CONTEXT] if context > 1 else None,
        )
        try:
            if stages > 1:
                return _measure_stages(make, PipelinePlan(stages), optimizer)
            return _measure(make, meshes, size, optimizer, plan, copies > 1)
        except DataDependentOutputException as error:
            raise RuntimeError(
                "The step reads a value of a tensor (.item(), float(), if tensor:), and a plan has shapes alone, received "
                f"{error}. Leave such lines out of what is planned."
            ) from error


class _Meshes(NamedTuple):
    """The processes that share weights, layers and sequences; None for no others."""

    data: DeviceMesh | None
    tensor: DeviceMesh | None
    context: DeviceMesh | None


def _measure(
    make: MakeModule,
    meshes: _Meshes,
    size: int,
    make_optimizer: Callable[..., Optimizer],
    plan: Mapping[str, Any] | None,
    has_copies: bool,
) -> Plan:
    data, tensor, context = meshes
    without_memory = FakeTensorMode()
    with without_memory:
        module, batch = make()
        if isinstance(module, LightningModule):
            module.configure_model()
    # Cut outside of the mode: meshes compute with tensors that are there.
    prepare(
        module,
        ShardingPlan(mesh=data),
        cut_layers=None if tensor is None else lambda whole: apply_plan(whole, tensor, plan or {}),
        share_sequences=None
        if context is None
        else lambda whole: share_sequences(repeated_blocks(whole), context.get_group(), is_tried=True),
    )
    with without_memory:
        optimizer = _optimizer_of(module, make_optimizer)
        tracker, moved = _tracker(module, optimizer), Collectives()
        for _ in range(2):
            # The first step makes the states of the optimizer, and buffers that stay.
            tracker.reset_mod_stats()
            moved.seen.clear()
            optimizer.zero_grad()
            with tracker, moved, warnings.catch_warnings():
                # A step calls the module that it belongs to.
                warnings.filterwarnings("ignore", "The module hierarchy tracking maybe be messed up")
                _loss(module, batch).backward()
            parameters = list(module.parameters())
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if has_copies and data is None:
                moved.add("all_reduce", _bytes_of(gradients))
            optimizer.step()
    found: dict[str, int] = {}
    for kinds in tracker.get_tracker_snapshot("peak").values():
        for kind, count in kinds.items():
            name = str(getattr(kind, "value", kind))
            found[name] = found.get(name, 0) + count
    states = _bytes_of(value for values in optimizer.state.values() for value in values.values())
    return Plan(
        num_processes=size,
        parameters=_bytes_of(parameters),
        gradients=_bytes_of(gradients),
        optimizer_states=states,
        activations=found.get("Activation", 0),
        peak=found.get("Total", 0) - found.get("OptState", 0) - found.get("Optstate", 0) + states,
        collectives=dict(moved.seen),
    )


def _measure_stages(make: MakeModule, plan: PipelinePlan, make_optimizer: Callable[..., Optimizer]) -> Plan:
    """Return the plan of a pipeline, out of one part of a batch that goes through each stage by itself."""

    def made() -> tuple[nn.Module, Any]:
        with META:
            module, batch = make()
            if isinstance(module, LightningModule):
                module.configure_model()
        size = microbatches.size_of(batch)
        return module, microbatches.split(batch, size // math.gcd(size, plan.parts), size)

    module, parts = made()
    layers, names = stages_in(module, plan)
    replay = Replay(module, layers, names, META)
    lacks = [replay.lacks(number, partial(_loss, module, parts[0])) for number in range(plan.size)]
    stages = []
    for number in range(plan.size):
        module, parts = made()
        replay = Replay(module, dict(stages_in(module, plan)[0]), names, META)
        users = users_of(module, names)
        leave_out(module, [name for name, found in users.items() if number not in found], replay.without_values)
        of_several = [p for name, p in module.named_parameters() if len(users[name]) > 1]
        received, wanted = lacks[number], [] if number + 1 == plan.size else lacks[number + 1]
        kept = _run_stage(replay, number, module, parts[0], received, wanted)
        parameters = list(module.parameters())
        optimizer = _optimizer_of(module, make_optimizer)
        optimizer.step()
        # Under 1F1B a stage has forward passes under way for itself and for each stage after it.
        activations = kept * min(len(parts), plan.size - number)
        own = _bytes_of(parameters)
        gradients = _bytes_of(parameter.grad for parameter in parameters)
        states = _bytes_of(value for values in optimizer.state.values() for value in values.values())
        sent = [shape.numel() * dtype.itemsize for _, shape, dtype in wanted]
        sent += [shape.numel() * dtype.itemsize for _, shape, dtype in received if dtype.is_floating_point]
        stages.append(
            Plan(
                num_processes=1,
                parameters=own,
                gradients=gradients,
                optimizer_states=states,
                activations=activations,
                peak=own + gradients + states + activations,
                collectives={
                    "send": (len(sent) * len(parts), sum(sent) * len(parts)),
                    **({"all_reduce": (len(of_several), _bytes_of(of_several))} if of_several else {}),
                },
            )
        )
    most = max(stages, key=lambda stage: stage.peak)
    bubble = (plan.size - 1) / (len(parts) + plan.size - 1)
    return replace(most, num_processes=plan.size, bubble=bubble, stages=tuple(stages))


def _run_stage(
    replay: Replay, number: int, module: nn.Module, batch: object, received: list[Announced], wanted: list[Announced]
) -> int:
    """Run forward and backward of one stage, and return how many bytes it keeps between them beside the batch."""
    inputs = [
        torch.empty(shape, dtype=dtype, device=META, requires_grad=dtype.is_floating_point)
        for _, shape, dtype in received
    ]
    there_anyway = {
        leaf.untyped_storage()._cdata
        for leaf in tree_flatten((batch, list(module.parameters())))[0]
        if isinstance(leaf, Tensor)
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in there_anyway:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            outputs = [replay.run(number, partial(_loss, module, batch), inputs, wanted)]
        except ReachedError as reached:
            outputs = [tensor for tensor in reached.tensors if tensor.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(tensor) for tensor in outputs])
    return sum(kept.values())


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
def _processes_that_are_not_there(size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("A plan needs a process that is not connected with others. Make it before the run.")
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


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


def _num_bytes(tensor: Tensor) -> int:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


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
