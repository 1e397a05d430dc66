"""What stands around code: the number format around a step, no initialization around new modules, an environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.nn import Module
from torch.overrides import TorchFunctionMode

from levin.precision.precision import Precision
from levin.utilities.types import Function, Kwargs

_STEP_CONTEXTS = {
    "training_step": "train_step_context",
    "validation_step": "val_step_context",
    "test_step": "test_step_context",
    "predict_step": "predict_step_context",
}


def in_forward_context(step: Callable[..., object], precision: Precision, name: str) -> Function:
    """Return ``step`` run inside the precision's forward context; ``step`` itself where there is none.

    Args:
        step: A method of the module.
        precision: The number format.
        name: Of the method; precisions may have a context for each step of a Trainer.
    """
    context: Callable[[], AbstractContextManager[object]] = precision.forward_context
    own = _STEP_CONTEXTS.get(name, "forward_context")
    if getattr(type(precision), own) is not getattr(Precision, own):
        context = getattr(precision, own)
    elif type(precision).forward_context is Precision.forward_context:
        return step

    def step_in_context(*args: object, **kwargs: object) -> object:
        with context():
            return step(*args, **kwargs)

    return step_in_context


class SkipInit(TorchFunctionMode):
    """While this mode is on, the functions of ``torch.nn.init`` leave their tensor as it is."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Kwargs | None = None
    ) -> Any:
        """Skip ``torch.nn.init``, run everything else."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        # Some of these functions are not announced themselves, only what they do to the tensor.
        is_in_place = getattr(func, "__name__", "").endswith("_") and not func.__name__.endswith("__")
        if is_in_place and sys._getframe(1).f_globals.get("__name__") == "torch.nn.init":
            return args[0]
        return func(*args, **kwargs)


def run_as_forward(caller: Module, module: Module, step: Callable[..., object]) -> Function:
    """Return a callable that runs ``step`` where ``caller`` runs ``module.forward``, with all that it puts around that.

    For the time of that call the module's ``forward`` is ``step``; inside of the step it is the module's own again.

    Args:
        caller: Calls ``module.forward`` in its own ``forward``, or is the module itself, with hooks of its own.
        module: The user's module.
        step: One of its methods.
    """
    attributes = module.__dict__
    # A forward set on the instance (and not in the class) is put back, too.
    own = attributes.get("forward")

    def restore() -> None:
        if own is None:
            attributes.pop("forward", None)
        else:
            attributes["forward"] = own

    def redirected(*args: object, **kwargs: object) -> object:
        restore()
        return step(*args, **kwargs)

    def run(*args: object, **kwargs: object) -> object:
        attributes["forward"] = redirected
        try:
            return caller(*args, **kwargs)
        finally:
            restore()

    return run


@contextmanager
def environment_variables(**values: str | None) -> Iterator[None]:
    """Set variables of the process environment, except for those that are None, and put back what was there before."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
