"""Tensors, and numbers of other libraries, to numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from levin.utilities.parameters import is_in_parts
from levin.utilities.types import Metrics


class Reading:
    """Metrics whose one-element tensors become numbers; those on a CUDA device travel while the host goes on.

    Args:
        metrics: Values by name; what is no tensor stays as it is.

    Raises:
        ValueError: A tensor has more than one element, or each process has a part of it.

    Example:
        >>> reading = Reading({"loss": torch.tensor(2.0), "epoch": 1})
        >>> reading.is_there
        True
        >>> reading.numbers()
        {'loss': 2.0, 'epoch': 1}
    """

    def __init__(self, metrics: Metrics) -> None:
        self._numbers = dict(metrics)
        self._travelling: list[tuple[list[str], Tensor, torch.cuda.Event]] = []
        remote: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                continue
            if value.numel() != 1:
                raise ValueError(
                    f"metrics[{name!r}] must be a number or a tensor with one element, received a tensor of shape"
                    f" {tuple(value.shape)}. Reduce it first, for example with .mean()."
                )
            if is_in_parts(value):
                raise ValueError(
                    f"metrics[{name!r}] is a DTensor of which each process has a part. Call its full_tensor() on all of them."
                )
            if value.is_cpu:
                self._numbers[name] = value.item()
            else:
                remote.setdefault((value.device, value.dtype), []).append(name)
        for (device, _), names in remote.items():
            # One transfer for all of a type, not one by one.
            values = torch.stack([metrics[name].detach().reshape(()) for name in names])
            if device.type == "cuda":
                copies = values.to("cpu", non_blocking=True)  # into pinned memory
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(device))
                self._travelling.append((names, copies, arrived))
            else:
                self._numbers.update(zip(names, values.tolist()))

    @property
    def is_there(self) -> bool:
        """Whether :meth:`numbers` waits for nothing."""
        return all(arrived.query() for _, _, arrived in self._travelling)

    def numbers(self) -> dict[str, Any]:
        """Return a new dictionary of numbers, in the order of the metrics; waits for the device."""
        for names, copies, arrived in self._travelling:
            arrived.synchronize()
            self._numbers.update(zip(names, copies.tolist()))
        self._travelling.clear()
        return dict(self._numbers)


class Latest:
    """Numbers of values that change, as new as they can be without waiting for the device."""

    def __init__(self) -> None:
        self._numbers: dict[str, object] = {}
        self._coming: Reading | None = None

    def of(self, metrics: Metrics) -> dict[str, object]:
        """Return the numbers of ``metrics``; while these travel, those of an earlier call."""
        if self._coming is None or self._arrives(self._coming):
            self._coming = Reading(metrics)
            self._arrives(self._coming)
        return dict(self._numbers)

    def _arrives(self, reading: Reading) -> bool:
        if not reading.is_there:
            return False
        self._numbers, self._coming = reading.numbers(), None
        return True


def to_numbers(metrics: Metrics) -> dict[str, Any]:
    """Return ``metrics`` with each one-element tensor replaced by its number; other values stay.

    Values on an accelerator are read in one transfer per type, not one by one.

    Raises:
        ValueError: A tensor has more than one element, or each process has a part of it.

    Example:
        >>> to_numbers({"loss": torch.tensor(2.0), "epoch": 1})
        {'loss': 2.0, 'epoch': 1}
    """
    return Reading(metrics).numbers()


def plain_number(value: Any) -> Any:
    """Return a number of NumPy's or torch's as one of Python's; anything else as it is.

    Example:
        >>> plain_number(torch.tensor(2)), plain_number("2")
        (2, '2')
    """
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
