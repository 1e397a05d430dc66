"""Groups of parameters that an optimizer was given after ``configure_optimizers``: found again, and scheduled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

# What schedulers keep per group: in a list of their own, or in the group; and whether it is a rate.
_PER_GROUP = {
    "base_lrs": True, "max_lrs": True, "min_lrs": False, "lr_lambdas": False,
    "base_momentums": False, "max_momentums": False,
}  # fmt: skip
_IN_GROUP = {"initial_lr": True, "max_lr": True, "min_lr": True, "base_momentum": False, "max_momentum": False}


# Of each group of each optimizer the names of its parameters in the module; "" for those of elsewhere.
GroupNames = list[list[list[str]]]


def groups_by_name(optimizers: Sequence[Optimizer], module: nn.Module) -> GroupNames:
    """Return which parameters of ``module`` each group of each optimizer has."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return [
        [[names.get(parameter, "") for parameter in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def restore_groups(
    optimizers: Sequence[Optimizer], module: nn.Module, configured: GroupNames, saved: GroupNames
) -> None:
    """Give optimizers the parameters that they had beyond those of ``configure_optimizers``.

    An optimizer stays as it is if ``configure_optimizers`` gives it others today, or something was taken from it.

    Args:
        optimizers: Those of the run.
        module: Whose parameters they are.
        configured: What :func:`groups_by_name` returned when the run that was saved began.
        saved: What it returned when the checkpoint was saved.
    """
    parameters = dict(module.named_parameters())
    for optimizer, now, before, then in zip(optimizers, groups_by_name(optimizers, module), configured, saved):
        has_grown = len(before) <= len(then) and all(set(few) <= set(many) for few, many in zip(before, then))
        if now != before or not has_grown or not all(name in parameters for group in then for name in group):
            continue
        for group, names in zip(optimizer.param_groups, then):
            group["params"] = _thawed(parameters, group["params"], names)
            if "param_names" in group:
                group["param_names"] = list(names)
        for names in then[len(now) :]:
            added: list[Any] = _thawed(parameters, [], names)
            if "param_names" in optimizer.param_groups[0]:
                added = list(zip(names, added))
            optimizer.add_param_group({"params": added})


def in_order(state: Any, then: list[list[str]], now: list[list[str]]) -> Any:
    """Return the state of an optimizer with its parameters in the order of today.

    Optimizers number their parameters, and a module that makes its layers in another order gives them other numbers.

    Args:
        state: As the optimizer's ``state_dict`` gave it; one of another form stays as it is.
        then: The names of the parameters of each group, in the order of the state.
        now: Those of today; what has other names stays where it is.

    Raises:
        ValueError: The groups come in another order. Schedulers keep their rates by the place of a group.
    """
    if then == now or not isinstance(state, Mapping) or not isinstance(state.get("param_groups"), (list, tuple)):
        return state
    sets_then, sets_now = (list(map(frozenset, each)) for each in (then, now))
    if sets_then != sets_now:
        if set(sets_then) == set(sets_now):
            raise ValueError(
                "The checkpoint holds the groups of the optimizer's parameters in another order: "
                f"{[names[:3] for names in then]} (of each the first three), and today {[names[:3] for names in now]}. "
                "Give them in the order of then."
            )
        return state
    groups = []
    for group, before, after in zip(state["param_groups"], then, now):
        numbers = dict(zip(before, group["params"]))
        groups.append({**group, "params": [numbers[name] for name in after]})
    return {**state, "param_groups": groups}


def keep_schedule(state: Any, optimizer: Optimizer) -> Any:
    """Return the state of an optimizer with what a scheduler put into today's groups, where the saved ones have none of it.

    Args:
        state: As the optimizer's ``state_dict`` gave it; one of another form stays as it is.
        optimizer: That of today, with as many groups.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("param_groups"), (list, tuple)):
        return state
    groups = [
        {**then, **{key: now[key] for key in _IN_GROUP if key in now and key not in then}}
        for now, then in zip(optimizer.param_groups, state["param_groups"])
    ]
    return {**state, "param_groups": groups}


def _thawed(parameters: dict[str, nn.Parameter], held: Sequence[object], names: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters with these names; those that are added are trained, as they were when the file was saved."""
    known = {id(parameter) for parameter in held}
    found = [parameters[name] for name in names]
    for parameter in found:
        if id(parameter) not in known:
            parameter.requires_grad = True
    return found


def schedule_new_groups(scheduler: Any) -> None:
    """Let a scheduler steer groups that its optimizer was given since it was made.

    A new group follows the schedule of the first one, in the proportion that their rates have when it comes.

    Args:
        scheduler: One of torch's, or of a like kind.
    """
    for inner in getattr(scheduler, "_schedulers", ()):
        schedule_new_groups(inner)
    lists = {key: values for key in _PER_GROUP if isinstance(values := getattr(scheduler, key, None), list) and values}
    groups = scheduler.optimizer.param_groups if lists else []
    if all(len(values) >= len(groups) for values in lists.values()):
        return
    first = groups[0]
    for index, group in enumerate(groups):
        ratio = group["lr"] / first["lr"] if first["lr"] else 1.0
        for key in _IN_GROUP.keys() & first.keys():
            group.setdefault(key, first[key] * ratio if _IN_GROUP[key] else first[key])
        for key, values in lists.items():
            if len(values) == index:
                values.append(values[0] * ratio if _PER_GROUP[key] else values[0])
