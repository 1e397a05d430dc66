"""DeepSpeed's parts of a module and its optimizer: filled with whole weights, emptied of what is held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module

from levin.utilities.types import StateDict

# Of the counter of stages 1 and 2: what the next backward pass finds in their buffers is overwritten.
_NOTHING_HELD = -1


def forgetting(zero: Any) -> Callable[..., None]:
    """Return a ``zero_grad`` with which DeepSpeed forgets what it has accumulated since the last step.

    That of the optimizer itself would take away the buffers that DeepSpeed puts there.

    Args:
        zero: DeepSpeed's optimizer.
    """

    def forget(set_to_none: bool = True) -> None:
        zero.zero_grad(set_to_none)
        if getattr(zero, "all_grad_tensors", None) is not None and zero.micro_step_id != _NOTHING_HELD:
            zero.micro_step_id = _NOTHING_HELD
            zero.all_grad_tensors, zero.averaged_gradients = {}, {}

    return forget


def load_into_parts(module: Module, state: StateDict, strict: bool) -> None:
    """Load whole weights into a module whose parameters are cut, one layer after the other. All processes call this.

    Args:
        module: With parameters that DeepSpeed has cut.
        state: The weights.
        strict: Whether the names must be the same.

    Raises:
        RuntimeError: A name is missing or too many, and ``strict`` is set; or a shape is another one.
    """
    import deepspeed

    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    for prefix, part in module.named_modules():
        place = f"{prefix}." if prefix else ""
        with deepspeed.zero.GatheredParameters(list(part.parameters(recurse=False)), modifier_rank=0):
            part._load_from_state_dict(state, place, {}, False, missing, unexpected, errors)
    unexpected = sorted(set(state) - {name for name, _ in _named_tensors(module)})
    if errors or (strict and (missing or unexpected)):
        raise RuntimeError(
            f"The weights do not fit {type(module).__name__}: missing {missing}, unexpected {unexpected}. {' '.join(errors)}"
        )


def _named_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)
