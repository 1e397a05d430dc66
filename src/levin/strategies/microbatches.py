"""A batch in parts, and what was logged for each part in one call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from levin.utilities.collections import apply_to_collection, is_namedtuple
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Batch, Function, Kwargs


def size_of(batch: Batch) -> int:
    """Return the number of samples: dimension 0 of the batch's first tensor that has dimensions.

    Raises:
        MisconfigurationException: It has no such tensor.

    Example:
        >>> size_of({"x": torch.zeros(4, 2), "name": "train"})
        4
    """
    sizes: list[int] = []
    apply_to_collection(batch, Tensor, lambda tensor: sizes.extend(tensor.shape[:1]))
    if not sizes:
        raise MisconfigurationException(
            f"A pipeline cuts batches along dimension 0 of their tensors, received a batch without any: {type(batch).__name__}."
        )
    return sizes[0]


def split(batch: Batch, step: int, size: int) -> list[Batch]:
    """Return a batch in parts of equal size, but for the last, which may be smaller.

    Args:
        batch: Tensors whose dimension 0 is ``size`` are cut, and lists without tensors of that length; all else is in every
            part.
        step: Samples of a part.
        size: Number of samples.

    Example:
        >>> split([torch.tensor([1, 2]), ["a", "b"], 3], 1, size=2)
        [[tensor([1]), ['a'], 3], [tensor([2]), ['b'], 3]]
    """
    return [_part(batch, slice(start, start + step), size) for start in range(0, size, step)]


def _part(data: Batch, place: slice, size: int) -> Batch:
    if isinstance(data, Tensor):
        return data[place] if data.dim() and len(data) == size else data
    if isinstance(data, Mapping):
        parts = {key: _part(value, place, size) for key, value in data.items()}
        if not isinstance(data, MutableMapping):
            return parts
        mapping = copy.copy(data)  # with the methods that its kind has
        mapping.update(parts)
        return mapping
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        whole: Any = copy.copy(data)
        for field in dataclasses.fields(data):
            object.__setattr__(whole, field.name, _part(getattr(data, field.name), place, size))
        return whole
    if isinstance(data, (list, tuple)):
        if len(data) == size and not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in data):
            return data[place]
        items = [_part(item, place, size) for item in data]
        kind: Any = type(data)
        return kind(*items) if is_namedtuple(data) else kind(items)
    return data


def are_of_samples(outputs: Sequence[Any], size: int) -> bool:
    """Return whether outputs for the parts of a batch have an entry for each sample, or the same for all of them.

    Args:
        outputs: What a module returned for each part.
        size: Number of samples.

    Example:
        >>> are_of_samples([torch.ones(1), torch.zeros(1)], size=2), are_of_samples([torch.tensor(0.5)] * 2, size=2)
        (True, False)
    """

    def is_of_samples(parts: tuple[Any, ...]) -> bool:
        first = parts[0]
        if isinstance(first, Tensor):
            return first.dim() > 0 and len(first) * len(parts) == size
        return all(part == first for part in parts)

    return len(outputs) == 1 or all(map(is_of_samples, zip(*map(tree_leaves, outputs), strict=True)))


def merge_outputs(outputs: Sequence[Any]) -> Any:
    """Return what a module returned for the parts of a batch as for the whole batch; see :func:`are_of_samples`.

    Example:
        >>> merge_outputs([{"y": torch.ones(1), "kind": "a"}, {"y": torch.zeros(1), "kind": "a"}])
        {'y': tensor([1., 0.]), 'kind': 'a'}
    """
    leaves, structures = zip(*map(tree_flatten, outputs))
    return tree_unflatten([_joined(parts) for parts in zip(*leaves)], structures[0])


def _joined(parts: tuple[Any, ...]) -> Any:
    if not isinstance(parts[0], Tensor):
        return parts[0]
    # In memory of its own, which can be sent.
    return torch.cat([part.contiguous() for part in parts]) if len(parts) > 1 else parts[0].contiguous()


def tied(loss: Tensor, gradients: list[Tensor | None], total: Any, parameters: Sequence[Tensor]) -> Tensor:
    """Return the loss, tied to gradients that are there already: its backward gives them, times its own gradient, to the parameters.

    Args:
        loss: Of all parts.
        gradients: For each parameter those of the sum of the parts; empty after backward.
        total: What they are divided by.
        parameters: In the order of the gradients.
    """
    # So that backward comes here where no parameter is left to train in this process.
    anchor = torch.zeros((), device=loss.device, requires_grad=True)
    tie: Function = _Computed.apply
    found: Tensor = tie(anchor, loss, gradients, total, *parameters)
    return found


class _Computed(torch.autograd.Function):
    """See :func:`tied`."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, loss: Tensor, gradients: list[Tensor | None], total: Any, *parameters: Tensor
    ) -> Tensor:
        ctx.gradients, ctx.total = gradients, total
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        factor = grads[0] / ctx.total
        found = tuple(None if gradient is None else gradient.mul_(factor) for gradient in ctx.gradients)
        # torch keeps what nobody else holds, and copies the rest.
        ctx.gradients.clear()
        return None, None, None, None, *found


def shapes_of(batch: Batch) -> tuple[object, ...]:
    """Return the shapes and types of all tensors: what the sizes of what stages send each other depend on."""
    found: list[object] = []
    apply_to_collection(batch, Tensor, lambda tensor: found.append((tuple(tensor.shape), tensor.dtype)))
    return tuple(found)


def merge_logged(calls: Sequence[Sequence[Kwargs]]) -> list[Kwargs]:
    """Return one call of ``self.log`` for each name, out of those of all parts of a batch.

    Args:
        calls: For each part the arguments of its calls, as keywords.

    Raises:
        MisconfigurationException: A value is no number, or its ``reduce_fx`` is unknown.

    Example:
        >>> merge_logged([[{"name": "loss", "value": 1.0}], [{"name": "loss", "value": 2.0}]])
        [{'name': 'loss', 'value': tensor(1.5000)}]
    """
    by_name: dict[str, list[Kwargs]] = {}
    for part in calls:
        for call in part:
            by_name.setdefault(call["name"], []).append(call)
    return [_merged(name, same) for name, same in by_name.items()]


def _merged(name: str, calls: list[Kwargs]) -> Kwargs:
    for call in calls:
        if not isinstance(call["value"], (int, float, Tensor)):
            raise MisconfigurationException(
                f"self.log({name!r}, ...) in the training_step of a pipeline takes a number or a tensor, received "
                f"{type(call['value']).__name__}, which is updated in the last stage alone. Log metric objects in "
                "validation_step, which all processes run."
            )
    given = [torch.as_tensor(call["value"]).detach().cpu().reshape(()) for call in calls]
    values = torch.stack([value.to(torch.promote_types(value.dtype, torch.float32)) for value in given])
    sizes = [call.get("batch_size") for call in calls]
    counts = [size for size in sizes if size is not None]
    kind = calls[0].get("reduce_fx", "mean")
    merged = dict(calls[0])
    if kind == "mean" and len(counts) == len(calls):
        weights = torch.tensor(counts, dtype=values.dtype)
        merged["value"] = (values * weights).sum() / weights.sum()
    else:
        reduce: Callable[[Tensor], Tensor] | None = getattr(torch, kind, None) if isinstance(kind, str) else kind
        if reduce is None:
            raise MisconfigurationException(
                f"self.log({name!r}, reduce_fx={kind!r}) must be 'mean', 'sum', 'min' or 'max'."
            )
        merged["value"] = reduce(values)
    if counts:
        merged["batch_size"] = sum(counts)
    return merged
