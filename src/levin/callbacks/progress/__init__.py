"""Progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

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


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
