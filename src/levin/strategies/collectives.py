"""What processes say to each other, as functions over torch.distributed."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from levin.strategies.control_group import ControlGroup
from levin.utilities.collections import apply_to_collection, named_leaves
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.parameters import full, is_in_parts
from levin.utilities.types import Group, Tree
from levin.utilities.user_frames import ranks_by_value, show_by_rank

T = TypeVar("T")
_NUMBERS = (Tensor, bool, int, float)
_MEAN_NAMES = ("mean", "avg")
# How many tensors that were moved for it are on the way at once.
_NUM_ON_THE_WAY = 8
_OP_NAMES = ("sum", "min", "max", "product", "band", "bor", "bxor")


def reduce(
    data: Tree,
    group: Group = None,
    reduce_op: object = "mean",
    device: torch.device | None = None,
    is_checked: bool = False,
    control: ControlGroup | None = None,
) -> Tree:
    """Return ``data`` reduced over the processes of ``group``; the input is left as it is.

    Args:
        data: A tensor of the same shape in every process, a number, or a collection of these. A DTensor is the same whole
            tensor in every process.
        group: The processes that take part; all when None.
        reduce_op: ``"mean"``, ``"avg"``, ``"sum"``, ``"min"``, ``"max"``, ``"product"``, ``"band"``, ``"bor"``,
            ``"bxor"``, or a ``torch.distributed.ReduceOp``. None means ``"sum"``.
        device: Where numbers become tensors and tensors are moved to; None leaves them where they are.
        is_checked: Whether the processes compare what they give before, but for single numbers.
        control: See :func:`check_same_shapes`.

    Returns:
        A tensor (or the collection of tensors) without gradient. The mean of integers is a floating tensor.

    Raises:
        ValueError: ``reduce_op`` is unknown, or the processes have different ones, or different shapes or types.
    """
    is_mean, op = parse_reduce_op(reduce_op)

    def as_reduced(leaf: Tree) -> Tensor:
        tensor = full(_as_tensor(leaf, device).detach())
        if is_mean and not (torch.is_floating_point(tensor) or torch.is_complex(tensor)):
            tensor = tensor.to(torch.get_default_dtype())
        elif tensor.dtype == torch.bool:
            tensor = tensor.to(torch.int64)
        # A collective writes into its argument.
        return tensor.clone(memory_format=torch.contiguous_format)

    def reduce_one(result: Tensor) -> Tensor:
        dist.all_reduce(result, op=op, group=group)
        if is_mean:
            # Gloo has no mean of its own.
            result /= dist.get_world_size(group)
        return result

    copied = apply_to_collection(data, _NUMBERS, as_reduced)
    if is_checked and not (isinstance(copied, Tensor) and copied.numel() == 1):
        check_same_shapes(copied, group, "a reduction", f"by {'mean' if is_mean else _name_of(op)}", control)
    return apply_to_collection(copied, Tensor, reduce_one)


def parse_reduce_op(reduce_op: object) -> tuple[bool, Any]:
    """Return whether the operation is a mean, and torch's operation to run.

    Raises:
        ValueError: The operation is unknown.

    Example:
        >>> is_mean, op = parse_reduce_op("mean")
        >>> is_mean, op == dist.ReduceOp.SUM
        (True, True)
    """
    if reduce_op is None:
        return False, dist.ReduceOp.SUM
    if isinstance(reduce_op, str):
        name = reduce_op.lower()
        if name in _MEAN_NAMES:
            return True, dist.ReduceOp.SUM
        if name in _OP_NAMES:
            return False, getattr(dist.ReduceOp, name.upper())
    elif reduce_op == dist.ReduceOp.AVG:
        return True, dist.ReduceOp.SUM
    elif isinstance(reduce_op, (dist.ReduceOp, type(dist.ReduceOp.SUM))):
        return False, reduce_op
    names = ", ".join((*_MEAN_NAMES, *_OP_NAMES))
    raise MisconfigurationException(
        f"reduce_op must be a torch.distributed.ReduceOp or one of {names}, received {reduce_op!r}. "
        "Use 'mean' to average over processes."
    )


def _name_of(op: Any) -> str:
    kind = getattr(op, "op", op)
    return str(getattr(kind, "name", type(kind).__name__)).lower()


def all_gather(
    data: object,
    group: Group = None,
    sync_grads: bool = False,
    device: torch.device | None = None,
    is_alone: bool = False,
) -> Tree:
    """Return the tensors of all processes of ``group``, stacked along a new first dimension.

    Args:
        data: A tensor of the same shape in every process, a number, or a collection of these. A DTensor is the same whole
            tensor in every process.
        group: The processes that take part; all when None.
        sync_grads: Whether gradients flow back to the process that a part came from.
        device: Where numbers become tensors and tensors are moved to; None leaves them where they are.
        is_alone: Whether this process has given up the others; its tensors are the only ones then.
    """

    def gather_one(leaf: object) -> Tensor:
        tensor = _as_tensor(leaf, device)
        if is_alone:
            return tensor[None] if sync_grads else tensor.detach()[None]
        tensor = full(tensor)
        if sync_grads:
            gathered: Tensor = _AllGather.apply(tensor, group)  # type: ignore[no-untyped-call]  # torch has no type for it
            return gathered
        return _gather(tensor.detach(), group)

    return apply_to_collection(data, _NUMBERS, gather_one)


def check_same_shapes(
    data: Tree, group: Group = None, taker: str = "all_gather", how: str = "", control: ControlGroup | None = None
) -> None:
    """Check that the tensors of all processes have the same names, shapes and types, and that all do the same with them.

    Transports crash, hang or mix them up otherwise.

    Args:
        data: A tensor, a number, or a collection of these, as :func:`all_gather` takes it.
        group: The processes that take part; all when None.
        taker: What takes them, for the error.
        how: What it does with them.
        control: Of the processes of ``group``: then a number is compared before, and a process that does something else is
            told.

    Raises:
        ValueError: They differ, in all processes.
    """
    takes = [
        f"{name}: {describe(leaf)}" if name else describe(leaf)
        for name, leaf in named_leaves(data)
        if isinstance(leaf, _NUMBERS)
    ]
    own = (f"{taker} {how}".rstrip(), takes)
    everyone: list[tuple[str, list[str]]]
    if control is None:
        everyone = [own] * dist.get_world_size(group)
        dist.all_gather_object(everyone, own, group=group)
    elif len(set(map(tuple, control.exchange([zlib.crc32(repr(own).encode())], "tensors of all ranks")))) > 1:
        everyone = control.exchange_objects(own, "tensors of all ranks")
    else:
        return
    takers = ranks_by_value([each for each, _ in everyone])
    if len(takers) > 1:
        raise ValueError(f"All ranks must do the same with their tensors, received {show_by_rank(takers)}.")
    if any(described != takes for _, described in everyone):
        shown = "; ".join(
            f"rank {rank}: {', '.join(described) or 'none'}" for rank, (_, described) in enumerate(everyone)
        )
        raise ValueError(
            f"{taker} takes tensors of one shape and type on all ranks, received {shown}. Pad them to a common size, name and "
            "order them alike, or use torch.distributed.all_gather_object."
        )


def describe(leaf: object) -> str:
    """Return what a leaf of a collection is, in words.

    Example:
        >>> describe(torch.ones(2)), describe(1)
        ('float32 of shape (2,)', 'int')
    """
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)}"
    return type(leaf).__name__


def broadcast_object(obj: T, src: int = 0, device: torch.device | None = None) -> T:
    """Return the object of global rank ``src`` in every process.

    Args:
        obj: Anything that pickle can carry; only that of ``src`` matters.
        src: The rank it comes from.
        device: The device that the bytes travel over; that of the process group's choice when None.

    Raises:
        ValueError: It is a DTensor of which each process has a part.
    """
    if isinstance(obj, Tensor) and is_in_parts(obj):
        raise ValueError(
            "broadcast received a DTensor, of which each process has a part of its own. Call its full_tensor() on all of them."
        )
    holder: list[Any] = [obj]
    dist.broadcast_object_list(holder, src=src, device=device)
    result: T = holder[0]
    return result


def agree(decision: bool, all_must: bool, device: torch.device | None = None) -> bool:
    """Return whether all processes (or any of them) say yes, the same answer everywhere.

    Args:
        decision: What this process says.
        all_must: Whether all have to say yes; otherwise one is enough.
        device: The device of the process group.
    """
    vote = torch.tensor(int(decision), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MIN if all_must else dist.ReduceOp.MAX)
    return bool(vote.item())


def num_collectives(group: Group = None) -> int:
    """Return how many collectives this process has taken part in over a group; over that of all processes when None."""
    asked: Any = dist.group.WORLD if group is None else group
    count: int = asked._get_sequence_number_for_group()
    return count


def sync_tensors(
    tensors: Iterable[Tensor], src: int = 0, device: torch.device | None = None, group: Group = None
) -> None:
    """Overwrite the tensors of every process by those of one.

    Args:
        tensors: The same number of tensors, of the same shapes, in every process.
        src: The rank they come from, in ``group``.
        device: The device that the bytes travel over, a few tensors at a time; where they are when None.
        group: The processes that take part; all when None.
    """
    # Started together, so that the time on the way is paid once and not for each.
    pending: deque[tuple[Any, Tensor, Tensor]] = deque()
    for tensor in tensors:
        plain = tensor.detach()
        sent = plain.to(device or plain.device).contiguous()
        pending.append((dist.broadcast(sent, group=group, group_src=src, async_op=True), plain, sent))
        if sent.device != plain.device and len(pending) > _NUM_ON_THE_WAY:
            _receive(*pending.popleft())
    while pending:
        _receive(*pending.popleft())


def _receive(work: Any, plain: Tensor, sent: Tensor) -> None:
    work.wait()
    if sent.device != plain.device or sent.data_ptr() != plain.data_ptr():
        plain.copy_(sent)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # Every process used the part of this one: the sum of what they all say is its gradient.
        grad = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def _gather(tensor: Tensor, group: Group) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor, group=group)
    return torch.stack(parts)


def _as_tensor(leaf: object, device: torch.device | None) -> Tensor:
    if isinstance(leaf, Tensor):
        return leaf if device is None else leaf.to(device)
    return torch.tensor(leaf, device=device)
