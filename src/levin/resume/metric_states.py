"""The states of torchmetrics objects, which a module's state_dict leaves out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from levin.utilities.move import move_data_to_device
from levin.utilities.parameters import all_modules
from levin.utilities.types import StateDict


def collect_metric_states(module: torch.nn.Module, without: Iterable[object] = ()) -> dict[str, object]:
    """Return the states of the torchmetrics objects of ``module`` by their names.

    Args:
        module: Of the user.
        without: Objects that are left out.
    """
    if not any(_is_metric(child) for child in all_modules(module)):
        return {}
    left_out = {id(metric) for metric in without}
    return {
        name: {
            "update_count": child._update_count,
            "forward_cache": cache if isinstance(cache := child._forward_cache, torch.Tensor) else None,
            **{key: getattr(child, key) for key in child._defaults},
        }
        for name, child in module.named_modules()
        if _is_metric(child) and id(child) not in left_out
    }


def _is_metric(module: torch.nn.Module) -> bool:
    # A module says slowly what it has not.
    return "_defaults" in vars(module) and "_update_count" in vars(module)


def load_metric_states(module: torch.nn.Module, states: StateDict) -> None:
    """Set the states that :func:`collect_metric_states` returned."""
    children = dict(module.named_modules())
    for name, state in states.items():
        child: Any = children.get(name)
        if child is not None:
            child._update_count = state["update_count"]
            child._forward_cache = move_data_to_device(state.get("forward_cache"), child.device)
            for key in child._defaults:
                setattr(child, key, move_data_to_device(state[key], child.device))
