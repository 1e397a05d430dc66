"""The state of modules and optimizers whose parameters are cut over processes: whole, or the parts that are here.

Names and numbers are those of a module on one device, so that what was saved in one way can be loaded in any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Module
from torch.optim import Optimizer

from levin.checkpoint.sharded import ShardedEntry
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import StateDict


def module_state(module: Module) -> StateDict:
    """Return the weights of a module, with DTensors where they are cut."""
    return get_model_state_dict(module)


def load_module_state(
    module: Module, state: StateDict | ShardedEntry, strict: bool = True, elsewhere: Iterable[str] = ()
) -> None:
    """Load weights. All processes call this, each with the whole state, or with the place that it reads its parts from.

    Args:
        module: Of this process.
        state: Of the whole module.
        strict: Whether it must hold what the module has, and nothing else.
        elsewhere: Names that other processes have.

    Raises:
        ValueError: It holds something else.
    """
    is_full = not isinstance(state, ShardedEntry)
    if isinstance(state, ShardedEntry):
        own = get_model_state_dict(module)
        prefix = f"{state.key}."
        saved = {name.removeprefix(prefix) for name in state.names() if name.startswith(prefix)}
        unknown = sorted(saved - own.keys() - set(elsewhere))
        if strict and unknown:
            raise ValueError(
                f"{state.folder!r} holds {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}, which this module lacks. "
                "Use the module that it was saved with, or set its strict_loading = False to leave them out."
            )
        state = state.load_into(own)
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=is_full, strict=strict))


def optimizer_state(module: Module, optimizer: Optimizer, is_numbered: bool) -> StateDict:
    """Return the state of an optimizer, with DTensors where its parameters are cut.

    Args:
        module: Holds the parameters that it steps.
        optimizer: The optimizer.
        is_numbered: Whether parameters are numbered, as torch's optimizers do, or go by their names.
    """
    state: Any = get_optimizer_state_dict(module, optimizer)
    return numbered(state) if is_numbered else dict(state)


def numbered(state: StateDict) -> StateDict:
    """Return the state of an optimizer by numbers, as torch's optimizers have it, out of one by names."""
    groups = state["param_groups"]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def load_optimizer_state(module: Module, optimizer: Optimizer, state: StateDict | ShardedEntry) -> None:
    """Load the state of an optimizer. All processes call this, each with the whole state, numbered, or with the place
    that it reads its parts from.

    Raises:
        MisconfigurationException: The optimizer steps a parameter that is not the module's, or other ones than before.
    """
    if isinstance(state, ShardedEntry):
        parts: Any = get_optimizer_state_dict(module, optimizer)
        saved = state.names()
        # torch makes the state of every parameter by a step of length zero; one that was never stepped has none.
        parts["state"] = {
            name: values
            for name, values in parts["state"].items()
            if any(f"{state.key}.state.{name}.{key}" in saved for key in values)
        }
        own = [group["params"] for group in parts["param_groups"]]
        loaded = state.load_into(dict(parts))
        # Of a pipeline the folder names the parameters of all stages.
        loaded["param_groups"] = [{**group, "params": params} for group, params in zip(loaded["param_groups"], own)]
        _take_up(module, optimizer, loaded, is_full=False)
        return
    names = parameter_names(module, optimizer)
    of_number = dict(zip(numbers_in(state, len(names)), names))
    named: Any = {
        "state": {of_number[number]: values for number, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [of_number[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
    _take_up(module, optimizer, named, is_full=True)


def numbers_in(state: StateDict, num_parameters: int) -> list[int]:
    """Return the numbers of the parameters in the numbered state of an optimizer, in the order of its groups.

    Raises:
        MisconfigurationException: It is the state of another number of parameters.
    """
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    if len(numbers) != num_parameters:
        raise MisconfigurationException(
            f"The checkpoint holds the state of an optimizer of {len(numbers)} parameters, received one of {num_parameters}. "
            "Make the optimizer of the same parameters as before."
        )
    return numbers


def _take_up(module: Module, optimizer: Optimizer, state: Any, is_full: bool) -> None:
    """Load a state by names, and leave parameters that it does not speak of without one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in state["param_groups"] for name in group["params"]]
    if state["state"]:
        options = StateDictOptions(full_state_dict=is_full, strict=False)
        set_optimizer_state_dict(module, optimizer, state, options=options)
    else:
        # Nothing is cut over processes; torch would look for the device of a tensor that is not there.
        numbers = {name: number for number, name in enumerate(names)}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]]
        optimizer.load_state_dict({"state": {}, "param_groups": groups})
    for name, parameter in zip(names, parameters, strict=True):
        if name not in state["state"]:
            optimizer.state.pop(parameter, None)


def parameter_names(module: Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the parameters that an optimizer steps, in its order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [names.get(id(parameter)) for group in optimizer.param_groups for parameter in group["params"]]
    if None in found:
        raise MisconfigurationException(
            f"{type(optimizer).__name__} steps a parameter that {type(module).__name__} does not have. "
            "Make optimizers in `configure_optimizers`, of self.parameters()."
        )
    return [name for name in found if name is not None]
