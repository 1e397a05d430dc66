"""Activations that are computed again in backward instead of kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn import Module
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from levin.utilities.exceptions import MisconfigurationException

FULL, SELECTIVE, NONE = "full", "selective", "none"
# What takes long to compute and little memory to keep.
_PRODUCTS = (
    "mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)  # fmt: skip


class Recomputation(NamedTuple):
    """What is computed again.

    Args:
        is_chosen: Whether the activations of a submodule are, of which its inputs alone are kept.
        keeps_products: Whether the results of matrix products, convolutions and attention are kept as well.
    """

    is_chosen: Callable[[Module], bool]
    keeps_products: bool = False


def checked(value: object) -> object:
    """Return what a user asked for in one form: words and budgets as they are, one class as a list of it.

    Raises:
        MisconfigurationException: It is another word, or no number from 0 to 1. Policies are checked when there is a module.

    Example:
        >>> checked(torch.nn.Linear), checked(1)
        ([<class 'torch.nn.modules.linear.Linear'>], 1.0)
    """
    is_word, is_number = isinstance(value, str), isinstance(value, (int, float))
    if value not in (FULL, SELECTIVE, NONE) if is_word else is_number and not _is_part(value):
        raise MisconfigurationException(
            f"activation_checkpointing must be {NONE!r}, {SELECTIVE!r}, {FULL!r}, a class, a policy, or a number from 0 to 1, how much "
            f"of the activations may be kept, received {value!r}. Use 0.5 for half of the blocks, 'full' to compute all of them "
            "again."
        )
    if is_word:
        return None if value == NONE else value
    if isinstance(value, (int, float)):
        return float(value)
    return [value] if isinstance(value, type) else value


def _is_part(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def recompute(module: Module, recomputation: Recomputation) -> None:
    """Wrap the chosen submodules, in place, in what computes their activations again."""
    wrap: Callable[[Module], Module] = checkpoint_wrapper
    if recomputation.keeps_products:
        found = [getattr(torch.ops.aten, name, None) for name in _PRODUCTS]
        products = [operation.default for operation in found if operation is not None]
        wrap = functools.partial(
            checkpoint_wrapper, context_fn=functools.partial(create_selective_checkpoint_contexts, products)
        )
    apply_activation_checkpointing(module, checkpoint_wrapper_fn=wrap, check_fn=recomputation.is_chosen)
