"""Single precision, and the points at which the other precisions differ from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from levin.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from torch.amp import GradScaler

PrecisionName = Literal["32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"]


class Precision:
    """Everything in single precision (``"32-true"``); subclasses change what they need.

    Example:
        >>> Precision().precision
        '32-true'
    """

    precision: str = "32-true"
    scaler: GradScaler | None = None

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its parameters in the type of this precision."""
        return module

    def convert_input(self, data: Any) -> Any:
        """Return a batch with its floating tensors in the type that the module takes."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Return what the module gave with its floating tensors in torch's default type."""
        return data

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new floating tensors have the type of this precision."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Return a context in which new modules have the type of this precision."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return a context for the forward pass."""
        return nullcontext()

    def pre_backward(self, tensor: Tensor, module: Module | None) -> Tensor:
        """Return the loss as it goes into the backward pass."""
        return tensor

    def backward(self, tensor: Tensor, model: Module | None = None, *args: Any, **kwargs: Any) -> None:
        """Run the backward pass.

        Args:
            tensor: The loss, a scalar.
            model: The module, for precisions that need it.
            args: Passed to ``tensor.backward``.
            kwargs: Passed to ``tensor.backward``.
        """
        tensor.backward(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch has no type for it

    def post_backward(self, tensor: Tensor, module: Module | None) -> Tensor:
        """Return the loss as it comes out of the backward pass."""
        return tensor

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: Module | None = None,
        closure: Callable[[], Any] | None = None,
        before_step: Callable[[Optimizer], None] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step the optimizer.

        Args:
            optimizer: The optimizer.
            model: The module, for precisions that need it.
            closure: Runs forward, zero_grad and backward and returns the loss, or None when there is nothing to step for.
            before_step: Runs between the closure and the step, on unscaled gradients (clipping, hooks).
            kwargs: Passed to ``optimizer.step``.

        Returns:
            What ``optimizer.step`` returns: the loss of the closure.
        """
        if closure is None:
            if before_step is not None:
                before_step(optimizer)
            return optimizer.step(**kwargs)  # type: ignore[call-overload]  # optimizers may take more than a closure
        if before_step is None:
            return optimizer.step(closure=closure, **kwargs)

        def whole() -> Any:
            loss = closure()
            before_step(optimizer)
            return loss

        return optimizer.step(closure=whole, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the factor that the loss was multiplied with, once per step."""

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float | None = None, algorithm: str | None = "norm"
    ) -> None:
        """Clip the gradients of the optimizer's parameters in place.

        Args:
            optimizer: Whose parameters.
            clip_val: Largest norm over all parameters, or largest absolute value; nothing happens at None and <= 0.
            algorithm: ``"norm"`` or ``"value"``.

        Raises:
            ValueError: ``algorithm`` is neither.
        """
        if clip_val is None or clip_val <= 0:
            return
        parameters = optimizer_parameters(optimizer)
        if algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, clip_val)
        elif algorithm is None or algorithm == "norm":
            torch.nn.utils.clip_grad_norm_(parameters, clip_val)
        else:
            raise MisconfigurationException(
                f"gradient_clip_algorithm must be 'norm' or 'value', received {algorithm!r}."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what must be saved to go on exactly: empty without a loss scale."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def teardown(self) -> None:
        """Undo what outlives the run."""


def optimizer_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Return all parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the type of new floating tensors while the context is open."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
