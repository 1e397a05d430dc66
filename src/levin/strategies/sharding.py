"""A module cut over processes by torch's ``fully_shard``: which parts are units, and the order in which things are done.

Each unit is gathered when its ``forward`` begins and let go when that ends; what belongs to no unit is gathered for the
whole step. Weights are made, or brought to the device, unit by unit. :mod:`levin.strategies.order` says what comes before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, ModuleDict, ModuleList, Parameter, Sequential
from torch.nn.modules.batchnorm import _NormBase

from levin.strategies import collectives
from levin.strategies.recomputation import FULL, SELECTIVE, Recomputation, recompute
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Kwargs

Policy = Callable[[Module], bool]
META = torch.device("meta")


@dataclass(frozen=True)
class ShardingPlan:
    """How a module is cut.

    Args:
        mesh: One dimension: the processes that share the weights. Two: ``(replicas, shards)``. None: they are not shared.
        is_unit: Whether a submodule is a unit; None finds units by itself (see :func:`repeated_blocks`).
        recomputes: Whose activations are computed again in backward; None for no submodule's.
        reshard_after_forward: Whether weights are let go after forward and gathered once more for backward.
        mixed_precision: Number formats of gathered weights and of the reduction of gradients.
        offload: Where the shards are kept.
        ignored: Parameters that every process keeps whole.
        make_weights: Makes the weights that a submodule has on the meta device; None for those of ``mesh``.
        cuts_children: Whether each child of the module is a unit, too. A step that runs backward itself, and goes on after
            that, finds again the weights of what it calls, but not those that are gathered for the whole step.
    """

    mesh: DeviceMesh | None = None
    is_unit: Policy | None = None
    recomputes: Recomputation | None = None
    reshard_after_forward: bool = True
    mixed_precision: MixedPrecisionPolicy | None = None
    offload: OffloadPolicy | None = None
    ignored: frozenset[Parameter] = frozenset()
    make_weights: Callable[[Module], None] | None = None
    cuts_children: bool = False


def check_cutting_on(device: torch.device) -> None:
    """Raise where torch cannot cut modules: ``fully_shard`` of torch 2.6 records events, which its CPU streams do not know.

    Raises:
        MisconfigurationException: Use a newer torch.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise MisconfigurationException(
            f"FSDP on the CPU needs a torch whose torch.cpu.Stream has `record_event`, received torch {torch.__version__}. "
            'Install a newer torch, or use strategy="ddp", or an accelerator.'
        )


def repeated_blocks(module: Module) -> list[Module]:
    """Return the units that a module without a policy is cut into: the outermost submodules that are repeated.

    These are members of a ``ModuleList``, ``ModuleDict`` or ``Sequential`` which hold parameters and have a sibling of the
    same class there, such as the blocks of a transformer. One that shares a parameter with the rest of the module is none,
    since a shared parameter has to be gathered where all its users are.

    Args:
        module: The whole module.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> [type(block).__name__ for block in repeated_blocks(net)]
        ['Linear', 'Linear']
    """
    found = list(outermost_repeated(module))
    return [block for block in found if not shares_parameters(block, module)]


def outermost_repeated(module: Module) -> Iterator[Module]:
    """Return the outermost submodules that are repeated, those that share parameters included."""
    counts: Counter[type] = Counter()
    if isinstance(module, (ModuleList, ModuleDict, Sequential)):
        counts.update(type(child) for child in module.children() if _has_parameters(child))
    for child in module.children():
        if counts[type(child)] > 1 and _has_parameters(child) and not isinstance(child, (ModuleList, ModuleDict)):
            yield child
        else:
            yield from outermost_repeated(child)


def _has_parameters(module: Module) -> bool:
    return next(module.parameters(), None) is not None


def shares_parameters(block: Module, module: Module) -> bool:
    """Return whether a parameter of ``block`` is used elsewhere in ``module``, too."""
    inside = set(block.modules())
    own = {id(parameter) for parameter in block.parameters()}
    outside = (child for child in module.modules() if child not in inside)
    return any(id(parameter) in own for child in outside for parameter in child.parameters(recurse=False))


def units_of(module: Module, is_unit: Policy | None) -> list[Module]:
    """Return the submodules that become units, inner ones before those around them.

    Args:
        module: The whole module, which is a unit in any case and not among them.
        is_unit: The user's choice; None for :func:`repeated_blocks`.

    Raises:
        MisconfigurationException: The user's choice fits no submodule, or one that shares a parameter with others.
    """
    if is_unit is None:
        return repeated_blocks(module)
    chosen = [child for child in module.modules() if child is not module and is_unit(child)]
    if not chosen:
        classes = sorted({type(child).__name__ for child in module.modules() if child is not module})
        raise MisconfigurationException(
            f"auto_wrap_policy chose no submodule of {type(module).__name__}, which has {', '.join(classes)}. "
            "Name one of these classes, or leave auto_wrap_policy out to have the repeated blocks found."
        )
    for child in chosen:
        if shares_parameters(child, module):
            raise MisconfigurationException(
                f"auto_wrap_policy chose a {type(child).__name__} that shares a parameter with another part of "
                f"{type(module).__name__}. Choose the smallest submodule that holds both."
            )
    return chosen[::-1]


def apply_sharding(module: Module, plan: ShardingPlan) -> Module:
    """Cut ``module`` in place, and return it.

    Args:
        module: On the CPU, on the device, or (in part) on the meta device; with tensor parallelism applied where that is
            used. Submodules that are cut already stay as they are.
        plan: How.

    Raises:
        MisconfigurationException: A policy chooses nothing, or a layer on the meta device cannot make its weights.
    """
    if plan.mesh is None:
        if plan.recomputes is not None:
            recompute(module, plan.recomputes)
        return module
    if isinstance(module, FSDPModule):
        return module
    units = set(units_of(module, plan.is_unit))
    if plan.cuts_children:
        units |= {
            child for child in module.children() if _has_parameters(child) and not shares_parameters(child, module)
        }
    if plan.recomputes is not None:
        recompute(module, plan.recomputes)
        # A unit is gathered once for what is computed again and for its backward.
        wrappers = {
            part._checkpoint_wrapped_module: part for part in module.modules() if isinstance(part, CheckpointWrapper)
        }
        units = {wrappers.get(unit, unit) for unit in units}
    kwargs: Kwargs = {"mesh": plan.mesh}
    if plan.mixed_precision is not None:
        kwargs["mp_policy"] = plan.mixed_precision
    if plan.offload is not None:
        kwargs["offload_policy"] = plan.offload
    if plan.ignored:
        kwargs["ignored_params"] = set(plan.ignored)
    make_weights = plan.make_weights or WeightMaker(module, torch.device(plan.mesh.device_type), plan.mesh)
    # Normalizations that keep running statistics want weights in the format of these.
    norms = {part for part in module.modules() if isinstance(part, _NormBase) and _has_parameters(part)}
    if plan.mixed_precision is not None:
        units |= norms

    def cut(part: Module) -> None:
        make_weights(part)
        for child in part.children():
            cut(child)
        if part in units and not isinstance(part, FSDPModule):
            formats = {"mp_policy": MixedPrecisionPolicy()} if part in norms else {}
            fully_shard(part, reshard_after_forward=plan.reshard_after_forward, **{**kwargs, **formats})

    cut(module)
    # By default torch keeps the root's own weights until backward, where they are needed at once.
    fully_shard(module, **kwargs)
    return module


def made_tensors(module: Module) -> list[Tensor]:
    """Return the parameters and buffers of a module that have values, and not only a shape."""
    return [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.device != META]


class WeightMaker:
    """Gives memory and first values to what a module has on the meta device, layer by layer.

    Weights of several layers stay one. All processes begin with those of the first, whatever each would have drawn for itself.

    Args:
        root: What holds all layers, when the first of them is made.
        device: Where to.
        mesh: The processes that have the layers; None for this one alone.
    """

    def __init__(self, root: Module, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        self.root, self.device, self.mesh = root, device, mesh
        # Of weights of several layers alone: the others are held by their layers, until they are cut.
        self._made: dict[Parameter, Parameter] = {}
        self._shared: set[Parameter] | None = None

    def __call__(self, module: Module) -> None:
        """Make the module's own parameters and buffers; its submodules are left as they are.

        Raises:
            MisconfigurationException: The module has no ``reset_parameters``.
        """
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not any(tensor.device == META for tensor in own):
            return
        inner: object = getattr(module, "_reset_parameters", None)
        reset: object = getattr(module, "reset_parameters", inner)
        if inner is not None:
            # torch's MultiheadAttention, which gives values to a layer inside of it, too; some programs give it the public name.
            for child in module.children():
                self(child)
        if not callable(reset):
            raise MisconfigurationException(
                f"{type(module).__name__} was made on the meta device and has no method `reset_parameters` that gives its "
                "weights their first values. Define it, or make the layer outside of `configure_model`."
            )
        if self._shared is None:
            used = Counter(p for part in self.root.modules() for p in part._parameters.values() if p is not None)
            self._shared = {parameter for parameter, times in used.items() if times > 1}
        before = dict(module._parameters)
        module.to_empty(device=self.device, recurse=False)
        reset()
        for name, old in before.items():
            made = module._parameters[name]
            if old in self._shared and made is not None:
                module._parameters[name] = self._made.setdefault(old, made)
        if self.mesh is not None:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                _take_from_first(tensor, self.mesh)


def _take_from_first(tensor: Tensor, mesh: DeviceMesh) -> None:
    """Overwrite a tensor by that of the first process, in the dimensions of the mesh over which it is not cut."""
    cut_over: set[str] = set()
    if isinstance(tensor, DTensor):
        names = tensor.device_mesh.mesh_dim_names or ()
        cut_over = {name for name, placement in zip(names, tensor.placements) if not placement.is_replicate()}
        tensor = tensor.to_local()
    for dim, name in enumerate(mesh.mesh_dim_names or [""] * mesh.ndim):
        if name not in cut_over and mesh.size(dim) > 1:
            collectives.sync_tensors([tensor], group=mesh.get_group(dim))


def classes_policy(classes: Iterable[type[Module]]) -> Policy:
    """Return a policy that chooses the submodules of some classes."""
    chosen = tuple(classes)
    return lambda module: isinstance(module, chosen)


def within_budget(module: Module, budget: float, is_unit: Policy | None) -> Policy:
    """Return a policy that chooses units, as few as it takes, such that the others hold at most a part of the activations.

    Units of one class hold as much as each other; those that are left out of the choice are spread evenly among them.

    Args:
        module: The whole module.
        budget: What the units that are not chosen may hold of the activations of all units, from 0 to 1.
        is_unit: The user's choice of units; see :func:`units_of`.

    Raises:
        MisconfigurationException: There are no units.
    """
    units = set(units_of(module, is_unit))
    if not units:
        raise MisconfigurationException(
            f"activation_checkpointing={budget} is a part of the activations of blocks ('full' and 'selective' are 0), and "
            f"{type(module).__name__} has no repeated ones. Name what is to be computed again: "
            "activation_checkpointing_policy={MyBlock}."
        )
    seen: Counter[type] = Counter()
    chosen = set()
    for unit in module.modules():
        if unit in units:
            num_kept = int(seen[type(unit)] * budget)
            seen[type(unit)] += 1
            if int(seen[type(unit)] * budget) == num_kept:
                chosen.add(unit)
    return chosen.__contains__


def recomputation_of(value: object, module: Module, is_unit: Policy | None = None) -> Recomputation | None:
    """Return what is computed again of a module.

    Args:
        value: As :func:`levin.strategies.recomputation.checked` returned it: ``"full"``, ``"selective"``, a budget (see
            :func:`within_budget`), a policy (see :func:`as_policy`), or None for nothing.
        module: The whole module.
        is_unit: The user's choice of units; see :func:`units_of`.
    """
    if value in (FULL, SELECTIVE) if isinstance(value, str) else isinstance(value, float):
        budget = value if isinstance(value, float) else 0.0
        return Recomputation(within_budget(module, budget, is_unit), keeps_products=value == SELECTIVE)
    chosen = as_policy(value, module, "activation_checkpointing_policy")
    return None if chosen is None else Recomputation(chosen)


def as_policy(value: object, module: Module, name: str) -> Policy | None:
    """Return what a user gave as a policy in the form that is used here.

    Args:
        value: A set or list of classes, a ``ModuleWrapPolicy``, a function of a module, or one of torch's functions of
            ``(module, recurse, nonwrapped_numel)``; None for no policy.
        module: The whole module, which torch's functions are asked about.
        name: Of the argument, for messages.

    Raises:
        MisconfigurationException: Something else.
    """
    if value is None:
        return None
    classes = getattr(value, "_module_classes", value)
    if isinstance(classes, (set, frozenset, list, tuple)) and all(isinstance(cls, type) for cls in classes):
        return classes_policy(classes)
    if not callable(value):
        raise MisconfigurationException(
            f"{name} must be a set of classes, a ModuleWrapPolicy or a function of a module, received {value!r}. "
            f"Use {name}={{MyBlock}}."
        )
    try:
        value(module=module, recurse=False, nonwrapped_numel=0)
    except TypeError:
        return lambda child: bool(value(child))
    chosen = set(_chosen_by_size(module, value)[0])
    return lambda child: child in chosen


def _chosen_by_size(module: Module, policy: Any) -> tuple[list[Module], int]:
    """Ask a function of ``(module, recurse, nonwrapped_numel)`` as torch does: inner modules first.

    Returns:
        The chosen submodules, and how many elements are in a chosen one.
    """
    total = sum(parameter.numel() for parameter in module.parameters())
    chosen: list[Module] = []
    if not policy(module=module, recurse=True, nonwrapped_numel=total):
        return [], 0
    inside = 0
    for child in module.children():
        found, num = _chosen_by_size(child, policy)
        chosen += found
        inside += num
        left = sum(parameter.numel() for parameter in child.parameters()) - num
        if policy(module=child, recurse=False, nonwrapped_numel=left):
            chosen.append(child)
            inside += left
    return chosen, inside
