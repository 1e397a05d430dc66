"""A run beside a run: what a search tries, with everything put back afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Optional

import torch
from torch import nn

from levin.counters import FitLoop, Loops
from levin.hooks import Callback
from levin.loops.dataloaders import STAGE_OF, show_call
from levin.loops.run import Run
from levin.loops.run_call import compose_run, run_stage
from levin.loops.stage_loaders import Loaders
from levin.utilities.seed import isolate_rng


def try_run(run: Run, callbacks: list[Callback], max_steps: int = -1, **settings: Any) -> Run:
    """Run the loop of ``run``'s method on its module and data, and put everything back.

    Weights, buffers and attributes of the module, states of the optimizers, counters, logged values and random states
    are afterwards what they were. Callbacks and loggers of the run do not see it.

    Args:
        run: A run that is set up: one in which the hooks are called.
        callbacks: What watches the search.
        max_steps: Optimizer steps, where the method is ``fit``; epochs follow each other until they are done, or until
            one makes no step.
        settings: Settings that are others in the search.

    Returns:
        The search, as it ended.
    """
    trainer: Any = run.trainer
    callbacks = [*callbacks, _EndsWithoutSteps()]
    shown = {name: getattr(trainer, name) for name in ("loops", "settings", "callbacks", "loggers")}
    stage, should_stop = run.state.stage, run.told.should_stop
    search = Run(
        run.trainer, replace(run.settings, num_sanity_val_steps=0, **settings), run.engine, run.profiler, callbacks, [],
        Loops(FitLoop(None, -1, None, max_steps)), run.state, run.told, run.module, run.datamodule, _unloaded(run.loaders),
        keeps_predictions=False,
    )  # fmt: skip
    with isolate_rng(), unchanged(run.module), _unchanged_optimizers(run):
        try:
            trainer.run = search
            show_call(search)
            trainer.loops = search.loops
            trainer.settings, trainer.callbacks, trainer.loggers = search.settings, callbacks, []
            compose_run(search)
            run_stage(search, run.fn, None)
        finally:
            trainer.run = run
            for name, value in shown.items():
                setattr(trainer, name, value)
            run.state.stage, run.told.should_stop = stage, should_stop
            run.take_logs()
    return search


class _EndsWithoutSteps(Callback):
    """Ends a search after an epoch without a step: a module may skip all batches, or leave its optimizer alone."""

    _num_steps: int = 0

    def on_train_epoch_end(self, trainer: Any, pl_module: object) -> None:
        if trainer.global_step == self._num_steps:
            trainer.should_stop = True
        self._num_steps = trainer.global_step


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Put the module back at the end of the block: tensors, gradients, attributes and children.

    The copies of tensors lie on the CPU, so that they take no memory of the device that is being filled.
    """
    children = list(module.modules())
    attributes = [dict(vars(child)) for child in children]
    containers = [
        (value, copy.copy(value))
        for values in attributes
        for value in values.values()
        if isinstance(value, (dict, list, set))
    ]
    tensors = [*module.parameters(), *module.buffers()]
    grads = [tensor.grad for tensor in tensors]
    kept = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    try:
        yield
    finally:
        for child, values in zip(children, attributes):
            vars(child).clear()
            vars(child).update(values)
        for container, contents in containers:  # the same objects, because others may hold them
            container.clear()
            container.extend(contents) if isinstance(container, list) else container.update(contents)
        with torch.no_grad():
            for tensor, value, grad in zip(tensors, kept, grads):
                tensor.copy_(value)
                tensor.grad = grad


@contextmanager
def _unchanged_optimizers(run: Run) -> Iterator[None]:
    scaler = run.strategy.precision.scaler
    kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers]
    schedulers = [copy.deepcopy(config.scheduler.state_dict()) for config in run.schedulers]
    scale = None if scaler is None else scaler.state_dict()
    try:
        yield
    finally:
        for optimizer, state in zip(run.optimizers, kept):
            optimizer.load_state_dict(state)
        for config, state in zip(run.schedulers, schedulers):
            config.scheduler.load_state_dict(state)
        if scaler is not None and scale is not None:
            scaler.load_state_dict(scale)


def _unloaded(loaders: Loaders) -> Loaders:
    """Return loaders from the same place, which are asked for anew."""
    fresh = Loaders()
    for stage in STAGE_OF.values():
        ours, theirs = getattr(fresh, stage), getattr(loaders, stage)
        ours.given, ours.owner = theirs.given, theirs.owner
    return fresh


def holders(name: str, module: object, datamodule: Optional[object]) -> list[object]:
    """Return the objects that have ``name``: module, data module, and the hyper-parameters of either.

    Example:
        >>> holders("real", 3, None)
        [3]
    """
    found = []
    for owner in (module, datamodule):
        hparams = getattr(owner, "hparams", None)
        found += [each for each in (owner, hparams) if each is not None and hasattr(each, name)]
    return found
