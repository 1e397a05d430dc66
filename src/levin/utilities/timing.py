"""Names of what profilers measure."""

from __future__ import annotations

from typing import Any

_KINDS = ("Callback", "LightningModule", "LightningDataModule", "Strategy")


def action_name(owner: Any, name: str) -> str:
    """Return the name of an action in the reports of the profilers.

    Example:
        >>> class Strategy: ...
        >>> class Mine(Strategy): ...
        >>> action_name(Mine(), "setup")
        '[Strategy]Mine.setup'
    """
    kind = next((base.__name__ for base in type(owner).__mro__ if base.__name__ in _KINDS), "Callback")
    return f"[{kind}]{owner.state_key if kind == 'Callback' else type(owner).__name__}.{name}"
