"""A batch in parts, and what was logged for each part in one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from levin.utilities.collections import apply_to_collection, is_namedtuple
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Batch, Kwargs


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


def split(batch: Batch, num_parts: int, size: int) -> list[Batch]:
    """Return a batch in parts of equal size.

    Args:
        batch: Tensors whose dimension 0 is ``size`` are cut, and lists without tensors of that length; all else is in every
            part.
        num_parts: A divisor of ``size``.
        size: Number of samples.

    Example:
        >>> split([torch.tensor([1, 2]), ["a", "b"], 3], 2, size=2)
        [[tensor([1]), ['a'], 3], [tensor([2]), ['b'], 3]]
    """
    step = size // num_parts
    return [_part(batch, slice(start, start + step), size) for start in range(0, size, step)]


def _part(data: Batch, place: slice, size: int) -> Batch:
    if isinstance(data, Tensor):
        return data[place] if data.dim() and len(data) == size else data
    if isinstance(data, Mapping):
        return {key: _part(value, place, size) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        if len(data) == size and not any(isinstance(item, (Tensor, Mapping, list, tuple)) for item in data):
            return data[place]
        parts = [_part(item, place, size) for item in data]
        kind: Any = type(data)
        return kind(*parts) if is_namedtuple(data) else kind(parts)
    return data


def merge_outputs(outputs: Sequence[Any], size: int) -> Any:
    """Return what a module returned for the parts of a batch as for the whole batch.

    Args:
        outputs: Of all parts; tensors are joined along dimension 0, all else must be the same in all of them.
        size: Number of samples.

    Raises:
        MisconfigurationException: A tensor has no part for each sample, or something else is not the same.

    Example:
        >>> merge_outputs([{"y": torch.ones(1), "kind": "a"}, {"y": torch.zeros(1), "kind": "a"}], size=2)
        {'y': tensor([1., 0.]), 'kind': 'a'}
    """
    leaves, structures = zip(*(tree_flatten(output) for output in outputs))
    merged = [_merged_leaf(same, size) for same in zip(*leaves, strict=True)]
    return tree_unflatten(merged, structures[0])


def _merged_leaf(parts: Sequence[Any], size: int) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) and first.dim() and len(first) * len(parts) == size:
        return torch.cat([part.contiguous() for part in parts])
    if not isinstance(first, Tensor) and all(part == first for part in parts):
        return first
    if len(parts) == 1:
        return first
    shown = f"a tensor of {tuple(first.shape)}" if isinstance(first, Tensor) else repr(first)
    raise MisconfigurationException(
        f"A module that runs as a pipeline returned {shown} for a part of {size // len(parts)} samples: its tensors have one entry for "
        "each sample. Compute what is of the whole batch outside of it, or use num_microbatches=1."
    )


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
    values = torch.stack([torch.as_tensor(call["value"]).detach().cpu().float().reshape(()) for call in calls])
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
