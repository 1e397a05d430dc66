"""Searches for a learning rate and for a batch size: short runs beside a run, of which nothing is left but the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.tuner.batch_size import scale_batch_size as scale_batch_size
    from levin.tuner.finders import BatchSizeFinder as BatchSizeFinder
    from levin.tuner.finders import LearningRateFinder as LearningRateFinder
    from levin.tuner.learning_rate import LRFinder as LRFinder
    from levin.tuner.learning_rate import lr_find as lr_find
    from levin.tuner.tuner import Tuner as Tuner

_HOMES = {
    "levin.tuner.batch_size": "scale_batch_size",
    "levin.tuner.finders": "BatchSizeFinder LearningRateFinder",
    "levin.tuner.learning_rate": "LRFinder lr_find",
    "levin.tuner.tuner": "Tuner",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
