"""Progress bars."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.callbacks.progress.progress_bar import ProgressBar
    from levin.callbacks.progress.rich_progress import RichProgressBar, RichProgressBarTheme
    from levin.callbacks.progress.tqdm_progress import TQDMProgressBar

_HOMES = {
    "ProgressBar": "levin.callbacks.progress.progress_bar",
    "RichProgressBar": "levin.callbacks.progress.rich_progress",
    "RichProgressBarTheme": "levin.callbacks.progress.rich_progress",
    "TQDMProgressBar": "levin.callbacks.progress.tqdm_progress",
}

__all__ = ["ProgressBar", "RichProgressBar", "RichProgressBarTheme", "TQDMProgressBar"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
