"""Lightning's class paths in configurations, and levin's: one configuration for both."""

from __future__ import annotations

import functools
import re
import sys
from typing import Any

from levin.compat.finder import AliasFinder
from levin.compat.paths import ABSENT, TABLE
from levin.compat.table import names_in, path_of

_DOTTED = r"(?<![\w./-])(?:{})(?:\.\w+)+(?![\w/-])"
_THEIRS = re.compile(_DOTTED.format("lightning|pytorch_lightning|lightning_fabric"))
_OURS = re.compile(_DOTTED.format("levin"))


def to_levin(value: Any) -> Any:
    """Return ``value`` with the class paths of Lightning in it replaced by levin's.

    Args:
        value: A string, or a container of plain values. Only the names that levin has are replaced.

    Example:
        >>> to_levin({"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "loss"}})
        {'class_path': 'levin.callbacks.EarlyStopping', 'init_args': {'monitor': 'loss'}}
    """
    if isinstance(value, str):
        return _THEIRS.sub(lambda match: _ours(match.group()), value) if "lightning" in value else value
    if isinstance(value, dict):
        return {key: to_levin(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_levin(item) for item in value)
    return value


def to_lightning(text: str) -> str:
    """Return ``text`` with the class paths of levin in it replaced by Lightning's, where Lightning has the class.

    Example:
        >>> to_lightning("class_path: levin.callbacks.EarlyStopping")
        'class_path: lightning.pytorch.callbacks.EarlyStopping'
    """
    return _OURS.sub(lambda match: _theirs().get(match.group(), match.group()), text)


def is_alias_installed() -> bool:
    """Return whether the program is one for Lightning, which runs on levin by the import alias."""
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def _ours(path: str) -> str:
    module, _, name = path.rpartition(".")
    key = path_of(module)
    home, ours = names_in(key).get(name, (ABSENT, "")) if key in TABLE else (ABSENT, "")
    return path if home == ABSENT else f"{home}.{ours}"


@functools.cache
def _theirs() -> dict[str, str]:
    paths: dict[str, str] = {}
    for key in sorted(TABLE, key=lambda key: (not key.startswith("pytorch"), key.count("."))):
        for name, (home, ours) in names_in(key).items():
            if home.startswith("levin") and home != ABSENT:
                paths.setdefault(f"{home}.{ours}", ".".join(part for part in ("lightning", key, name) if part))
    return paths
