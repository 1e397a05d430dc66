"""A module's forward outside the loops: its train and eval modes, its input, its number format."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from levin.utilities.move import move_data_to_device
from levin.utilities.parameters import all_modules


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Give each submodule its own train or eval mode back at the end."""
    modes = [(child, child.training) for child in all_modules(module)]
    try:
        yield
    finally:
        for child, mode in modes:
            _set_mode(child, mode)


def to_eval(module: nn.Module) -> None:
    """Call ``module.eval()``, or do the same in a third of the time where nobody has changed what that does."""
    children = all_modules(module)
    if any(_has_own_way(child) for child in children):
        module.eval()
        return
    for child in children:
        _set_mode(child, False)


def _has_own_way(module: nn.Module) -> bool:
    kind, own = type(module), vars(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval or "train" in own or "eval" in own


def _set_mode(module: nn.Module, mode: bool) -> None:
    # A module takes long to set an attribute.
    own = vars(module)
    if "training" in own:
        own["training"] = mode
    else:
        module.training = mode


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode, and each back into its own mode at the end."""
    with kept_modes(module):
        to_eval(module)
        yield


def transfer_example(model: nn.Module, example: object) -> object:
    """Return an example input the way batches get to the model: through its transfer hooks, to its device."""
    hooks: Any = model
    if hasattr(model, "transfer_batch_to_device"):
        example = hooks.on_before_batch_transfer(example, 0)
        return hooks.on_after_batch_transfer(hooks.transfer_batch_to_device(example, hooks.device, 0), 0)
    parameter = next(model.parameters(), None)
    return example if parameter is None else move_data_to_device(example, parameter.device)


@contextmanager
def forward_of_example(model: nn.Module, example: object) -> Iterator[object]:
    """Prepare a forward pass without gradients, in the number format of the model's trainer if it has one.

    Args:
        model: Any module; that of a trainer need not be a LightningModule.
        example: Inputs; yielded as the model takes them.
    """
    trainer = getattr(model, "_trainer", None)
    precision = None if trainer is None else trainer.precision_plugin
    with torch.no_grad(), nullcontext() if precision is None else precision.forward_context():
        example = transfer_example(model, example)
        yield example if precision is None else precision.convert_input(example)
