"""A run with a profiler: what is composed in place of the plain parts, so that every action is measured.

Hooks that do nothing are measured too, so that a report has the same lines whatever is overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from levin.hooks import DataHooks
from levin.loops.run import Run
from levin.loops.step import AutomaticStep, Step
from levin.module import LightningModule
from levin.utilities.overrides import is_overridden
from levin.utilities.timing import action_name

if TYPE_CHECKING:
    from levin.profilers.profiler import Profiler
    from levin.trainer import Trainer

Timed = Callable[[str, Callable[..., Any]], Callable[..., Any]]

NEXT = {
    "train": "[_TrainingEpochLoop].train_dataloader_next",
    "val": "[_EvaluationLoop].val_next",
    "test": "[_EvaluationLoop].test_next",
    "predict": "[_PredictionLoop].predict_next",
}
"""Stage -> name of the wait for the next batch; these are the names that reports have always had."""


def is_profiling(trainer: Trainer) -> bool:
    """Whether anything is measured at all."""
    return type(trainer.profiler).__name__ != "PassThroughProfiler"


def timer(profiler: Profiler) -> Timed:
    """Return ``timed(action_name, function)``, which wraps a function so that ``profiler`` measures it."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profiler.profile(name):
                return function(*args, **kwargs)

        return timed

    return wrap


def untimed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function``: what a run without a profiler has in place of :func:`timer`."""
    return function


class ProfiledRun(Run):
    """A run that measures the module's own functions."""

    is_profiled = True

    def call_own(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call one function of the module as the hook ``name``."""
        if name != "backward":  # measured as that of the strategy
            function = self.timed(action_name("LightningModule", self.module, name), function)
        return super().call_own(name, function, *args, **kwargs)


def timed_transfer(timed: Timed, owners: Iterable[Any], strategy: Any) -> Callable[[Any, torch.device, int], Any]:
    """Return the chain of all three batch-transfer hooks, each measured.

    Args:
        timed: As :func:`timer` returns it.
        owners: Who may override them, the module last.
        strategy: Named in the report.
    """
    owners = list(owners)

    def hook(name: str) -> Callable[..., Any]:
        overriding = [owner for owner in owners if is_overridden(name, owner, DataHooks)]
        owner = (overriding or owners[-1:])[0]
        return timed(action_name(kind_of(owner), owner, name), getattr(owner, name))

    before, transfer, after = map(
        hook, ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )

    def to_device(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return after(transfer(batch, device, dataloader_idx), dataloader_idx)

    to_device = timed(action_name("Strategy", strategy, "batch_to_device"), to_device)

    def chain(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return to_device(before(batch, dataloader_idx), device, dataloader_idx)

    return chain


def time_step(run: Run, step: Step) -> None:
    """Let an optimization step call the module's functions where it would take a shorter way, and measure them."""
    module = run.module
    if isinstance(step, AutomaticStep):
        step.is_plain, step.own_optimizer_step = False, module.optimizer_step
        step.own_zero_grad = module.optimizer_zero_grad
        step._needs_before_step, step.own_clipping = True, module.configure_gradient_clipping
        return
    for optimizer in run.trainer._lightning_optimizers:
        optimizer._on_step = run.timed("optimizer_step", optimizer._on_step)


def kind_of(owner: Any) -> str:
    """Return what ``owner``, a module or data module, is called in reports."""
    return "LightningModule" if isinstance(owner, LightningModule) else "LightningDataModule"
