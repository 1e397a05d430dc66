"""Data sets and loaders with ``state_dict`` and ``load_state_dict``, set to where an epoch was left."""

from __future__ import annotations

import copy
import pickle
from typing import Any

_END: object = object()


def leave_epoch(obj: Any, state: object, is_ended: bool) -> None:
    """Set ``obj`` to ``state``, saved where an epoch was left, so that its next iteration is one of a new epoch.

    The protocol says that the next iteration goes on from a loaded state. Here the next iteration is to begin an epoch,
    so the one that goes on is begun and dropped, as the unbroken run dropped it. An object that was left before its end,
    by a limit of batches, may start again in its next iteration or go on in every iteration, of which the protocol says
    nothing: this is tried.

    Args:
        obj: A data set or loader with ``state_dict`` and ``load_state_dict``.
        state: What ``obj.state_dict()`` returned.
        is_ended: Whether the epoch was left at its end.
    """
    obj.load_state_dict(copy.deepcopy(state))
    following = _state_after_item(obj)
    if is_ended:
        if following is not None:
            # It has set itself to its beginning already.
            obj.load_state_dict(copy.deepcopy(state))
        return
    if following is None:
        # It was left after its last item, but before its end.
        following = _state_after_item(obj)
    goes_on = following is not None and _goes_on(obj, following)
    obj.load_state_dict(copy.deepcopy(state))
    if not goes_on:
        _state_after_item(obj)


def _goes_on(obj: Any, following: object) -> bool:
    """Whether ``obj``, which is in the state ``following``, goes on from there when it is iterated anew."""
    found = _state_after_item(obj)
    obj.load_state_dict(copy.deepcopy(following))
    return pickle.dumps(found) == pickle.dumps(_state_after_item(obj))


def _state_after_item(obj: Any) -> object:
    """Return the state after the first item of an iteration, None if there is no item."""
    if next(iter(obj), _END) is _END:
        return None
    return copy.deepcopy(obj.state_dict())
