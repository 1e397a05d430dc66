"""Checkpoints: the tree that is saved, and the files it lies in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.checkpoint.background import AsyncCheckpointIO as AsyncCheckpointIO
    from levin.checkpoint.folder import consolidate as consolidate
    from levin.checkpoint.io import CheckpointIO as CheckpointIO
    from levin.checkpoint.io import TorchCheckpointIO as TorchCheckpointIO
    from levin.checkpoint.io import atomic_save as atomic_save
    from levin.checkpoint.reading import load as load
    from levin.checkpoint.upgrade_file import upgrade as upgrade
    from levin.checkpoint.verify import find_newest_intact as find_newest_intact

_HOMES = {
    "levin.checkpoint.background": "AsyncCheckpointIO",
    "levin.checkpoint.folder": "consolidate",
    "levin.checkpoint.io": "CheckpointIO TorchCheckpointIO atomic_save",
    "levin.checkpoint.reading": "load",
    "levin.checkpoint.upgrade_file": "upgrade",
    "levin.checkpoint.verify": "find_newest_intact",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
