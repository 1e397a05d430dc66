"""The dict that ``fabric.save`` takes, turned into what a file holds, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from levin.checkpoint.layout import StateElsewhere
from levin.fabric.wrappers import FabricDataLoader, is_wrapped, set_up_module, split_compiled
from levin.resume.rank_states import part_of_rank, with_other_ranks
from levin.strategies.strategy import Strategy
from levin.utilities.exceptions import DamagedCheckpointError
from levin.utilities.rng_states import collect_rng_states, set_rng_states
from levin.utilities.types import StateDict

Filter = Mapping[str, Callable[[str, Any], bool]]


def check_state(state: object) -> None:
    """Check what is to be saved or loaded.

    Raises:
        TypeError: It is no dict.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state must be a dict, received a {type(state).__name__}. Pass {{'model': model, 'optimizer': optimizer}}."
        )


def check_filter(state: Mapping[str, object], filter: object) -> None:
    """Check which parts are to be saved.

    Raises:
        TypeError: The filter is of another kind.
        ValueError: The filter has a key that the state has not.
    """
    if filter is None:
        return
    if not isinstance(filter, Mapping):
        raise TypeError(f"filter must be a dict, received {filter!r}. Pass {{'model': lambda name, value: True}}.")
    unknown = [key for key in filter if key not in state]
    if unknown:
        raise ValueError(f"filter may have the keys of state, which are {list(state)}, received {unknown} as well.")
    for key, keep in filter.items():
        if not callable(keep):
            raise TypeError(f"filter[{key!r}] must be a function (name, value) -> bool, received {keep!r}.")


def collect(state: Mapping[str, Any], strategy: Strategy, filter: Filter | None = None) -> StateDict:
    """Return what a file holds: the states of modules, optimizers and other objects, and plain values as they are.

    Args:
        state: Name -> object, as the user passed it.
        strategy: The strategy; all processes call this.
        filter: Name -> function that says which entries of an object's state are kept.

    Raises:
        TypeError: What was set up, or a loader, is elsewhere than under a name of its own.
    """
    checkpoint = {}
    for key, obj in state.items():
        value = _state_of(obj, strategy)
        if value is obj:
            _check_plain(key, value)
        keep = (filter or {}).get(key)
        if keep is not None and value is not obj:
            value = {name: item for name, item in value.items() if keep(name, item)}
        checkpoint[key] = value
    return checkpoint


def restore(
    checkpoint: StateDict, state: Any, strategy: Strategy, strict: bool, weights_only: bool | None
) -> dict[str, Any]:
    """Put what a file held back into the objects of ``state``.

    Args:
        checkpoint: As :func:`collect` returned it.
        state: Name -> object; plain values are replaced in this dict.
        strategy: The strategy; all processes call this.
        strict: Whether every name must be in the file, and the names of weights the same.
        weights_only: Whether reading it may run no code.

    Returns:
        What the file holds beside it.

    Raises:
        KeyError: A name is not in the file.
        DamagedCheckpointError: It holds no dict.
    """
    if not isinstance(checkpoint, dict):
        raise DamagedCheckpointError(
            f"A checkpoint must be a dict to be loaded into {list(state)}, received a {type(checkpoint).__name__}. Use load_raw "
            "for the state of one module or optimizer."
        )
    missing = [key for key in state if key not in checkpoint]
    if missing and strict:
        raise KeyError(
            f"The checkpoint has {list(checkpoint)}, and not {missing}. Pass strict=False to load what is there."
        )
    for key in [key for key in state if key in checkpoint]:
        if not restore_one(checkpoint[key], state[key], strategy, strict, weights_only):
            state[key] = checkpoint[key]
    # The part of a module or an optimizer that nobody asked for stays where it is.
    return {
        key: value for key, value in checkpoint.items() if key not in state and not isinstance(value, StateElsewhere)
    }


def restore_one(value: Any, obj: Any, strategy: Strategy, strict: bool, weights_only: bool | None) -> bool:
    """Load ``value`` into ``obj``; return whether that is an object with a state.

    Raises:
        ValueError: A loader is to go on from what is not the place of one.
    """
    inner, _ = split_compiled(obj)
    if isinstance(inner, nn.Module):
        strategy.load_module_state(set_up_module(inner), value, strict=strict)
    elif isinstance(inner, FabricDataLoader):
        if not isinstance(value, dict) or "loader" not in value:
            raise ValueError(
                "The checkpoint has no place of a loader under this name. Use the names that were saved, "
                "or leave the loader out."
            )
        own = part_of_rank(value, strategy.data_parallel.rank, strategy.data_parallel.size, weights_only)
        inner.load_state_dict(own["loader"])
        set_rng_states(own.get("rng", {}))
    elif callable(getattr(inner, "load_state_dict", None)):
        inner.load_state_dict(value)
    else:
        return False
    return True


def _check_plain(key: str, value: object) -> None:
    # It would be pickled whole, which no load takes.
    if is_wrapped(value) or isinstance(value, DataLoader):
        raise TypeError(
            f"state[{key!r}] holds a {type(value).__name__} that cannot be saved there. Give each object that a setup "
            "method returned a name of its own in state."
        )
    if isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            _check_plain(key, part)


def _state_of(obj: object, strategy: Strategy) -> Any:
    inner, _ = split_compiled(obj)
    if isinstance(inner, nn.Module):
        return strategy.module_state(set_up_module(inner))
    if isinstance(inner, FabricDataLoader):
        # What the next batches are depends on random numbers too, and so does what the module makes of them.
        return with_other_ranks({"loader": inner.state_dict(), "rng": collect_rng_states()}, strategy)
    return inner.state_dict() if callable(getattr(inner, "state_dict", None)) else obj
