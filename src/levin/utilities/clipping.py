"""Gradients that are too large, made smaller: right for plain tensors and for DTensors on any meshes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from levin.utilities.parameters import full


def clip_by_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    join: Callable[[Tensor], Tensor] | None = None,
    counts: Callable[[Tensor], bool] | None = None,
) -> Tensor:
    """Scale the gradients so that their norm over all parameters is at most ``max_norm``.

    Args:
        parameters: Those without a gradient are left out. The parts of a DTensor on other processes are counted, so all
            of its processes call this together.
        max_norm: Largest norm.
        norm_type: p of the p-norm; ``inf`` for the largest absolute value.
        error_if_nonfinite: Whether a norm that is nan or infinite is an error.
        join: Returns the norms of all processes that have parameters of their own, out of that of this one.
        counts: Whether a parameter counts in the norm of this process; all do when None.

    Returns:
        The norm before clipping, a scalar on the device of the gradients.

    Raises:
        RuntimeError: The norm is not finite, and ``error_if_nonfinite`` is set. The gradients are left as they are.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_by_norm([weight], max_norm=1.0), weight.grad
        (tensor(5.), tensor([0.6000, 0.8000]))
    """
    parameters = list(parameters)
    groups = list(by_mesh(parameters).values())
    counted = groups if counts is None else by_mesh(filter(counts, parameters)).values()
    norms = [full(get_total_norm([p.grad for p in group if p.grad is not None], norm_type)) for group in counted]
    if not norms and join is None:
        return torch.tensor(0.0)
    total = norms[0] if len(norms) == 1 else _joined(torch.stack(norms or [torch.tensor(0.0)]), norm_type)
    if join is not None:
        total = _joined(join(total), norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The norm of the gradients is {total.item()}, so they cannot be clipped. Look for what made them so "
            "(detect_anomaly=True), or pass error_if_nonfinite=False to clip them all the same."
        )
    for group in groups:
        clip_grads_with_norm_(group, max_norm, total)
    return total


def _joined(norms: Tensor, norm_type: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(norms, norm_type)
    return norm


def clip_by_value(parameters: Iterable[Tensor], max_value: float) -> None:
    """Bring every element of the gradients into ``[-max_value, max_value]``.

    Args:
        parameters: Those without a gradient are left out.
        max_value: Largest absolute value.

    Raises:
        RuntimeError: No parameter has a gradient.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> clip_by_value([weight], 3.5)
        >>> weight.grad
        tensor([ 3.0000, -3.5000])
    """
    groups = by_mesh(parameters)
    if not groups:
        raise RuntimeError("No parameter has a gradient that could be clipped. Run backward first.")
    for group in groups.values():
        clip_grad_value_(group, max_value)


def by_mesh(parameters: Iterable[Tensor]) -> dict[object, list[Tensor]]:
    """Return the parameters that have a gradient by the mesh they lie on: torch's fused operations take one at a time."""
    groups: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None:
            groups.setdefault(getattr(gradient, "device_mesh", None), []).append(parameter)
    return groups
