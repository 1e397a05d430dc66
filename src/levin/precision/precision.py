"""Single precision, and the points at which the other precisions differ from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from levin.utilities.clipping import clip_by_norm, clip_by_value
from levin.utilities.exceptions import require_choice
from levin.utilities.types import Closure, StateDict, Tree

if TYPE_CHECKING:
    from torch.amp import GradScaler


class Precision:
    """Everything in single precision (``"32-true"``); subclasses change what they need.

    Example:
        >>> Precision().precision
        '32-true'
    """

    precision: str = "32-true"
    scaler: GradScaler | None = None
    before_step: Callable[[Optimizer], None] | None = None
    """Runs between the closure and the update, on unscaled gradients (clipping, hooks); given by the Trainer for a run."""

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its parameters in the type of this precision."""
        return module

    def convert_input(self, data: Tree) -> Tree:
        """Return a batch with its floating tensors in the type that the module takes."""
        return data

    def convert_output(self, data: Tree) -> Tree:
        """Return what the module gave with its floating tensors in torch's default type."""
        return data

    def tensor_init_context(self) -> AbstractContextManager[object]:
        """Return a context in which new floating tensors have the type of this precision."""
        return nullcontext()

    def module_init_context(self) -> AbstractContextManager[object]:
        """Return a context in which new modules have the type of this precision."""
        return nullcontext()

    def forward_context(self) -> AbstractContextManager[object]:
        """Return a context for the forward pass."""
        return nullcontext()

    def train_step_context(self) -> AbstractContextManager[object]:
        """Return a context for ``training_step``."""
        return self.forward_context()

    def val_step_context(self) -> AbstractContextManager[object]:
        """Return a context for ``validation_step``."""
        return self.forward_context()

    def test_step_context(self) -> AbstractContextManager[object]:
        """Return a context for ``test_step``."""
        return self.forward_context()

    def predict_step_context(self) -> AbstractContextManager[object]:
        """Return a context for ``predict_step``."""
        return self.forward_context()

    def pre_backward(self, tensor: Tensor, module: Module | None) -> Tensor:
        """Return the loss as it goes into the backward pass."""
        return tensor

    def backward(
        self, tensor: Tensor, model: Module | None = None, optimizer: Optimizer | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Run the backward pass.

        Args:
            tensor: The loss, a scalar.
            model: The module, for precisions that need it; a LightningModule's own ``backward`` is what runs.
            optimizer: The optimizer that is stepped next, for precisions that need it.
            args: Passed to ``tensor.backward``.
            kwargs: Passed to ``tensor.backward``.
        """
        run = getattr(model, "backward", None)
        # Under Fabric it is the module's own backward that calls this.
        if callable(run) and getattr(model, "_fabric", None) is None:
            run(tensor, *args, **kwargs)
        else:
            tensor.backward(*args, **kwargs)

    def post_backward(self, tensor: Tensor, module: Module | None) -> Tensor:
        """Return the loss as it comes out of the backward pass."""
        return tensor

    def optimizer_step(
        self,
        optimizer: Optimizer,
        model: Module | None = None,
        closure: Closure | None = None,
        **kwargs: Any,
    ) -> Any:
        """Step the optimizer, with :attr:`before_step` between the closure and the update.

        Args:
            optimizer: The optimizer.
            model: The module, for precisions that need it.
            closure: Runs forward, zero_grad and backward and returns the loss, or None when there is nothing to step for.
            kwargs: Passed to ``optimizer.step``.

        Returns:
            What ``optimizer.step`` returns: the loss of the closure.
        """
        before_step = self.before_step
        if closure is None:
            if before_step is not None:
                before_step(optimizer)
            return optimizer.step(**kwargs)
        if before_step is None:
            return optimizer.step(closure=closure, **kwargs)

        def whole() -> Tree:
            loss = closure()
            before_step(optimizer)
            return loss

        return optimizer.step(closure=whole, **kwargs)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the factor that the loss was multiplied with, once per step."""

    def check_unscaled(self, optimizer: Optimizer) -> None:
        """Check that gradients can be seen without a loss scale before the optimizer's step, as clipping has to.

        Raises:
            RuntimeError: The optimizer unscales them itself, inside of its step.
        """

    # Clipping: a strategy does it itself where none of these is overridden.

    @property
    def clips_gradients(self) -> bool:
        """Whether a subclass has a way of its own to clip gradients."""
        names = ("clip_gradients", "clip_grad_by_norm", "clip_grad_by_value")
        return any(getattr(type(self), name) is not getattr(Precision, name) for name in names)

    def main_params(self, optimizer: Optimizer) -> Iterable[Tensor]:
        """Return the parameters whose gradients are clipped: those that the optimizer steps, in the order of groups."""
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float | None = None, gradient_clip_algorithm: str | None = "norm"
    ) -> None:
        """Clip the gradients of the optimizer's parameters in place.

        Args:
            optimizer: Whose parameters.
            clip_val: Largest norm over all parameters, or largest absolute value; nothing happens at None and <= 0.
            gradient_clip_algorithm: ``"norm"`` or ``"value"``.

        Raises:
            ValueError: ``gradient_clip_algorithm`` is neither.
        """
        if clip_val is None or clip_val <= 0:
            return
        self.check_unscaled(optimizer)
        algorithm = "norm" if gradient_clip_algorithm is None else gradient_clip_algorithm
        require_choice("gradient_clip_algorithm", algorithm, ("norm", "value"))
        clip = self.clip_grad_by_value if algorithm == "value" else self.clip_grad_by_norm
        clip(optimizer, clip_val)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip the norm of the gradients over all parameters of the optimizer."""
        clip_by_norm(self.main_params(optimizer), clip_val)

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: float) -> None:
        """Clip each element of the gradients of the optimizer's parameters."""
        clip_by_value(self.main_params(optimizer), clip_val)

    def connect(
        self, model: Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[Module, list[Optimizer], list[Any]]:
        """Return module, optimizers and schedulers of a Trainer as this precision needs them, once they are set up."""
        return model, optimizers, lr_schedulers

    def on_save_checkpoint(self, checkpoint: StateDict) -> None:
        """Add to a checkpoint what :meth:`state_dict` has no place for."""

    def on_load_checkpoint(self, checkpoint: StateDict) -> None:
        """Read what :meth:`on_save_checkpoint` added."""

    def state_dict(self) -> StateDict:
        """Return what must be saved to go on exactly: empty without a loss scale."""
        return {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restore what :meth:`state_dict` returned."""

    def teardown(self) -> None:
        """Undo what outlives the run."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the type of new floating tensors while the context is open."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
