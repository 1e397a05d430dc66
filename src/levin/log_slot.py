"""A slot of the log store: the values of one name in one hook, and what one call of ``self.log`` says about them."""

from __future__ import annotations

import sys
from typing import Any, Callable, NamedTuple, Optional

import torch
from torch import Tensor

from levin.utilities.types import StateDict

BLOCK = 32
"""Values that are folded into the running sum at once."""

# What changes no mean (its weight is zero), sum, minimum or maximum.
_NEUTRAL = {"mean": 0.0, "sum": 0.0, "min": float("inf"), "max": float("-inf")}


class Arguments(NamedTuple):
    """The arguments of ``self.log`` that must stay the same for one name in one hook."""

    prog_bar: bool
    logger: Optional[bool]
    on_step: Optional[bool]
    on_epoch: Optional[bool]
    reduce_fx: Any
    sync_dist: bool
    sync_dist_group: Any
    add_dataloader_idx: bool
    metric_attribute: Optional[str]
    rank_zero_only: bool


def metric_class() -> type | tuple[()]:
    """Return torchmetrics' Metric if anybody imported it (no value can be one otherwise), else an empty tuple."""
    module = sys.modules.get("torchmetrics")
    return module.Metric if module is not None and hasattr(module, "Metric") else ()


class Slot:
    """The values of one name in one hook."""

    __slots__ = (
        "arguments",
        "block",
        "cells",
        "dataloader_idx",
        "epoch",
        "filled",
        "has_value",
        "hook",
        "is_restored",
        "latest",
        "logger",
        "metric",
        "name",
        "on_epoch",
        "on_step",
        "prog_bar",
        "reduction",
        "sync",
        "total",
        "weight",
        "weights",
    )  # fmt: skip

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
        sync: Optional[Callable[[Tensor, str, Any], Tensor]],
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
        self.block: Optional[Tensor] = None
        self.cells: list[Tensor] = []
        self.weights: list[float] = []
        self.has_value: bool = False
        self.is_restored: bool = False
        self.filled: int = 0
        self.total: Optional[Tensor] = None
        self.weight: float = 0.0
        # The value of the step where it is not the last cell, and that of the epoch once it was asked for: over ranks,
        # each is reduced once, however often and on which rank it is read.
        self.latest: Optional[Tensor] = None
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

    def reset(self) -> None:
        """Forget all values; the slot itself stays."""
        self.has_value = False
        self.filled = 0
        self.weights.clear()
        self.total = None
        self.weight = 0.0
        self.latest = self.epoch = None
        if self.metric is not None:
            self.metric.reset()

    def add(self, value: Any, weight: float, is_filler: Optional[bool] = None) -> None:
        """Add a number or a one-element tensor.

        Args:
            value: It.
            weight: What it counts in means.
            is_filler: Of a step for which not all ranks have a batch of their own: whether this rank has none.
        """
        before = None
        if is_filler:
            if self.sync is None:
                return  # it would add nothing, and a rank that has seen none but fillers has no value
            before = self.step_value() if self.has_value else None
            value, weight = _NEUTRAL[self.reduction], 0.0
        position = self.filled
        is_tensor = isinstance(value, Tensor)
        if self.block is None or (is_tensor and value.device != self.block.device and self.block.device.type == "cpu"):
            is_double = torch.float64 in (torch.get_default_dtype(), value.dtype if is_tensor else None)
            # Never less than float32: in half precision a running sum soon stands still.
            dtype = torch.float64 if is_double else torch.float32
            self._allocate(value.device if is_tensor else torch.device("cpu"), dtype)
        elif position == BLOCK:
            self._fold()
            position = 0
        if is_tensor:
            cell = self.cells[position]
            cell.copy_(value.detach() if value.dim() == 0 else value.detach().reshape(()))
        else:
            cell = self.cells[position].fill_(value)
        self.has_value = True
        if self.on_epoch:
            self.weights.append(weight)
            self.filled = position + 1
            self.epoch = None
        if self.sync is not None and self.on_step:
            self.latest = self._sync_step(cell, self.sync, is_filler)
        elif self.latest is not None or before is not None:
            self.latest = before

    def _sync_step(self, cell: Tensor, sync: Callable[[Tensor, str, Any], Tensor], is_filler: Optional[bool]) -> Tensor:
        group = self.arguments.sync_dist_group
        if is_filler is None or self.reduction != "mean":
            return sync(cell.clone(), self.reduction, group)
        both = torch.stack([cell, torch.full_like(cell, 0.0 if is_filler else 1.0)])
        total, num_active = sync(both, "sum", group)
        step_value: Tensor = total / num_active.clamp(min=1.0)
        return step_value

    def _allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        with torch.inference_mode(False):
            old, old_total = self.block, self.total
            self.block = torch.zeros(BLOCK if self.on_epoch else 1, dtype=dtype, device=device)
            if old is not None:
                self.block.copy_(old)
            self.cells = list(self.block.unbind())
            self.total = None if old_total is None else old_total.to(device)

    def _fold(self) -> None:
        self.total = self._sum()
        self.weight += sum(self.weights)
        self.weights.clear()
        self.filled = 0

    def _sum(self) -> Tensor:
        """Return the running sum (or minimum, maximum) with the block taken in."""
        assert self.block is not None
        if self.filled == 0 and self.total is not None:
            return self.total
        values = self.block[: self.filled]
        if self.reduction == "mean":
            first = self.weights[0]
            if all(weight == first for weight in self.weights):
                folded = values.sum() * first
            else:
                folded = (values * values.new_tensor(self.weights)).sum()
            return folded if self.total is None else self.total + folded
        if self.reduction == "sum":
            return values.sum() if self.total is None else self.total + values.sum()
        folded, pick = (values.min(), torch.minimum) if self.reduction == "min" else (values.max(), torch.maximum)
        return folded if self.total is None else pick(self.total, folded)

    def step_value(self) -> Any:
        """Return the last value; None for a metric that was updated without computing it for the batch."""
        if self.metric is not None:
            value = self.metric._forward_cache
            return value.detach() if isinstance(value, Tensor) else value
        if self.latest is not None:
            return self.latest
        assert self.block is not None
        return self.cells[self.filled - 1 if self.filled else 0].clone()

    def epoch_value(self) -> Any:
        """Return all values reduced to one."""
        if self.metric is not None:
            value = self.metric.compute()
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"The compute() of a logged metric must return a Tensor, received {value!r} for {self.name!r}. "
                    "Log its parts with self.log_dict(metric.compute()) at the end of the epoch."
                )
            return value.detach()
        if self.epoch is None:
            self.epoch = self._reduce()
        return self.epoch.clone()

    def _reduce(self) -> Tensor:
        total, weight = self._sum(), self.weight + sum(self.weights)
        if self.sync is None:
            return total / weight if self.reduction == "mean" else total.clone()
        group = self.arguments.sync_dist_group
        if self.reduction != "mean":
            return self.sync(total.clone(), self.reduction, group)
        both = torch.stack([total.double(), torch.tensor(weight, dtype=torch.float64, device=total.device)])
        summed, weights = self.sync(both, "sum", group)
        epoch_value: Tensor = summed / weights
        return epoch_value.to(total.dtype)

    def state_dict(self) -> StateDict:
        """Return the values as they lie here, unreduced, so that a resumed run adds in the same order."""
        plain = self.arguments._replace(reduce_fx=self.reduction, sync_dist_group=None)
        return {
            "name": self.name, "hook": self.hook, "dataloader_idx": self.dataloader_idx,
            "arguments": tuple(plain), "on_step": self.on_step, "on_epoch": self.on_epoch, "reduction": self.reduction,
            "block": None if self.block is None else self.block.clone(), "weights": list(self.weights),
            "filled": self.filled, "has_value": self.has_value, "total": self.total, "weight": self.weight,
            "of_step": None if self.metric is None else self.metric._forward_cache,
            "latest": self.latest,
        }  # fmt: skip

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        if state["block"] is not None:
            self._allocate(state["block"].device, state["block"].dtype)
            assert self.block is not None
            self.block.copy_(state["block"])
        self.weights = list(state["weights"])
        self.filled, self.has_value = state["filled"], state["has_value"]
        self.total, self.weight = state["total"], state["weight"]
        if self.metric is not None:
            self.metric._forward_cache = state.get("of_step")
        self.latest = state.get("latest")
