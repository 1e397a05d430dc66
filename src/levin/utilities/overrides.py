"""Whether a user's class replaces a method of ours."""

from __future__ import annotations

import functools
from typing import Optional


def is_overridden(method_name: str, instance: Optional[object] = None, parent: Optional[type] = None) -> bool:
    """Return whether ``instance`` has a method of its own in place of the one in ``parent``.

    Args:
        method_name: Name of the method.
        instance: The object to look at; attributes set on the instance itself count. None has no method of its own.
        parent: The class with the default. By default the class of levin's that ``instance`` inherits from.

    Raises:
        ValueError: ``parent`` is not given and ``instance`` inherits from no class of levin's.
    """
    if instance is None:
        return False
    if parent is None:
        bases = [base for base in reversed(type(instance).__mro__) if base.__module__.startswith("levin.")]
        if not bases:
            raise ValueError(f"instance must inherit from a class of levin's, received {type(instance).__name__}.")
        parent = next((base for base in bases if hasattr(base, method_name)), bases[0])
    own: object = getattr(instance, method_name, None)
    default: object = getattr(parent, method_name, None)
    # The method of the class itself, as it is, needs no search for what it wraps.
    if own is None or getattr(own, "__func__", own) is default:
        return False
    if default is None:
        raise ValueError(f"{parent.__name__} has no method {method_name!r} that could be overridden.")
    return innermost(own) is not innermost(default)


def has_own(method_name: str, instance: object, parent: type) -> bool:
    """Return whether ``instance`` has a method of its own, in its class or set on itself.

    A wrapper counts, though all that it wraps is the default: it is there to be called. None stands for no method:
    ``module.validation_step = None`` takes the one of the class away.

    Args:
        method_name: Name of the method.
        instance: The object to look at.
        parent: The class with the default.
    """
    own: object = getattr(instance, method_name, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(parent, method_name)


def innermost(method: object) -> object:
    """Return the function in a method, a partial or a wrapper."""
    while True:
        if isinstance(method, functools.partial):
            method = method.func
        elif hasattr(method, "__wrapped__"):
            method = method.__wrapped__
        elif hasattr(method, "__func__"):
            method = method.__func__
        else:
            return method
