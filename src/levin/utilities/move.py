"""Moving batches, modules and states of optimizers between devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from levin.utilities.collections import apply_to_collection
from levin.utilities.parameters import find_shared_parameters, set_shared_parameters
from levin.utilities.types import Tree

# A copy to these devices returns before it is done without the result being safe to read.
_BLOCKING_DEVICES = ("cpu", "mps")


class _Movable(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return callable(getattr(instance, "to", None)) and not isinstance(instance, type)


class Movable(metaclass=_Movable):
    """Anything with a ``to(device)`` method."""


def move_data_to_device(
    batch: object, device: torch.device | str, move_tensor: Optional[Callable[[Tensor, torch.device], Tensor]] = None
) -> Tree:
    """Return ``batch`` with every leaf that has a ``to`` method on ``device``.

    Args:
        batch: A leaf or any nesting of mappings, sequences and dataclass instances.
        device: Where to. Tensors go there without waiting, except to ``cpu`` and ``mps``.
        move_tensor: Moves each tensor, if not ``Tensor.to``.

    Returns:
        The moved batch. An object whose ``to`` returns None is kept itself.

    Example:
        >>> move_data_to_device([torch.zeros(2), "name"], torch.device("cpu"))
        [tensor([0., 0.]), 'name']
    """
    if type(device) is not torch.device:
        device = torch.device(device)
    kind = device.type
    # Tensors that are there already, alone or one level deep, need no walk and no copy.
    if kind == "cpu":
        if type(batch) is Tensor:
            if batch.is_cpu:
                return batch
        elif type(batch) is list or type(batch) is tuple:
            for item in batch:
                if type(item) is not Tensor or not item.is_cpu:
                    break
            else:
                return batch
    non_blocking = kind not in _BLOCKING_DEVICES

    def move(leaf: Tree) -> object:
        if not isinstance(leaf, Tensor):
            moved = leaf.to(device)
            return leaf if moved is None else moved
        return leaf.to(device, non_blocking=non_blocking) if move_tensor is None else move_tensor(leaf, device)

    # The most frequent batch needs no walk.
    return move(batch) if type(batch) is Tensor else apply_to_collection(batch, Movable, move)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module to a device, in place; parameters that are one stay one.

    torch makes a new parameter for each name where a parameter of the device cannot take the place of the old one, as on XLA
    devices, so that those of one weight would learn apart.
    """
    shared = find_shared_parameters(module)
    module.to(device)
    if shared and find_shared_parameters(module) != shared:
        set_shared_parameters(module, shared)


def move_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Move the tensors in the state of an optimizer, in place."""
    for parameter, state in optimizer.state.items():
        optimizer.state[parameter] = move_data_to_device(state, device)
