"""Number formats: what is converted, where autocast holds, how the loss is scaled."""

from typing import TYPE_CHECKING

from levin.precision.mixed import MixedPrecision
from levin.precision.precision import Precision
from levin.precision.true import DoublePrecision, HalfPrecision
from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.precision.bitsandbytes import BitsandbytesPrecision as BitsandbytesPrecision
    from levin.precision.deepspeed import DeepSpeedPrecision as DeepSpeedPrecision
    from levin.precision.float8 import Float8Precision as Float8Precision
    from levin.precision.transformer_engine import TransformerEnginePrecision as TransformerEnginePrecision
    from levin.precision.xla import XLAPrecision as XLAPrecision

_HOMES = {
    "levin.precision.bitsandbytes": "BitsandbytesPrecision",
    "levin.precision.deepspeed": "DeepSpeedPrecision",
    "levin.precision.float8": "Float8Precision",
    "levin.precision.transformer_engine": "TransformerEnginePrecision",
    "levin.precision.xla": "XLAPrecision",
}
__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = [
    "BitsandbytesPrecision",
    "DeepSpeedPrecision",
    "DoublePrecision",
    "Float8Precision",
    "HalfPrecision",
    "MixedPrecision",
    "Precision",
    "TransformerEnginePrecision",
    "XLAPrecision",
]
