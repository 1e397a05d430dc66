"""From the name of a number format to its class."""

from __future__ import annotations

from typing import Literal, Union, get_args

import torch

from levin.precision.mixed import MixedPrecision
from levin.precision.precision import Precision
from levin.precision.true import DoublePrecision, HalfPrecision
from levin.utilities.exceptions import MisconfigurationException, did_you_mean
from levin.utilities.rank_zero import rank_zero_warn

PrecisionName = Literal[
    "32-true", "64-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "float8", "transformer-engine",
    "transformer-engine-float16",
]  # fmt: skip
PrecisionInput = Union[Literal[64, 32, 16], PrecisionName, Literal["64", "32", "16", "bf16"]]
"""What users may say: the command line reads its choices here."""
PRECISIONS: tuple[str, ...] = get_args(PrecisionName)
# The value says whether the short form is so often misunderstood that levin points to the long one.
_SHORT_FORMS: dict[object, tuple[str, bool]] = {
    64: ("64-true", False),
    "64": ("64-true", False),
    32: ("32-true", False),
    "32": ("32-true", False),
    16: ("16-mixed", True),
    "16": ("16-mixed", True),
    "bf16": ("bf16-mixed", True),
}


def check_precision_name(precision: object) -> None:
    """Check that there is such a number format.

    Raises:
        ValueError: There is none.
    """
    is_known = isinstance(precision, (str, int)) and (precision in PRECISIONS or precision in _SHORT_FORMS)
    if not is_known:
        allowed = ", ".join(repr(name) for name in (*PRECISIONS, *_SHORT_FORMS))
        raise MisconfigurationException(
            f"precision must be one of {allowed}, received {precision!r}."
            f"{did_you_mean(precision, PRECISIONS)} Use '32-true' for single precision."
        )


def resolve_precision_name(precision: object) -> str:
    """Return the full name of a number format; short forms that are easily misunderstood warn.

    Raises:
        ValueError: There is no such format.

    Example:
        >>> resolve_precision_name(64)
        '64-true'
    """
    check_precision_name(precision)
    if isinstance(precision, str) and precision in PRECISIONS:
        return precision
    name, should_warn = _SHORT_FORMS[precision]
    if should_warn:
        rank_zero_warn(f"precision={precision!r} means {name!r}. Write precision={name!r}.")
    return name


def choose_precision(name: str, device_type: str) -> Precision:
    """Return the number format for modules that lie whole on one device.

    Args:
        name: One of :data:`PRECISIONS`.
        device_type: For example ``"cuda"``.

    Raises:
        ValueError: The device has no such numbers.
        ModuleNotFoundError: A package that it needs is not installed.
    """
    if name == "16-mixed" and device_type == "cpu":
        rank_zero_warn(
            "precision='16-mixed' is not supported on the CPU: its float16 has no loss scale. Using 'bf16-mixed'. "
            "Write precision='bf16-mixed' to say so."
        )
        name = "bf16-mixed"
    if name == "64-true" and device_type == "mps":
        raise MisconfigurationException(
            "precision='64-true' cannot be used with accelerator='mps', which has no 64-bit numbers. Use '32-true'."
        )
    if name == "float8":
        from levin.precision.float8 import Float8Precision

        return Float8Precision(device=device_type)
    if name.startswith("transformer-engine"):
        from levin.precision.transformer_engine import TransformerEnginePrecision

        return TransformerEnginePrecision(weights_dtype=torch.float16 if name.endswith("16") else torch.bfloat16)
    if name in ("16-true", "bf16-true"):
        return HalfPrecision(name)
    if name in ("16-mixed", "bf16-mixed"):
        return MixedPrecision(name, device_type)
    return DoublePrecision() if name == "64-true" else Precision()
