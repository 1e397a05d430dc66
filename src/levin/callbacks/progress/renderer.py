"""What draws a progress bar, and what it is told to draw."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from time import monotonic
from typing import TextIO

from levin.callbacks.progress.progress_bar import Metrics, ProgressBar
from levin.callbacks.progress.terminal import Redirection

TRAIN, SANITY, VALIDATE, TEST, PREDICT = "train", "sanity_check", "validate", "test", "predict"


@dataclass
class ShownLoop:
    """One pass over a loader, as a bar shows it.

    Args:
        stage: Which bar.
        description: Label of the bar.
        total: Number of batches; infinite if unknown.
        first: How many batches were done before this run.
        done: How many batches are done.
        drawn: How many batches were done when the loop was drawn last.
        start: ``time.monotonic()`` at the beginning.
    """

    stage: str
    description: str
    total: int | float = math.inf
    first: int = 0
    done: int = 0
    drawn: int = 0
    start: float = field(default_factory=monotonic)


class Renderer(ABC):
    """Draws loops: one bar for each stage that is under way. Foreign text goes above the bars.

    Args:
        callback: The bar as a callback, which says what the drawing looks like.
    """

    def __init__(self, callback: ProgressBar) -> None:
        self._callback = callback
        self._redirection: Redirection = Redirection(self._write_above, self._clear)

    def __reduce__(self) -> tuple[type[Renderer], tuple[ProgressBar]]:
        return type(self), (self._callback,)

    @abstractmethod
    def _write_above(self, stream: TextIO, text: str) -> None:
        """Write whole lines above the bars."""

    @abstractmethod
    def _clear(self) -> None:
        """Take the bars off the screen until they are drawn again."""

    @abstractmethod
    def draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        """Show the loop in the bar of its stage; None leaves the values that are there."""

    @abstractmethod
    def close(self, stage: str, keep: bool) -> None:
        """Let the bar of ``stage`` stay on the screen as it is, or take it away. Safe to call without a bar."""

    @abstractmethod
    def stop(self) -> None:
        """Leave everything as it is on the screen and give the terminal back. Safe to call twice."""
