"""LightningModules that ``torch.compile`` wrapped, as Lightning hands them around."""

from __future__ import annotations

from typing import Any

from torch._dynamo import OptimizedModule

from levin.module import LightningModule

_COMPILED = ("forward", "training_step", "validation_step", "test_step", "predict_step")


def from_compiled(model: OptimizedModule) -> LightningModule:
    """Return the LightningModule inside of a compiled one, with its forward and its steps compiled.

    Raises:
        ValueError: ``model`` is no compiled LightningModule.
    """
    if not isinstance(model, OptimizedModule):
        raise ValueError(f"model must be what torch.compile returned, received {type(model).__name__}.")
    original: Any = model._orig_mod
    if not isinstance(original, LightningModule):
        raise ValueError(f"The compiled module must be a LightningModule, received {type(original).__name__}.")
    context = model.dynamo_ctx
    parts = {f"original_{name}": getattr(original, name) for name in _COMPILED}
    original._compiler_ctx = {"compiler": "dynamo", "dynamo_ctx": context, **parts}
    for name in _COMPILED:
        original.__dict__[name] = context(getattr(original, name))
    return original


def to_uncompiled(model: LightningModule | OptimizedModule) -> LightningModule:
    """Return a LightningModule with its forward and its steps as they were written.

    Raises:
        ValueError: ``model`` was not compiled, or is no LightningModule.
    """
    original: Any = model._orig_mod if isinstance(model, OptimizedModule) else model
    if not isinstance(original, LightningModule):
        raise ValueError(f"model must be a LightningModule, received {type(original).__name__}.")
    if original is model and original._compiler_ctx is None:
        raise ValueError(f"model must be a compiled LightningModule, received a plain {type(original).__name__}.")
    for name in _COMPILED:
        original.__dict__.pop(name, None)
    original._compiler_ctx = None
    return original
