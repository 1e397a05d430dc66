"""Weights in single precision, fast operations in 16 bits, through torch's autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Module
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from levin.precision.precision import Precision
from levin.precision.true import convert_floats
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Closure, StateDict, Tree


class MixedPrecision(Precision):
    """Automatic mixed precision: ``"16-mixed"`` with a loss scale, ``"bf16-mixed"`` without.

    Args:
        precision: ``"16-mixed"`` or ``"bf16-mixed"``.
        device: Type of the device, for example ``"cuda"`` or ``"cpu"``.
        scaler: The loss scale; by default a new ``torch.amp.GradScaler`` for ``"16-mixed"`` and none otherwise.

    Raises:
        ValueError: Another ``precision``, or a scaler together with ``"bf16-mixed"``.

    Example:
        >>> with MixedPrecision("bf16-mixed", "cpu").forward_context():
        ...     torch.nn.Linear(2, 2)(torch.zeros(1, 2)).dtype
        torch.bfloat16
    """

    def __init__(self, precision: str, device: str, scaler: GradScaler | None = None) -> None:
        if precision not in ("16-mixed", "bf16-mixed"):
            raise MisconfigurationException(
                f"precision must be '16-mixed' or 'bf16-mixed' for MixedPrecision, received {precision!r}. "
                "Use HalfPrecision for '16-true' and 'bf16-true'."
            )
        if scaler is not None and precision == "bf16-mixed":
            raise MisconfigurationException(
                f"precision='bf16-mixed' takes no scaler, received {scaler!r}. bfloat16 has the range of float32 and "
                "needs no loss scale: leave it out."
            )
        self.precision = precision
        self.device = device
        self.scaler = GradScaler(device=device) if scaler is None and precision == "16-mixed" else scaler
        self.dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float16

    def forward_context(self) -> AbstractContextManager[object]:
        """Return torch's autocast for this device and type."""
        return self.autocast_context_manager()

    def autocast_context_manager(self) -> torch.autocast:
        """Return torch's autocast for this device and type."""
        # Copies of the weights would be kept to the end of the forward pass, for the rare weight that is used twice.
        return torch.autocast(self.device, dtype=self.dtype, cache_enabled=False)

    def convert_output(self, data: object) -> Tree:
        """Return the output with its floating tensors in torch's default type."""
        return convert_floats(data, torch.get_default_dtype())

    def pre_backward(self, tensor: Tensor, module: Module | None) -> Tensor:
        """Return the loss multiplied by the loss scale."""
        return tensor if self.scaler is None else self.scaler.scale(tensor)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: Module | None = None,
        closure: Closure | None = None,
        **kwargs: object,
    ) -> Any:
        """Step the optimizer unless the scaled gradients overflowed; see :meth:`Precision.optimizer_step`.

        Raises:
            ValueError: The optimizer is LBFGS, which calls the closure many times in a step.
        """
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        if isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                f"precision={self.precision!r} cannot be used with LBFGS: it evaluates the loss many times in a step, "
                "and the loss scale is fixed for a step. Use precision='bf16-mixed' or '32-true'."
            )
        # The closure runs first: the scaler must see the gradients before the optimizer does.
        before_step = self.before_step
        result = closure() if closure is not None else None
        if closure is not None and result is None:
            if before_step is not None:
                before_step(optimizer)
            return None
        if before_step is not None:
            self.unscale_gradients(optimizer)
            before_step(optimizer)
        returned = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        return returned if closure is None else result

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the loss scale, unless the optimizer does so itself."""
        if self.scaler is not None and not handles_unscaling(optimizer):
            self.scaler.unscale_(optimizer)

    @override
    def check_unscaled(self, optimizer: Optimizer) -> None:
        if self.scaler is not None and handles_unscaling(optimizer):
            raise RuntimeError(
                f"Clipping cannot be used with the fused optimizer {type(optimizer).__name__} and "
                f"precision={self.precision!r}: it unscales the gradients inside its own step. Pass fused=False to the "
                "optimizer, or use precision='bf16-mixed'."
            )

    def state_dict(self) -> StateDict:
        """Return the state of the loss scale."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore the state of the loss scale."""
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)


class ForwardMixedPrecision(MixedPrecision):
    """Mixed precision around single forward passes, where it is that of Fabric's modules, and not around a whole step.

    Floating inputs come in 16 bits, and the 16-bit copy of a weight serves the whole pass, however often it is used.

    Example:
        >>> ForwardMixedPrecision("bf16-mixed", "cpu").convert_input(torch.zeros(1)).dtype
        torch.bfloat16
    """

    def convert_input(self, data: object) -> Tree:
        """Return the inputs with their floating tensors in the 16-bit type."""
        return convert_floats(data, self.dtype)

    @override
    def autocast_context_manager(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=self.dtype)


def handles_unscaling(optimizer: Optimizer) -> bool:
    """Return whether the optimizer divides by the loss scale inside its step, as torch's fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
