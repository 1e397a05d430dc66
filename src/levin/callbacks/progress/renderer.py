"""What draws a progress bar, and what it is told to draw."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from time import monotonic

from levin.callbacks.progress.progress_bar import Metrics

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
    """Draws loops: one bar for each stage that is under way."""

    @abstractmethod
    def draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        """Show the loop in the bar of its stage; None leaves the values that are there."""

    @abstractmethod
    def close(self, stage: str, keep: bool) -> None:
        """Let the bar of ``stage`` stay on the screen as it is, or take it away. Safe to call without a bar."""

    @abstractmethod
    def stop(self) -> None:
        """Leave everything as it is on the screen and give the terminal back. Safe to call twice."""
