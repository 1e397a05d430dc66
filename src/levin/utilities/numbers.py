"""Tensors to numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from levin.utilities.types import Metrics


def to_numbers(metrics: Metrics) -> dict[str, Any]:
    """Return ``metrics`` with each one-element tensor replaced by its number; other values stay.

    Values on an accelerator are read in one transfer per type, not one by one.

    Raises:
        ValueError: A tensor has more than one element.

    Example:
        >>> to_numbers({"loss": torch.tensor(2.0), "epoch": 1})
        {'loss': 2.0, 'epoch': 1}
    """
    numbers = dict(metrics)
    remote: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, value in metrics.items():
        if not isinstance(value, Tensor):
            continue
        if value.numel() != 1:
            raise ValueError(
                f"metrics[{name!r}] must be a number or a tensor with one element, received a tensor of shape"
                f" {tuple(value.shape)}. Reduce it first, for example with .mean()."
            )
        if value.is_cpu:
            numbers[name] = value.item()
        else:
            remote.setdefault((value.device, value.dtype), []).append(name)
    for names in remote.values():
        values = torch.stack([metrics[name].detach().reshape(()) for name in names]).tolist()
        numbers.update(zip(names, values))
    return numbers
