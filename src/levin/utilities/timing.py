"""Calls that the profiler shall know of."""

from __future__ import annotations

from typing import Any


def call_timed(trainer: Any, kind: str, owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a module, data module or callback; ``trainer.profiler`` measures it.

    It is meant for what happens a few times per run. What happens in every batch is composed once per run, with or
    without the profiler.

    Args:
        trainer: Whose profiler it is.
        kind: ``"LightningModule"``, ``"LightningDataModule"`` or ``"Callback"``.
        owner: Whose method.
        name: Name of the method.
        args: Passed to it.
        kwargs: Passed to it.

    Returns:
        What the method returns.
    """
    with trainer.profiler.profile(action_name(kind, owner, name)):
        return getattr(owner, name)(*args, **kwargs)


def action_name(kind: str, owner: Any, name: str) -> str:
    """Return the name of an action in the reports of the profilers.

    Example:
        >>> action_name("LightningModule", object(), "setup")
        '[LightningModule]object.setup'
    """
    return f"[{kind}]{owner.state_key if kind == 'Callback' else type(owner).__name__}.{name}"
