"""LightningModules that ``torch.compile`` wrapped: taken out, with their steps compiled as the user asked."""

from __future__ import annotations

from typing import Any

from torch import nn

from levin.module import LightningModule
from levin.utilities.overrides import has_own

_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def is_compiled(model: object) -> bool:
    """Return whether ``model`` is what ``torch.compile`` makes of a LightningModule."""
    # Asked without torch._dynamo, which takes a second to import where nothing is compiled.
    return isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), LightningModule)


def from_compiled(model: Any) -> LightningModule:
    """Return the LightningModule inside of a compiled one, with its forward and its steps compiled.

    They get what the user gave to ``torch.compile``: backend, mode, ``fullgraph``, ``dynamic``, options.

    Raises:
        ValueError: ``model`` is no compiled LightningModule.
    """
    if not is_compiled(model):
        raise ValueError(
            f"model must be a LightningModule that torch.compile returned, received {type(model).__name__}."
        )
    original: LightningModule = model._orig_mod
    context = model.dynamo_ctx
    to_uncompiled(model)
    written = {name: getattr(original, name) for name in _COMPILED}
    for name, method in written.items():
        if has_own(name, original, LightningModule):
            original.__dict__[name] = context(method)
    parts = {f"original_{name}": method for name, method in written.items()}
    original._compiler_ctx = {"compiler": "dynamo", "dynamo_ctx": context, **parts}
    return original


def to_uncompiled(model: Any) -> LightningModule:
    """Return a LightningModule with its forward and its steps as they were written.

    Raises:
        ValueError: ``model`` was not compiled, or is no LightningModule.
    """
    original = model._orig_mod if is_compiled(model) else model
    if not isinstance(original, LightningModule):
        raise ValueError(f"model must be a LightningModule, received {type(original).__name__}.")
    context = original._compiler_ctx
    if original is model and context is None:
        raise ValueError(f"model must be a compiled LightningModule, received a plain {type(original).__name__}.")
    for name in _COMPILED if context else ():
        # One that was set on the module, not written in its class, is set again.
        method = context[f"original_{name}"]
        original.__dict__.pop(name, None)
        if getattr(original, name) != method:
            original.__dict__[name] = method
    original._compiler_ctx = None
    return original
