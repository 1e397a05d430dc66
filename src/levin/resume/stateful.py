"""Data sets and loaders with ``state_dict`` and ``load_state_dict``, set to where an epoch was left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

_END: Any = object()


def leave_epoch(obj: Any, state: Any, is_ended: bool) -> None:
    """Set ``obj`` to ``state``, saved where an epoch was left, so that its next iteration is one of a new epoch.

    Most objects go on from a loaded state in their next iteration, and start again in the one after: they are iterated
    for one item, which is dropped. Some go on in every iteration, which is tried; these keep ``state``.

    Args:
        obj: A data set or loader with ``state_dict`` and ``load_state_dict``.
        state: What ``obj.state_dict()`` returned.
        is_ended: Whether the epoch was left at its end, not by a limit of batches.
    """
    obj.load_state_dict(copy.deepcopy(state))
    following = _state_after_item(obj)
    if following is None:
        return
    # At the end, one that has an item to give was set to its beginning already.
    if is_ended or _goes_on(obj, following):
        obj.load_state_dict(copy.deepcopy(state))


def _goes_on(obj: Any, following: Any) -> bool:
    """Whether ``obj``, which is in the state ``following``, goes on from there when it is iterated anew."""
    found = _state_after_item(obj)
    obj.load_state_dict(copy.deepcopy(following))
    return pickle.dumps(found) == pickle.dumps(_state_after_item(obj))


def _state_after_item(obj: Any) -> Any:
    """Return the state after the first item of an iteration, None if there is no item."""
    if next(iter(obj), _END) is _END:
        return None
    return copy.deepcopy(obj.state_dict())


def end_once(dataset: Any) -> None:
    """Make the next iteration over ``dataset`` empty; those after it are as ever."""
    kind: Any = type(dataset)

    class Ended(kind):  # type: ignore[misc]  # the base is known at run time only
        def __iter__(self) -> Any:
            self.__class__ = kind
            return iter(())

    dataset.__class__ = Ended
