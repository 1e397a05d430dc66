"""What torch's own optimizers do, without what torch puts around it for others to look at.

For a small model the names for profilers, the search for hooks and the guards of the compiler cost more than the update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Optional

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as _after
from torch.optim.optimizer import _global_optimizer_pre_hooks as _before


def update_of(optimizer: Any) -> Optional[Callable[[], object]]:
    """Return what ``optimizer.step(closure)`` does after the closure, where that is a thing of its own; else None.

    All but LBFGS of torch's optimizers call the closure first, once. Called before, it needs no gradients turned on again,
    and a profile tells the update from the rest. What torch puts around an update, names for profilers and a search for
    hooks, costs more than the update of a small model: it is left out while nobody looks. Whoever calls this sees to it that
    nobody has put a ``step`` of his own on the optimizer, as schedulers of torch do.
    """
    step = type(optimizer).step
    if not inspect.isfunction(step) or not step.__module__.startswith("torch.optim."):
        return None
    if isinstance(optimizer, torch.optim.LBFGS):
        return None
    inner: Optional[Callable[[object], object]] = getattr(step, "__wrapped__", None)
    if inner is None:
        whole: Callable[[], object] = optimizer.step
        return whole

    def update() -> object:
        is_seen = _before or _after or optimizer._optimizer_step_post_hooks or torch._C._autograd._profiler_enabled()
        return optimizer.step() if is_seen else inner(optimizer)

    return update


_ZERO_GRAD = torch.optim.Optimizer.zero_grad


def zero_grad_of(optimizer: Any) -> Callable[..., None]:
    """Return what ``optimizer.zero_grad()`` does; in a tenth of the time where it is torch's own."""
    attributes = vars(optimizer)
    if getattr(type(optimizer), "zero_grad", None) is not _ZERO_GRAD:
        own: Callable[..., None] = optimizer.zero_grad
        return own

    def zero_grad(set_to_none: bool = True) -> None:
        if not set_to_none:
            optimizer.zero_grad(set_to_none=False)
            return
        if "zero_grad" in attributes:
            optimizer.zero_grad()
            return
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    return zero_grad
