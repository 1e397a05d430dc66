"""Parameters of a module: their gradients, and which of them are one and the same."""

from __future__ import annotations

from typing import Union

import torch
from torch import Tensor, nn


def grad_norm(module: nn.Module, norm_type: Union[float, int, str], group_separator: str = "/") -> dict[str, Tensor]:
    """Return the norm of each parameter's gradient, and the norm of all of them together.

    Args:
        module: Parameters without a gradient are left out. The parts of a DTensor on other processes are counted, so all of its
            processes call this together.
        norm_type: p of the p-norm, > 0; ``"inf"`` for the largest value.
        group_separator: Stands between the kind of norm and the parameter in a key.

    Returns:
        Scalars on the device of the gradients, so that nothing waits for it.

    Raises:
        ValueError: ``norm_type`` is not positive.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.grad = torch.tensor([[3.0]])
        >>> grad_norm(layer, 2)
        {'grad_2.0_norm/weight': tensor(3.), 'grad_2.0_norm_total': tensor(3.)}
    """
    p = float(norm_type)
    if p <= 0:
        raise ValueError(f"norm_type must be > 0, received {norm_type!r}. Use 2 for the length, 'inf' for the maximum.")
    norms = {
        f"grad_{p}_norm{group_separator}{name}": full(torch.linalg.vector_norm(parameter.grad.detach(), p))
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    if norms:
        norms[f"grad_{p}_norm_total"] = torch.linalg.vector_norm(torch.stack(list(norms.values())), p)
    return norms


def full(tensor: Tensor) -> Tensor:
    """Return a tensor as it is on all processes together: that of a DTensor, which is in parts; any other as it is."""
    # Asked by attribute: the import of DTensor costs more than that of torch.
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def is_in_parts(tensor: Tensor) -> bool:
    """Whether no process has the whole tensor: that of a DTensor which is cut, or whose parts are still to be added up."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def all_modules(module: nn.Module) -> list[nn.Module]:
    """Return a module and all below it, each once and in no order: in half the time of ``modules()``, which makes up names."""
    found, left = {id(module): module}, [module]
    while left:
        for child in left.pop()._modules.values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                left.append(child)
    return list(found.values())


def free_gradients(module: nn.Module) -> None:
    """Call ``module.zero_grad()``, or do the same in half the time where nobody has changed what that does.

    Args:
        module: Whose gradients are freed, with those of its submodules.
    """
    kind, own = type(module), vars(module)
    if any(name in own or getattr(kind, name) is not getattr(nn.Module, name) for name in _FINDS_GRADIENTS):
        module.zero_grad()
        return
    for child in all_modules(module):
        for parameter in child._parameters.values():
            if parameter is not None:
                parameter.grad = None


_FINDS_GRADIENTS = ("zero_grad", "parameters", "named_parameters")


def find_shared_parameters(module: nn.Module) -> list[list[str]]:
    """Return the groups of names that stand for one parameter.

    Args:
        module: Searched with all its submodules.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[1].weight = net[0].weight
        >>> find_shared_parameters(net)
        [['0.weight', '1.weight']]
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def set_shared_parameters(module: nn.Module, shared_params: list[list[str]]) -> nn.Module:
    """Make each group of names stand for the parameter that its first name has; return ``module``.

    Args:
        module: Changed in place.
        shared_params: As :func:`find_shared_parameters` returns it.
    """
    for first, *others in shared_params:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(owner), attribute, parameter)
    return module
