"""The SpikeDetection of ``lightning.fabric.utilities.spike``, which a loop of one's own calls."""

from __future__ import annotations

from typing import Any

from levin.callbacks.spike_detection import SpikeDetector
from levin.fabric import Fabric
from levin.utilities.types import Batch


class SpikeDetection(SpikeDetector):
    """Raises when the loss is much worse than its running mean; see :class:`levin.callbacks.SpikeDetection`.

    Example:
        >>> detection = SpikeDetection(window=100, warmup=200, rtol=3.0)
    """

    def on_train_batch_end(self, fabric: Fabric, loss: Any, batch: Batch, batch_idx: int) -> None:
        """Look at the loss of a batch, in all processes together.

        Args:
            fabric: The Fabric.
            loss: A tensor with one element.
            batch: Not used.
            batch_idx: Index of the batch in its epoch.

        Raises:
            TrainingSpikeException: It is a spike in one of them.
        """
        self.look_at(loss, batch_idx, fabric.strategy)
