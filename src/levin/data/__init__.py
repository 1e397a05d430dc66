"""Loaders: combined, sampled for many ranks, fed to the loops, and remembered where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.data.combined import CombinedLoader

__all__ = ["CombinedLoader"]

__getattr__, __dir__ = lazy_face(__name__, {"levin.data.combined": "CombinedLoader"})
