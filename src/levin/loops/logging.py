"""From the log store to the loggers: floats, keys and the step axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor

if TYPE_CHECKING:
    from levin.trainer import Trainer


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the values as Python numbers, read from the device in one transfer.

    Raises:
        ValueError: A tensor has more than one element.
    """
    tensors: dict[str, Tensor] = {}
    result: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"The metric {name!r} has shape {tuple(value.shape)} and cannot be logged. Reduce it to one element."
                )
            tensors[name] = value.reshape(())
        result[name] = value
    if len(tensors) > 1 and len({(tensor.device, tensor.dtype) for tensor in tensors.values()}) == 1:
        result.update(zip(tensors, torch.stack(list(tensors.values())).tolist()))
    else:
        result.update((name, tensor.item()) for name, tensor in tensors.items())
    return result


def send(trainer: Trainer, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
    """Send ``metrics`` to every logger.

    Args:
        metrics: Values by key. A key ``step`` overrides the axis; ``epoch`` is added unless it is there.
        step: Value on the x-axis; by default the number of batches that stepped, less the one under way.
    """
    if not trainer.loggers or not metrics:
        return
    values = to_floats(metrics)
    if step is None:
        if "step" in values:
            step = int(values.pop("step"))
        else:
            step = trainer.fit_loop.epoch_loop._batches_that_stepped
        values.setdefault("epoch", trainer.current_epoch)
    for logger in trainer.loggers:
        logger.log_metrics(metrics=dict(values), step=step)
        logger.save()
