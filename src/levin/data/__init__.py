"""Loaders: combined, sampled for many ranks, fed to the loops, and remembered where they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.data.combined import CombinedLoader

__all__ = ["CombinedLoader"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from levin.data.combined import CombinedLoader

    globals()[name] = CombinedLoader
    return CombinedLoader


def __dir__() -> list[str]:
    return sorted(__all__)
