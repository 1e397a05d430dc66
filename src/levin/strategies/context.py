"""A sequence over several processes: in the blocks of a module each has a part of it, and attention a part of the heads.

Outside of the blocks every process has the whole sequence and computes the same, so positions, masks and the loss are those
of one device. In a block it has a part; where the block calls ``scaled_dot_product_attention``, parts of the sequence with
all heads become the whole sequence with a part of the heads, and back again. All else that a block does must treat each
place of the sequence by itself, which is tried out once for each class of blocks.

Source: https://arxiv.org/abs/2309.14509 (DeepSpeed-Ulysses)

Gradients are averaged over these processes, as over those with other data: what flows into a block is multiplied by their
number, and what flows out of it divided, so that the average of the parts is their sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module, functional

from levin.utilities.collections import apply_to_collection
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.modes import eval_mode
from levin.utilities.types import Function, Group

# Of (batch, sequence, features), and of (batch, heads, sequence, features) in attention.
SEQUENCE, HEADS, PLACES = 1, 1, 2


class _Exchange(torch.autograd.Function):
    """Every process gets its part along one dimension, and puts what it gets together along another."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, cut: int, joined: int, group: Group) -> Tensor:
        ctx.cut, ctx.joined, ctx.group = cut, joined, group
        return _exchange(tensor, cut, joined, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _exchange(grads[0], ctx.joined, ctx.cut, ctx.group), None, None, None


def _exchange(tensor: Tensor, cut: int, joined: int, group: Group) -> Tensor:
    parts = torch.stack(tensor.chunk(dist.get_world_size(group), cut))
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return torch.cat(received.unbind(), joined)


class _Part(torch.autograd.Function):
    """The part of a dimension that belongs to this process."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _part(whole, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _whole(grads[0], ctx.dim, ctx.group) / dist.get_world_size(ctx.group), None, None


class _Whole(torch.autograd.Function):
    """The sequence out of the parts of all processes."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _whole(part, SEQUENCE, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _part(grads[0], SEQUENCE, ctx.group) * dist.get_world_size(ctx.group), None


def _part(whole: Tensor, dim: int, group: Group) -> Tensor:
    part = whole.chunk(dist.get_world_size(group), dim)[dist.get_rank(group)]
    # A copy, so that what is kept for backward does not hold the whole.
    return part.clone(memory_format=torch.contiguous_format)


def _whole(part: Tensor, dim: int, group: Group) -> Tensor:
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part, group=group)
    return torch.cat(parts, dim)


_exchanged: Function = _Exchange.apply
_taken: Function = _Part.apply
_joined: Function = _Whole.apply


def share_sequences(blocks: list[Module], group: Group, is_tried: bool = False) -> None:
    """Let blocks run on a part of the sequence in each process, in place.

    Args:
        blocks: Each takes a tensor of ``(batch, sequence, features)`` first, and returns one. Of further inputs they get their
            part where these have a value for each place; see :func:`place_of_sequence`.
        group: The processes that share sequences.
        is_tried: Whether the blocks are known to give the same for parts of a sequence, and are not tried out.
    """
    tried: set[type] = {type(block) for block in blocks} if is_tried else set()
    for block in blocks:
        vars(block)["forward"] = _shared(block, group, tried)


def _shared(block: Module, group: Group, tried: set[type]) -> Function:
    inner = block.forward
    kind = type(block)

    def forward(whole: Any, *args: Any, **kwargs: Any) -> Any:
        size = dist.get_world_size(group)
        if not isinstance(whole, Tensor) or whole.dim() < 3 or whole.shape[SEQUENCE] % size:
            shown = tuple(whole.shape) if isinstance(whole, Tensor) else type(whole).__name__
            raise MisconfigurationException(
                f"{kind.__name__} must take (batch, sequence, features) whose sequence {size} processes can share evenly, received "
                f"{shown}. Pad sequences to a multiple of {size}, or choose another context_parallel_size."
            )
        if kind not in tried:
            _try_out(kind, inner, group, block, whole, args, kwargs)
            tried.add(kind)
        return _run(kind, inner, group, whole, args, kwargs)

    return forward


def _run(kind: type, inner: Function, group: Group, whole: Tensor, args: Any, kwargs: Any) -> Any:
    def own(tensor: Tensor) -> Tensor:
        dim = place_of_sequence(tensor, whole.shape[SEQUENCE])
        return tensor if dim is None else _taken(tensor, dim, group)

    args, kwargs = apply_to_collection((args, kwargs), Tensor, own)
    with _shared_attention(group):
        output = inner(_taken(whole, SEQUENCE, group), *args, **kwargs)
    is_tuple = isinstance(output, tuple) and len(output) == 1
    part = output[0] if is_tuple else output
    if not isinstance(part, Tensor):
        raise MisconfigurationException(
            f"{kind.__name__} must return (batch, sequence, features) to share its sequence, received {type(output).__name__}."
        )
    result = _joined(part, group)
    return (result,) if is_tuple else result


def place_of_sequence(tensor: Tensor, length: int) -> int | None:
    """Return the dimension in which a further input of a block has a value for each place; None for a mask, or no such.

    Example:
        >>> cosines, mask, lengths = torch.ones(2, 6, 4), torch.ones(2, 1, 6, 6), torch.ones(2)
        >>> [place_of_sequence(tensor, 6) for tensor in (cosines, cosines[0], mask, lengths)]
        [1, 0, None, None]
    """
    if tensor.dim() < 2 or tensor.shape[-2:] == (length, length):
        return None
    dim = 0 if tensor.dim() == 2 else SEQUENCE
    return dim if tensor.shape[dim] == length else None


def _try_out(kind: type, inner: Function, group: Group, block: Module, whole: Tensor, args: Any, kwargs: Any) -> None:
    """Compare what a block gives with the sequence in parts with what it gives for the whole."""
    with torch.no_grad(), eval_mode(block):
        expected = inner(whole, *args, **kwargs)
        try:
            found = _run(kind, inner, group, whole, args, kwargs)
        except (RuntimeError, AssertionError) as error:
            raise MisconfigurationException(
                f"{kind.__name__} cannot run on parts of a sequence: {str(error).rstrip('.')}. Only the mask that is passed to "
                "torch.nn.functional.scaled_dot_product_attention is for the whole sequence: call it in the place of "
                "torch.nn.MultiheadAttention with a mask, or use context_parallel_size=1."
            ) from error
    expected, found = (value[0] if isinstance(value, tuple) else value for value in (expected, found))
    is_cast = torch.is_autocast_enabled(whole.device.type)
    dtype = torch.get_autocast_dtype(whole.device.type) if is_cast else found.dtype
    is_same = expected.shape == found.shape
    if not is_same or not (expected - found).abs().max() <= torch.finfo(dtype).eps ** 0.7 * expected.abs().max():
        raise MisconfigurationException(
            f"{kind.__name__} gives other results for parts of a sequence than for the whole: besides torch.nn.functional.scaled_dot_product_attention, "
            "called by this name, something in it depends on the place in the sequence, or on other places. Compute rotations by position outside of the blocks, or "
            "use context_parallel_size=1."
        )


@contextmanager
def _shared_attention(group: Group) -> Iterator[None]:
    """Stand in for torch's attention, which blocks and torch's own layers find by its name."""
    attention: Function = functional.scaled_dot_product_attention
    size = dist.get_world_size(group)

    def shared(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        for tensor in (query, key, value):
            if tensor.dim() != 4 or tensor.shape[HEADS] % size:
                raise MisconfigurationException(
                    f"Attention over a sequence on {size} processes takes (batch, heads, sequence, features) with heads that they "
                    f"can share evenly, received {tuple(tensor.shape)}. Choose a context_parallel_size that divides the heads."
                )
        if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[HEADS] > 1:
            attn_mask = attn_mask.chunk(size, HEADS)[dist.get_rank(group)]
        query, key, value = (_exchanged(tensor, HEADS, PLACES, group) for tensor in (query, key, value))
        output: Tensor = _exchanged(attention(query, key, value, attn_mask, *args, **kwargs), PLACES, HEADS, group)
        return output

    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    vars(functional)["scaled_dot_product_attention"] = shared
    try:
        yield
    finally:
        vars(functional)["scaled_dot_product_attention"] = attention
        torch.backends.mha.set_fastpath_enabled(is_fused)
