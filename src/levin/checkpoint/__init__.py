"""Checkpoints: the tree that is saved, and the files it lies in."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.checkpoint.background import AsyncCheckpointIO as AsyncCheckpointIO
    from levin.checkpoint.consolidate import consolidate as consolidate
    from levin.checkpoint.io import CheckpointIO as CheckpointIO
    from levin.checkpoint.io import TorchCheckpointIO as TorchCheckpointIO
    from levin.checkpoint.io import atomic_save as atomic_save
    from levin.checkpoint.io import load as load
    from levin.checkpoint.upgrade import upgrade as upgrade
    from levin.checkpoint.verify import find_newest_intact as find_newest_intact

_MODULE_OF = {
    "AsyncCheckpointIO": "levin.checkpoint.background",
    "CheckpointIO": "levin.checkpoint.io",
    "TorchCheckpointIO": "levin.checkpoint.io",
    "atomic_save": "levin.checkpoint.io",
    "consolidate": "levin.checkpoint.consolidate",
    "find_newest_intact": "levin.checkpoint.verify",
    "load": "levin.checkpoint.io",
    "upgrade": "levin.checkpoint.upgrade",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
