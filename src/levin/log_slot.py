"""A slot of the log store: the values of one name in one hook, and what one call of ``self.log`` says about them."""

from __future__ import annotations

import math
import sys
import zlib
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from levin.utilities.types import Group, StateDict

BLOCK = 32
"""Values on a device that are folded into the running sum at once."""

Sync = Callable[[Tensor, str, Group], Tensor]
"""Reduces a tensor over the ranks: ``sync(tensor, reduction, group)``."""

# What changes no mean (its weight is zero), sum, minimum or maximum.
_NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}


class Arguments(NamedTuple):
    """The arguments of ``self.log`` that must stay the same for one name in one hook."""

    prog_bar: bool
    logger: Optional[bool]
    on_step: Optional[bool]
    on_epoch: Optional[bool]
    reduce_fx: object
    sync_dist: bool
    sync_dist_group: Group
    add_dataloader_idx: bool
    metric_attribute: Optional[str]
    rank_zero_only: bool


class StepOrder:
    """A number for the order in which values of steps were reduced over all ranks, which is by the order of calls alone.

    Args:
        check: Called with hook and name before the first of their values is reduced; raises where ranks differ.
    """

    def __init__(self, check: Callable[[str, str], None]) -> None:
        self.number: int = 0
        self._check = check
        self._checked: set[tuple[str, str]] = set()

    def note(self, hook: str, name: str, reduction: str) -> None:
        """A value is about to be reduced that was logged in ``hook`` under ``name``.

        Raises:
            RuntimeError: It is the first one, and other ranks do something else, on all ranks.
        """
        if (hook, name) not in self._checked:
            self._checked.add((hook, name))
            self._check(hook, name)
        self.number = zlib.crc32(f"{hook} {name} {reduction}".encode(), self.number)


def _combined(reduction: str, first: Tensor, second: Tensor) -> Tensor:
    """Return the sum, minimum or maximum of two."""
    if reduction == "min":
        return torch.minimum(first, second)
    return torch.maximum(first, second) if reduction == "max" else first + second


def metric_class() -> type | tuple[()]:
    """Return torchmetrics' Metric if anybody imported it (no value can be one otherwise), else an empty tuple."""
    module = sys.modules.get("torchmetrics")
    return module.Metric if module is not None and hasattr(module, "Metric") else ()


class Block:
    """Values that stay on their device, folded into a running sum (or minimum, maximum) when it is full.

    Args:
        reduction: ``"mean"``, ``"sum"``, ``"min"`` or ``"max"``.
        device: Where the values are.
        dtype: Of the sum.
        size: How many values are folded at once.
    """

    def __init__(self, reduction: str, device: torch.device, dtype: torch.dtype, size: int) -> None:
        self.reduction = reduction
        with torch.inference_mode(False):
            self.values = torch.zeros(size, dtype=dtype, device=device)
            self.cells: list[Tensor] = list(self.values.unbind())
        # Of the values that are not folded yet, from the first cell on.
        self.weights: list[float] = []
        self.total: Optional[Tensor] = None

    def put(self, value: Tensor) -> Tensor:
        """Copy a one-element tensor into the next cell, and return the cell."""
        if len(self.weights) == len(self.cells):
            self.total = self.sum()
            self.weights.clear()
        return self.cells[len(self.weights)].copy_(value.detach() if value.dim() == 0 else value.detach().reshape(()))

    def sum(self) -> Tensor:
        """Return what there is, reduced to one value."""
        num = len(self.weights)
        if num == 0 and self.total is not None:
            return self.total
        values = self.values[:num]
        if self.reduction == "mean":
            first = self.weights[0]
            if all(weight == first for weight in self.weights):
                folded = values.sum() * first
            else:  # a tensor of the weights would have to come from the host, which waits
                folded = torch.stack(torch._foreach_mul(self.cells[:num], self.weights)).sum()
        else:
            folded = (
                values.sum() if self.reduction == "sum" else values.min() if self.reduction == "min" else values.max()
            )
        return folded if self.total is None else _combined(self.reduction, self.total, folded)

    def moved_to(self, device: torch.device) -> Block:
        """Return the same block on ``device``."""
        moved = Block(self.reduction, device, self.values.dtype, len(self.cells))
        moved.load_state_dict(self.state_dict())
        return moved

    def state_dict(self) -> dict[str, object]:
        """Return the values as they lie here, unreduced, so that a resumed run adds in the same order."""
        return {"values": self.values.clone(), "weights": list(self.weights), "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`."""
        total = state["total"]
        self.values.copy_(state["values"])
        self.weights = list(state["weights"])
        self.total = None if total is None else total.to(self.values.device)


class Slot:
    """The values of one name in one hook.

    Numbers, and tensors in the memory of the host, are added at once; those on another device stay there in a block.
    """

    __slots__ = (
        "arguments",
        "block",
        "dataloader_idx",
        "dtype",
        "epoch",
        "has_value",
        "hook",
        "is_restored",
        "latest",
        "logger",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "order",
        "prog_bar",
        "reduction",
        "sync",
        "total",
        "weight",
    )

    def __init__(
        self,
        name: str,
        hook: str,
        arguments: Arguments,
        on_step: bool,
        on_epoch: bool,
        reduction: str,
        dataloader_idx: Optional[int],
        metric: Any,
        sync: Optional[Sync],
        order: StepOrder,
    ) -> None:
        self.name = name
        self.hook = hook
        self.arguments = arguments
        self.on_step = on_step
        self.on_epoch = on_epoch
        self.prog_bar = arguments.prog_bar
        self.logger = arguments.logger is not False
        self.reduction = reduction
        self.dataloader_idx = dataloader_idx
        self.metric = metric
        self.sync = sync if arguments.sync_dist and not arguments.rank_zero_only else None
        self.order = order
        self.has_value: bool = False
        self.is_restored: bool = False
        # Of what is read: that of the first value, but never less than float32, in which a running sum soon stands still.
        self.dtype: Optional[torch.dtype] = None
        # The numbers of the epoch, reduced, and how much they and the values of the block weigh.
        self.total: float = _NEUTRAL[reduction]
        self.weight: float = 0.0
        self.block: Optional[Block] = None
        # The value of the step, and that of the epoch once it was asked for: over ranks, each is reduced once, however
        # often and on which rank it is read.
        self.latest: Optional[float | Tensor] = None
        self.epoch: Optional[Tensor] = None

    @property
    def is_collective(self) -> bool:
        """Whether all ranks take part when the value of the epoch is computed."""
        arguments, metric = self.arguments, self.metric
        if arguments.rank_zero_only or arguments.sync_dist_group is not None or not self.on_epoch:
            return False
        if metric is None:
            return self.sync is not None
        return getattr(metric, "sync_on_compute", True) and getattr(metric, "process_group", None) is None

    @property
    def is_collective_in_steps(self) -> bool:
        """Whether all ranks take part in each call of ``self.log``."""
        return self.on_step and self.metric is None and self.sync is not None and self.arguments.sync_dist_group is None

    def reset(self) -> None:
        """Forget all values; the slot itself stays."""
        self.has_value = self.is_restored = False
        self.total = _NEUTRAL[self.reduction]
        self.latest = self.epoch = None
        self.weight = 0.0
        if self.block is not None:
            self.block.weights.clear()
            self.block.total = None
        if self.metric is not None:
            self.metric.reset()

    def add(self, value: Any, weight: float, is_filler: Optional[bool] = None) -> None:
        """Add a number or a one-element tensor.

        Args:
            value: It.
            weight: What it counts in means.
            is_filler: Of a step for which not all ranks have a batch of their own: whether this rank has none.
        """
        if is_filler:
            if self.sync is None:
                return  # it would add nothing, and a rank that has seen none but fillers has no value
            value, weight = _NEUTRAL[self.reduction], 0.0
        if self.dtype is None:
            is_double = torch.float64 in (torch.get_default_dtype(), value.dtype if isinstance(value, Tensor) else None)
            self.dtype = torch.float64 if is_double else torch.float32
        # To read a tensor of the host waits for nothing and costs less than to copy it.
        latest: float | Tensor
        if not isinstance(value, Tensor):
            latest = number = float(value)
        elif value.is_cpu:
            latest = number = value.item()
        else:
            latest, number = self._put(value, weight), _NEUTRAL[self.reduction]
        if self.on_epoch:
            reduction = self.reduction
            self.weight += weight
            self.epoch = None
            if reduction == "mean":
                self.total += number * weight
            elif reduction == "sum":
                self.total += number
            elif number != number or (number < self.total if reduction == "min" else number > self.total):
                self.total = number  # what is not a number stays
        if self.sync is not None and self.on_step:
            latest = self._sync_step(self._as_tensor(latest), self.sync, is_filler)
        self.latest = latest
        self.has_value = True

    def _put(self, value: Tensor, weight: float) -> Tensor:
        block = self.block
        if block is None:
            assert self.dtype is not None
            block = Block(self.reduction, value.device, self.dtype, BLOCK if self.on_epoch else 1)
        elif block.values.device != value.device:
            block = block.moved_to(value.device)
        self.block = block
        cell = block.put(value)
        if self.on_epoch:
            block.weights.append(weight)
        return cell

    def _as_tensor(self, value: float | Tensor) -> Tensor:
        """Return a new tensor with ``value``."""
        return value.clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype)

    def _sync_step(self, cell: Tensor, sync: Sync, is_filler: Optional[bool]) -> Tensor:
        group = self.arguments.sync_dist_group
        if group is None:
            self.order.note(self.hook, self.name, self.reduction)
        if is_filler is None or self.reduction != "mean":
            return sync(cell, self.reduction, group)
        both = torch.stack([cell, torch.full_like(cell, 0.0 if is_filler else 1.0)])
        total, num_active = sync(both, "sum", group)
        step_value: Tensor = total / num_active.clamp(min=1.0)
        return step_value

    @property
    def _is_of_host(self) -> bool:
        """Whether all values of the epoch were numbers of the host."""
        return self.block is None or not (self.block.weights or self.block.total is not None)

    def _sum(self) -> Tensor:
        """Return the sum (or minimum, maximum) of the epoch: in double precision on the host, else on the device."""
        if self.block is None or self._is_of_host:
            return torch.tensor(self.total, dtype=torch.float64)
        on_device = self.block.sum()
        if self.total == _NEUTRAL[self.reduction]:
            return on_device
        return _combined(self.reduction, on_device, on_device.new_tensor(self.total))

    def step_value(self) -> object:
        """Return the last value; None for a metric that was updated without computing it for the batch."""
        if self.metric is not None:
            value = self.metric._forward_cache
            return value.detach() if isinstance(value, Tensor) else value
        assert self.latest is not None
        return self._as_tensor(self.latest)

    def epoch_value(self) -> object:
        """Return all values reduced to one; None for a metric that has nothing to compute."""
        if self.metric is not None:
            value = self.metric.compute()
            if value is None:
                return None
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"The compute() of a logged metric must return a Tensor, received {value!r} for {self.name!r}. "
                    "Log its parts with self.log_dict(metric.compute()) at the end of the epoch."
                )
            return value.detach()
        if self.sync is None and self._is_of_host:
            return self._reduce()
        if self.epoch is None:
            self.epoch = self._reduce()
        return self.epoch.clone()

    def _reduce(self) -> Tensor:
        if self.sync is None and self._is_of_host:
            mean = self.total / self.weight if self.weight else math.nan
            return torch.tensor(mean if self.reduction == "mean" else self.total, dtype=self.dtype)
        total = self._sum()
        if self.sync is None:
            return (total / self.weight if self.reduction == "mean" else total).to(self.dtype)
        group = self.arguments.sync_dist_group
        if self.reduction != "mean":
            return self.sync(total.to(self.dtype, copy=True), self.reduction, group)
        both = torch.stack([total.double(), torch.tensor(self.weight, dtype=torch.float64, device=total.device)])
        summed, weights = self.sync(both, "sum", group)
        epoch_value: Tensor = summed / weights
        return epoch_value.to(self.dtype)

    def state_dict(self) -> StateDict:
        """Return the values, unreduced where they lie on a device, so that a resumed run adds in the same order."""
        plain = self.arguments._replace(reduce_fx=self.reduction, sync_dist_group=None)
        return {
            "name": self.name, "hook": self.hook, "dataloader_idx": self.dataloader_idx,
            "arguments": tuple(plain), "on_step": self.on_step, "on_epoch": self.on_epoch, "reduction": self.reduction,
            "is_double": self.dtype == torch.float64, "has_value": self.has_value,
            "latest": self.latest.clone() if isinstance(self.latest, Tensor) else self.latest,
            "total": self.total, "weight": self.weight, "block": None if self.block is None else self.block.state_dict(),
            "of_step": None if self.metric is None else self.metric._forward_cache,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        self.dtype = torch.float64 if state["is_double"] else torch.float32
        if (block := state["block"]) is not None:
            values = block["values"]
            self.block = Block(self.reduction, values.device, values.dtype, len(values))
            self.block.load_state_dict(block)
        self.has_value, self.latest = state["has_value"], state["latest"]
        self.total, self.weight = state["total"], state["weight"]
        if self.metric is not None:
            self.metric._forward_cache = state.get("of_step")
