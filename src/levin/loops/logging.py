"""From the log store to the loggers: floats, keys and the step axis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import Tensor

from levin.loops.run import Run


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


def send(run: Run, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
    """Send ``metrics`` to every logger.

    Args:
        metrics: Values by key. A key ``step`` overrides the axis; without it, ``epoch`` is added unless it is there.
        step: Value on the x-axis; by default the number of batches that stepped, less the one under way.
    """
    if not run.loggers or not metrics:
        return
    values = to_floats(metrics)
    if step is None:
        if "step" in values:
            step = int(values.pop("step"))
        else:
            step = run.loops.fit.epoch_loop._batches_that_stepped
            values.setdefault("epoch", run.current_epoch)
    for logger in run.loggers:
        logger.log_metrics(metrics=dict(values), step=step)
        logger.save()


def send_hyperparameters(run: Run) -> None:
    """Send the hyper-parameters of module and data module, and the graph, to every logger.

    Raises:
        RuntimeError: Module and data module have different values under one name.
    """
    if not run.loggers or not run.settings.enable_autolog_hparams:
        return
    module, datamodule = run.module, run.datamodule
    merged: dict[str, Any] = {}
    for owner in (module, datamodule):
        if owner is None or not owner._log_hyperparams:
            continue
        for name, value in owner.hparams_initial.items():
            if name == "_class_path" or name == "_instantiator":
                continue
            if name in merged and not _same(merged[name], value):
                raise RuntimeError(
                    f"The hyper-parameter {name!r} has different values in the module and the data module, "
                    f"received {merged[name]!r} and {value!r}. Rename one, or use save_hyperparameters(logger=False)."
                )
            merged[name] = value
    for logger in run.loggers:
        if merged or (module is not None and module._log_hyperparams):
            logger.log_hyperparams(merged)
        logger.log_graph(module)
        logger.save()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
