"""Throughput of a loop of one's own, given to the loggers of its Fabric."""

from __future__ import annotations

from typing import Any

import torch

from levin.fabric.fabric import Fabric
from levin.utilities.throughput import Throughput, get_available_flops


class ThroughputMonitor(Throughput):
    """A :class:`~levin.utilities.throughput.Throughput` that knows device and number of processes, and logs.

    Args:
        fabric: Its device, precision, processes and loggers.
        kwargs: For :class:`~levin.utilities.throughput.Throughput`.

    Example:
        >>> monitor = ThroughputMonitor(Fabric(accelerator="cpu", devices=1))
        >>> monitor.update(time=1.0, batches=1, samples=32)
        >>> monitor.compute_and_log()["samples"]
        32
    """

    def __init__(self, fabric: Fabric, **kwargs: Any) -> None:
        dtype = getattr(fabric.strategy.precision, "dtype", torch.float32)
        kwargs.setdefault("available_flops", get_available_flops(fabric.device, dtype))
        super().__init__(world_size=fabric.world_size, **kwargs)
        self._fabric = fabric
        self.step: int = -1

    def compute_and_log(self, step: int | None = None) -> dict[str, float]:
        """Compute the rates and give them to all loggers.

        Args:
            step: Of the loggers; by default the number of calls before this one.
        """
        self.step = self.step + 1 if step is None else step
        metrics = self.compute()
        self._fabric.log_dict(metrics, step=self.step)
        return metrics
