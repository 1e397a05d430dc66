"""Settings that the command line hands to the scripts it starts, beside those in the code."""

from __future__ import annotations

import os
from typing import Any

DEFAULTS: dict[str, object] = {
    "accelerator": "auto",
    "strategy": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "precision": None,
}


def is_launched_by_command() -> bool:
    """Return whether ``levin fabric run`` (or Lightning's ``fabric run``) started this process."""
    return os.environ.get("LT_CLI_USED") == "1"


def with_environment(given: dict[str, object]) -> dict[str, Any]:
    """Return the arguments of a Fabric, with those that are set by ``LT_ACCELERATOR``, ``LT_DEVICES`` and so on.

    Args:
        given: As the code has them, by the names of :data:`DEFAULTS`.

    Raises:
        ValueError: Code and command line disagree.
    """
    return {name: _one_of(name, value) for name, value in given.items()}


def _one_of(name: str, given: Any) -> Any:
    said: Any = os.environ.get(f"LT_{name.upper()}")
    if said is None:
        return given
    said = int(said) if name == "num_nodes" else said
    is_default = given is None or given == DEFAULTS[name]
    if is_launched_by_command() and not is_default and str(given) != str(said):
        raise ValueError(
            f"{name} is {said!r} on the command line, received Fabric({name}={given!r}). Set it in one of the two places."
        )
    return said
