"""What to say when the memory of a device is full."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from levin.loops.run import Run
from levin.utilities.collections import leaves


class MemoryUse(NamedTuple):
    """What holds the memory of one device in this process, in bytes."""

    parameters: int
    gradients: int
    optimizer_states: int
    peak: int
    reserved: int


def explain(use: MemoryUse) -> str:
    """Return what holds the memory, and the settings that need less of it.

    Example:
        >>> print(explain(MemoryUse(2**30, 2**30, 2**31, 9 * 2**30, 10 * 2**30)).partition(";")[0])
        In this process parameters hold 1.00 GiB, gradients 1.00 GiB and optimizer states 2.00 GiB
    """
    parameters, gradients, states, peak, reserved = (f"{size / 2**30:.2f} GiB" for size in use)
    return (
        f"In this process parameters hold {parameters}, gradients {gradients} and optimizer states {states}; "
        f"at its peak it used {peak}, and it has reserved {reserved}. "
        "Use smaller batches, with Trainer(accumulate_grad_batches=...) for gradients over as many samples as before, or "
        "Trainer(precision='bf16-mixed')."
    )


def annotate_out_of_memory(run: Run, error: BaseException) -> None:
    """Say in ``error``, if it is that the memory of a device is full, what holds that memory and what helps."""
    if not isinstance(error, torch.OutOfMemoryError):
        return
    message = error.args[0] if error.args else ""
    error.args = (f"{message}\n{explain(_memory_use(run))}", *error.args[1:])


def _memory_use(run: Run) -> MemoryUse:
    device = run.strategy.root_device
    parameters = [parameter for parameter in run.module.parameters() if not is_lazy(parameter)]
    peak = reserved = 0
    if device.type == "cuda":
        peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device)
    return MemoryUse(
        _num_bytes(parameters, device),
        _num_bytes((parameter.grad for parameter in parameters), device),
        _num_bytes(leaves([dict(optimizer.state) for optimizer in run.strategy.optimizers]), device),
        peak,
        reserved,
    )


def _num_bytes(values: Iterable[object], device: torch.device) -> int:
    """Return the size of the tensors among ``values`` that are on ``device``; of spread ones the part that is here."""
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local if tensor.device == device)
