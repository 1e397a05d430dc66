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
    "BatchSizeFinder": "levin.tuner.finders",
    "LRFinder": "levin.tuner.learning_rate",
    "LearningRateFinder": "levin.tuner.finders",
    "Tuner": "levin.tuner.tuner",
    "lr_find": "levin.tuner.learning_rate",
    "scale_batch_size": "levin.tuner.batch_size",
}

__all__ = sorted(_HOMES)


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
