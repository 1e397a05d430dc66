"""What ``fully_shard`` has gathered in a process: weights, and the gradients of an accumulation window that is still open.

Without a reduction torch leaves gradients on the gathered parameters, or beside these in the format of the reduction, and the
parameters that a module shows have none. There is no public way to them, so this file alone reaches into torch (2.6 to 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import Module

from levin.utilities.types import Function

_IN_STEP = "_is_in_step"


def window_gradients(module: Module) -> list[Tensor | None]:
    """Return a copy of the gradient of each of ``module.parameters()``, whole and not yet averaged; None for no gradient.

    All processes call this: where tensor parallelism cuts a gradient, they gather it.
    """
    gathered = _gathered(module)
    found: list[Tensor | None] = []
    for parameter in module.parameters():
        inner = gathered.get(id(parameter))
        if inner is None:
            gradient = parameter.grad
        else:
            gradient = inner.unsharded_accumulated_grad
            if gradient is None:
                gradient = getattr(getattr(inner, "_unsharded_param", None), "grad", None)
        found.append(None if gradient is None else _whole(gradient.detach()))
    return found


def load_window_gradients(module: Module, gradients: list[Tensor | None]) -> None:
    """Take up :func:`window_gradients`. All processes call this."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        # Makes the gathered parameters, if this module was never run.
        part.unshard()
        part.reshard()
    gathered = _gathered(module)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        inner = gathered.get(id(parameter))
        if inner is None:
            parameter.grad = None if gradient is None else cut_as(parameter, gradient.to(parameter.dtype))
        elif gradient is not None:
            own = inner._unsharded_param
            if gradient.dtype == own.dtype and inner.reduce_dtype in (None, own.dtype):
                own.grad = cut_as(own, gradient)
            else:
                inner.unsharded_accumulated_grad = cut_as(own, gradient.to(inner.reduce_dtype or own.dtype))


def _whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()


def cut_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of a parameter that may be cut, out of the whole one, which all processes have."""
    gradient = gradient.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return gradient
    return distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)


def let_go(module: Module) -> None:
    """Leave every process with its parts alone, also after a forward that has failed half-way."""
    for group in _groups(module):
        group._to_sharded()


def let_go_outside_of_steps(owner: Module, wholes: Iterable[Module]) -> None:
    """Let go after each forward that no step of a module makes, such as one in a hook.

    Torch keeps what belongs to no block for a backward pass. Before the next one an optimizer would step the parts alone, and what
    hooks write into the copies would be lost.

    Args:
        owner: The module with the steps; see :func:`as_step`.
        wholes: The modules that hold what is cut: the owner, or its stages.
    """

    def after(root: Module, *_: object) -> None:
        if _IN_STEP not in vars(owner):
            let_go(root)

    for whole in wholes:
        for root in _roots(whole):
            root.register_forward_hook(after)


def as_step(owner: Module, step: Function) -> Function:
    """Return ``step``, in which forwards keep what they have gathered."""
    attributes = vars(owner)

    def run(*args: object, **kwargs: object) -> object:
        attributes[_IN_STEP] = True
        try:
            return step(*args, **kwargs)
        finally:
            attributes.pop(_IN_STEP, None)

    return run


def _roots(module: Module) -> Iterator[Module]:
    """Yield the outermost parts that are cut."""
    if isinstance(module, FSDPModule):
        yield module
    else:
        for child in module.children():
            yield from _roots(child)


def _groups(module: Module) -> Iterator[Any]:
    """Yield torch's record of the parameters that are gathered at once, for each part that has some."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            state: Any = part._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (group for group in groups if group is not None)


def _gathered(module: Module) -> dict[int, Any]:
    """Return torch's record of each parameter that is cut, by the parameter's id."""
    return {id(inner.sharded_param): inner for group in _groups(module) for inner in group.fsdp_params}
