"""Memory that is full: how errors say so, and how to give back what is held without use."""

from __future__ import annotations

import gc

import torch

_FULL = ("CUDA out of memory", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")


def is_oom_error(exception: BaseException) -> bool:
    """Return whether the exception says that the memory of a device or of the machine is full."""
    if isinstance(exception, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    is_of_torch = isinstance(exception, RuntimeError) and len(exception.args) == 1
    return is_of_torch and any(part in str(exception) for part in _FULL)


def free_memory() -> None:
    """Give back what Python and torch hold of the memory of a GPU without using it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
