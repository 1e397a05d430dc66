"""Number formats: what is converted, where autocast holds, how the loss is scaled."""

from levin.precision.mixed import MixedPrecision
from levin.precision.precision import Precision
from levin.precision.true import DoublePrecision, HalfPrecision

__all__ = ["DoublePrecision", "HalfPrecision", "MixedPrecision", "Precision"]
