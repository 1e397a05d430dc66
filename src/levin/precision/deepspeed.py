"""Number formats under DeepSpeed, whose engine holds the weights that are stepped and the loss scale."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from levin.precision.precision import Precision, default_dtype
from levin.precision.true import TruePrecision, convert_floats
from levin.utilities.exceptions import MisconfigurationException

_DTYPES = {
    "32-true": torch.float32,
    "16-true": torch.float16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "bf16-mixed": torch.bfloat16,
}


class DeepSpeedPrecision(Precision):
    """What :class:`~levin.strategies.DeepSpeedStrategy` computes in.

    In 16 bits DeepSpeed computes with 16-bit copies of weights that it steps in single precision, so that ``"bf16-mixed"``
    and ``"bf16-true"`` differ only in the format in which layers are made.

    Args:
        precision: ``"32-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.

    Raises:
        ValueError: Another value of ``precision``.

    Example:
        >>> DeepSpeedPrecision("bf16-true").convert_input(torch.zeros(1)).dtype
        torch.bfloat16
    """

    def __init__(self, precision: str) -> None:
        if precision not in _DTYPES:
            raise MisconfigurationException(
                f"precision must be one of {', '.join(map(repr, _DTYPES))} with DeepSpeed, received {precision!r}. "
                "Use 'bf16-mixed', or another strategy."
            )
        self.precision = precision
        self.dtype = _DTYPES[precision]
        self.engine: Any = None
        """DeepSpeed's engine, set by the strategy when there is one."""

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its parameters in 16 bits where all of the run is."""
        is_all = self.precision.endswith("-true")
        return TruePrecision(self.precision, self.dtype).convert_module(module) if is_all else module

    def convert_input(self, data: Any) -> Any:
        """Return the batch with its floating tensors in the format of the weights."""
        return convert_floats(data, self.dtype)

    def convert_output(self, data: Any) -> Any:
        """Return the output with its floating tensors in torch's default type."""
        return convert_floats(data, torch.get_default_dtype())

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new floating tensors are in 16 bits where all of the run is."""
        return default_dtype(self.dtype) if self.precision.endswith("-true") else nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new modules are in 16 bits where all of the run is."""
        return self.tensor_init_context()

    def backward(
        self, tensor: Tensor, model: Module | None = None, optimizer: Optimizer | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Run the backward pass through DeepSpeed's engine, which scales the loss and spreads the gradients.

        Raises:
            RuntimeError: The optimizer was not set up, so that there is no engine yet.
        """
        if self.engine is None:
            raise RuntimeError(
                "DeepSpeed runs backward passes for a module and its optimizer, and no optimizer was set up. "
                "Return one from `configure_optimizers`, or call fabric.setup(module, optimizer)."
            )
        if hasattr(self.engine.optimizer, "clear_backward_seen_flag"):
            # The engine counts a backward pass per forward of the module; in manual optimization there may be more.
            self.engine.optimizer.clear_backward_seen_flag()
        self.engine.backward(tensor, *args, **kwargs)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: Module | None = None,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step DeepSpeed's engine, which holds the optimizer; see :meth:`Precision.optimizer_step`."""
        loss = None if closure is None else closure()
        if self.before_step is not None:
            self.before_step(optimizer)
        if closure is None or loss is not None:
            self.engine.step()
        return loss
