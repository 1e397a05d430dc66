"""From the log store to the loggers: keys and the step axis."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Optional

import torch

from levin.loops.run import Run


def send(run: Run, metrics: Mapping[str, object], step: Optional[int] = None, timeout_s: float = math.inf) -> None:
    """Send ``metrics`` to every logger.

    Args:
        metrics: Values by key. A key ``step`` overrides the axis; without it, ``epoch`` is added unless it is there.
        step: Value on the x-axis; by default the number of batches that stepped, less the one under way.
        timeout_s: How long to wait for the device; what it has not computed then is sent by the loop later.
    """
    if not run.loggers or not metrics:
        return
    if step is None and "step" not in metrics:
        step = run.loops.fit.epoch_loop._batches_that_stepped
        metrics = {**metrics, "epoch": metrics.get("epoch", run.current_epoch)}
    run.unsent.add(run.loggers, metrics, step, timeout_s=timeout_s)


def send_hyperparameters(run: Run) -> None:
    """Send the hyper-parameters of module and data module, and the graph, to every logger.

    Raises:
        RuntimeError: Module and data module have different values under one name.
    """
    if not run.loggers or not run.settings.enable_autolog_hparams:
        return
    module, datamodule = run.module, run.datamodule
    merged: dict[str, object] = {}
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


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
