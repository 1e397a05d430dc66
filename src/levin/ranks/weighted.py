"""Averages over batches of unequal size: gradients are summed, and divided once by what all processes have seen."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from levin.strategies.strategy import Strategy


def divide_by_weight(optimizer: Optimizer, weight: Any, strategy: Strategy) -> None:
    """Divide the gradients of sums by the weight that they have over all processes, so that they are those of an average.

    Args:
        optimizer: Its parameters have gradients that are summed over batches and averaged over processes.
        weight: Of the batches of this process: a number of samples or tokens.
        strategy: All its processes come here.
    """
    if strategy.is_distributed:
        total = torch.as_tensor(weight, dtype=torch.float32).to(strategy.root_device, non_blocking=True)
        data = strategy.data_parallel
        weight = strategy.reduce(total, group=data.group, reduce_op="sum") / data.size
    strategy.scale_gradients(optimizer, 1.0 / weight)
