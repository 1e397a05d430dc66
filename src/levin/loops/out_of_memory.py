"""What to say when the memory of a device is full."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn.parameter import is_lazy

from levin.loops.run import Run
from levin.utilities.collections import leaves
from levin.utilities.memory import is_oom_error


class MemoryUse(NamedTuple):
    """What holds the memory of one device in this process, in bytes."""

    parameters: int
    gradients: int
    optimizer_states: int
    batch: int
    peak: int
    reserved: int


def explain(use: MemoryUse) -> str:
    """Return what holds the memory, and which setting frees how much of it.

    Example:
        >>> print(explain(MemoryUse(2**30, 2**30, 2**31, 2**20, 9 * 2**30, 10 * 2**30)).splitlines()[-1])
        - Trainer(strategy='fsdp', devices=2), of parameters, gradients and states: 2.00 GiB.
    """
    parameters, gradients, states, batch, peak, reserved = map(_gib, use)
    lasting = use.parameters + use.gradients + use.optimizer_states
    activations = max(use.peak - lasting - use.batch, 0)
    measured = (
        f"at its peak it used {peak}, and it has reserved {reserved}" if use.peak else "its peak was not measured"
    )
    of_activations = f", of {_gib(activations)} for activations" if use.peak else ", of what activations hold"
    return "\n".join([
        f"In this process parameters hold {parameters}, gradients {gradients}, optimizer states {states} and the batch {batch}; "
        f"{measured}. What frees memory:",
        f"- Trainer(accumulate_grad_batches='auto'), which splits batches that do not fit{of_activations}: all but one sample's.",
        f"- Trainer(precision='bf16-mixed'){of_activations}: up to half.",
        f"- Trainer(precision='bf16-true'), of parameters, gradients and states: {_gib(lasting / 2)} where they are in float32.",
        f"- Trainer(strategy='fsdp', devices=2), of parameters, gradients and states: {_gib(lasting / 2)}.",
    ])  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def annotate_out_of_memory(run: Run, error: BaseException) -> None:
    """Say in ``error``, if it is that the memory of a device is full, what holds that memory and what helps."""
    if not is_oom_error(error):
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
        _num_bytes(leaves(run.store.batch), device),
        peak,
        reserved,
    )


def _num_bytes(values: Iterable[object], device: torch.device) -> int:
    """Return the size of the tensors among ``values`` that are on ``device``; of spread ones the part that is here."""
    tensors = (value for value in values if isinstance(value, torch.Tensor))
    local = (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors)
    return sum(tensor.nbytes for tensor in local if tensor.device == device)
