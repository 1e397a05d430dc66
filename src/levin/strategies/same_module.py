"""A module that is not the same in all processes is told with its layers, before anything of it is sent."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import Parameter, is_lazy

from levin.strategies.collectives import describe
from levin.strategies.control_group import ControlGroup
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.user_frames import ranks_by_value, show_by_rank

_NUM_SHOWN = 5


def check_same_module(module: Module, control: ControlGroup, for_training: bool = True) -> None:
    """Compare the parameters and buffers of all processes: a number of each, and what they are where that differs.

    Args:
        module: As it is before it is wrapped or cut. What DistributedDataParallel is to leave alone may differ.
        control: Of the processes.
        for_training: Whether it matters which parameters learn.

    Raises:
        ValueError: They differ, in all processes.
    """
    own = describe_tensors(module, for_training)
    what = "layers of a module"
    sums = control.exchange([zlib.crc32(repr(own).encode())], what)
    if all(each == sums[0] for each in sums):
        return
    raise MisconfigurationException(
        f"{type(module).__name__} must have the same parameters and buffers on all ranks, received "
        f"{'; '.join(_differences(control.exchange_objects(own, what)))}. Make its layers without asking for the rank."
    )


def describe_tensors(module: Module, for_training: bool = True) -> dict[str, str]:
    """Return name -> what it is of each parameter and buffer, in order.

    Example:
        >>> from torch import nn
        >>> describe_tensors(nn.Linear(2, 3).requires_grad_(False), for_training=False)
        {'weight': 'float32 of shape (3, 2)', 'bias': 'float32 of shape (3,)'}
        >>> describe_tensors(nn.Linear(2, 3, bias=False).requires_grad_(False))
        {'weight': 'float32 of shape (3, 2), requires_grad=False'}
    """
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    tensors = chain(module.named_parameters(), module.named_buffers())
    return {name: _in_words(tensor, for_training) for name, tensor in tensors if name not in ignored}


def _in_words(tensor: Tensor, for_training: bool) -> str:
    # A parameter that has not seen a batch has no shape yet.
    text = f"{tensor.dtype} of a shape to be found" if is_lazy(tensor) else describe(tensor)
    if tensor.layout == torch.strided and not is_lazy(tensor) and not tensor.is_contiguous():
        text += f" in another order of memory, {tensor.stride()}"
    is_frozen = for_training and isinstance(tensor, Parameter) and not tensor.requires_grad
    return f"{text}, requires_grad=False" if is_frozen else text


def _differences(everywhere: Sequence[dict[str, str]]) -> list[str]:
    found = []
    for name in dict.fromkeys(chain.from_iterable(everywhere)):
        ranks = ranks_by_value([described.get(name, "none") for described in everywhere])
        if len(ranks) > 1:
            found.append(f"{name}: {show_by_rank(ranks)}")
    if not found:
        orders = ranks_by_value([", ".join(described) for described in everywhere])
        found.append(f"another order: {show_by_rank(orders)}")
    rest = len(found) - _NUM_SHOWN
    return found if rest <= 0 else [*found[:_NUM_SHOWN], f"{rest} more"]
