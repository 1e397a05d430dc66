"""States of which each stage of a pipeline has a part: put together in the names and the order of the whole module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from levin.strategies.state_of import numbers_in
from levin.utilities.collections import apply_to_collection
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.parameters import full
from levin.utilities.types import Group, ParamGroup, StateDict


def gathered(state: Mapping[str, Any], names: Sequence[str], group: Group) -> StateDict:
    """Return the entries of all stages, on the CPU, in the process of the first stage; in the others their own.

    Args:
        state: The entries of this stage; DTensors are made whole, so all processes call this.
        names: Of all stages, in the order of the whole module.
        group: The processes that share the layers.
    """
    own = {name: apply_to_collection(value, torch.Tensor, _whole) for name, value in state.items()}
    assert group is not None
    parts: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    dist.gather_object(own, parts, dst=dist.get_global_rank(group, 0), group=group)
    return in_order({name: value for part in parts or [own] for name, value in part.items()}, names)


def in_order(state: Mapping[str, Any], names: Iterable[str]) -> StateDict:
    """Return a dict in the order of ``names``, with what is not among them at its end.

    Example:
        >>> in_order({"b": 1, "x": 2, "a": 3}, ["a", "b"])
        {'a': 3, 'b': 1, 'x': 2}
    """
    return {**{name: state[name] for name in names if name in state}, **state}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return full(tensor).detach().cpu()


def joined_groups(groups: Sequence[ParamGroup], names: Sequence[str], group: Group) -> list[ParamGroup]:
    """Return parameter groups, whose parameters go by their names, with those of all stages; all processes call this.

    Args:
        groups: Of the optimizer of this stage.
        names: Of the parameters of all stages, in the order of the whole module.
        group: The processes that share the layers.

    Raises:
        MisconfigurationException: The optimizers of the stages have different numbers of groups.
    """
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, [part["params"] for part in groups], group=group)
    if len({len(parts) for parts in everyone}) > 1:
        raise MisconfigurationException(
            f"The optimizers of the stages have {', '.join(str(len(parts)) for parts in everyone)} parameter groups. Make as many "
            "in all stages, also where one has no parameters."
        )
    place = {name: number for number, name in enumerate(names)}
    return [
        {**own, "params": sorted({name for params in of_stages for name in params}, key=place.__getitem__)}
        for own, of_stages in zip(groups, zip(*everyone))
    ]


def own_numbers(state: StateDict, own: Sequence[Sequence[str]], joined: Sequence[Sequence[str]]) -> StateDict:
    """Return the part of a numbered state of an optimizer that belongs to this stage, with numbers of its own.

    Args:
        state: Of all stages, as one device saves it.
        own: The names of the parameters of each group of this stage.
        joined: The same of all stages.

    Raises:
        MisconfigurationException: It is the state of another number of parameters.

    Example:
        >>> state = {"state": {0: "a", 1: "b"}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}
        >>> own_numbers(state, own=[["b"]], joined=[["a", "b"]])
        {'state': {0: 'b'}, 'param_groups': [{'lr': 0.1, 'params': [0]}]}
    """
    names = [name for group in joined for name in group]
    of_name = dict(zip(names, numbers_in(state, len(names))))
    order = [name for group in own for name in group]
    new = {name: number for number, name in enumerate(order)}
    return {
        "state": {new[name]: state["state"][of_name[name]] for name in order if of_name[name] in state["state"]},
        "param_groups": [
            {**group, "params": [new[name] for name in names]} for group, names in zip(state["param_groups"], own)
        ],
    }
