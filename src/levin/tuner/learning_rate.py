"""The search for a learning rate: how the loss falls while the rate grows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch.optim import Optimizer
from typing_extensions import override

from levin.hooks import Callback
from levin.loops.run import Run
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.tuner.search import try_run
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.properties import reads
from levin.utilities.types import Batch

SCALES = ("linear", "exponential")
_BETA = 0.98
"""Weight of the past in the average of the loss."""


@dataclass
class LRFinder:
    """What a search for a learning rate found.

    Args:
        mode: How the rates grew: ``"exponential"`` or ``"linear"``.
        lr_min: The first rate.
        lr_max: The last rate.
        num_training: Number of rates that were to be tried.
    """

    mode: str
    lr_min: float
    lr_max: float
    num_training: int
    results: dict[str, list[float]] = field(default_factory=lambda: {"lr": [], "loss": []})

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> Optional[float]:
        """Return the rate at which the loss falls most steeply; None where too few rates were tried.

        Args:
            skip_begin: Rates to leave out at the beginning.
            skip_end: Rates to leave out at the end.
        """
        index = steepest(self.results["lr"], self.results["loss"], skip_begin, skip_end)
        return None if index is None else self.results["lr"][index]

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> object:
        """Draw the loss over the rate; returns matplotlib's figure.

        Args:
            suggest: Whether to mark the suggestion.
            show: Whether to show the figure.
            ax: Axes to draw into; by default new ones.
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots()
        ax.plot(self.results["lr"], self.results["loss"])
        if self.mode == "exponential":
            ax.set_xscale("log")
        ax.set_xlabel("Learning rate")
        ax.set_ylabel("Loss")
        index = steepest(self.results["lr"], self.results["loss"]) if suggest else None
        if index is not None:
            ax.plot(self.results["lr"][index], self.results["loss"][index], "o", color="red", markersize=10)
        if show:
            plt.show()
        return ax.get_figure()


def steepest(lrs: list[float], losses: list[float], skip_begin: int = 10, skip_end: int = 1) -> Optional[int]:
    """Return the index at which ``losses`` fall most steeply over ``lrs``; None where fewer than two are left.

    Values that are not finite are left out.

    Example:
        >>> steepest([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 5.0, 3.0, 1.0, 1.0], skip_begin=0)
        2
    """
    indices = [i for i in range(skip_begin, len(losses) - skip_end) if math.isfinite(losses[i])]
    if len(indices) < 2:
        return None
    places = torch.tensor([lrs[i] for i in indices])
    slopes = torch.gradient(torch.tensor([losses[i] for i in indices]), spacing=(places,))[0]
    return indices[int(slopes.argmin())]


def rate(index: int, lr_min: float, lr_max: float, num_training: int, mode: str) -> float:
    """Return the rate of one step of the search.

    Example:
        >>> rate(0, 1e-4, 1.0, 100, "exponential"), rate(99, 1e-4, 1.0, 100, "exponential")
        (0.0001, 1.0)
    """
    if index == 0:
        return lr_min
    share = (index + 1) / num_training
    if mode == "exponential":
        return float(lr_min * (lr_max / lr_min) ** share)
    return lr_min + share * (lr_max - lr_min)


@dataclass(eq=False)
class Recorder(Callback):
    """Sets the rate of each step and notes the loss, which is that of all ranks, so that they find the same."""

    finder: LRFinder
    optimizer: Optimizer
    every: int
    early_stop_threshold: Optional[float]
    average: float = 0.0
    best: float = math.inf
    num_training = reads("finder.num_training", "Steps of the search.")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        found, steps = self.finder, trainer.global_step
        lr = rate(steps, found.lr_min, found.lr_max, found.num_training, found.mode)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if (batch_idx + 1) % self.every == 0:
            found.results["lr"].append(lr)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.every:
            return
        steps = trainer.global_step
        # Without a loss (a skipped batch) the search goes on.
        loss = float(trainer.strategy.reduce(outputs["loss"], reduce_op="mean")) if outputs else math.nan
        self.average = _BETA * self.average + (1 - _BETA) * loss
        smoothed = self.average / (1 - _BETA ** (steps + 1))
        threshold = self.early_stop_threshold
        if threshold is not None and steps > 1 and smoothed > threshold * self.best:
            trainer.should_stop = True
        if smoothed < self.best:
            self.best = smoothed
        self.finder.results["loss"].append(smoothed)


def lr_find(
    run: Run, min_lr: float, max_lr: float, num_training: int, mode: str, early_stop_threshold: Optional[float]
) -> LRFinder:
    """Train a few steps with growing learning rates and note the loss; module, optimizer and data stay as they are.

    Args:
        run: A run of ``fit`` that is set up.
        min_lr: The first rate.
        max_lr: The last rate.
        num_training: Number of steps.
        mode: ``"exponential"`` or ``"linear"``.
        early_stop_threshold: Stop when the loss is so many times the best one; None for never.

    Raises:
        MisconfigurationException: A module with several optimizers, with none, or without steps.
    """
    if len(run.optimizers) != 1:
        raise MisconfigurationException(
            f"lr_find needs a module with one optimizer, received {len(run.optimizers)}. Set the learning rates yourself."
        )
    finder = LRFinder(mode, min_lr, max_lr, num_training)
    recorder = Recorder(finder, run.optimizers[0], run.settings.accumulate_grad_batches, early_stop_threshold)
    schedulers, run.strategy.lr_scheduler_configs = run.strategy.lr_scheduler_configs, []
    try:
        search = try_run(run, [recorder], max_steps=num_training, limit_val_batches=0)
    finally:
        run.strategy.lr_scheduler_configs = schedulers
    if search.global_step == 0:
        raise MisconfigurationException(
            "lr_find needs a module that trains, received one that made no optimizer step in a whole epoch. Return the loss "
            "from training_step, or step the optimizer there."
        )
    return finder
