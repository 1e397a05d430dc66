"""Layers cut over processes, by a plan that names them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import Module

from levin.utilities.exceptions import MisconfigurationException

STYLES: dict[str, type[ParallelStyle]] = {
    "column": ColwiseParallel, "row": RowwiseParallel, "sequence": SequenceParallel,
}  # fmt: skip


def apply_plan(module: Module, mesh: DeviceMesh, plan: Mapping[str, str | ParallelStyle]) -> None:
    """Cut the layers that a plan names over a mesh of one dimension, in place.

    Args:
        module: The whole module.
        mesh: The processes that share layers.
        plan: Pattern of a submodule's name (as the shell matches files) -> style.

    Raises:
        MisconfigurationException: A pattern fits no submodule, a layer cannot be cut into so many parts, or layers that
            share a parameter are cut in different ways.
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
    shared = first_names(module)
    parallelize_module(module, mesh, found)
    _share_again(module, shared)


def _check_divisible(name: str, part: Module, style: str | ParallelStyle, size: int) -> None:
    if not isinstance(part, torch.nn.Linear) or style not in ("column", "row"):
        return
    features = part.out_features if style == "column" else part.in_features
    if features % size:
        raise MisconfigurationException(
            f"{name} has {features} {'output' if style == 'column' else 'input'} features, which {size} processes cannot "
            f"share evenly. Choose a tensor_parallel_size that divides {features}, or another width."
        )


def first_names(module: Module) -> dict[str, str]:
    """Return the first name of the same parameter for each name of one.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        >>> net[1].weight = net[0].weight
        >>> first_names(net)
        {'0.weight': '0.weight', '1.weight': '0.weight'}
    """
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {name: first[id(parameter)] for name, parameter in module.named_parameters(remove_duplicate=False)}


def _share_again(module: Module, names: Mapping[str, str]) -> None:
    """Make one parameter again of those that were one before their layers were cut, in place.

    Args:
        module: Whose layers were cut, each with a parameter of its own.
        names: What :func:`first_names` was before.

    Raises:
        MisconfigurationException: They are cut in different ways.
    """
    for name, first in names.items():
        parameter, other = module.get_parameter(first), module.get_parameter(name)
        if getattr(parameter, "placements", None) != getattr(other, "placements", None):
            raise MisconfigurationException(
                f"{first} and {name} are one parameter, and the plan cuts their layers in different ways. Have it cut both "
                "alike (an embedding by 'row', a head by 'column'), or none of them."
            )
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._parameters[key] = parameter
