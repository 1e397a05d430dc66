"""Everything in one type on XLA devices."""

from __future__ import annotations

import torch

from levin.precision.true import TruePrecision
from levin.utilities.exceptions import MisconfigurationException

_TYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


class XLAPrecision(TruePrecision):
    """Weights, inputs and computation in one type. ``Trainer(precision="bf16-mixed")`` mixes two on these devices, too.

    Args:
        precision: ``"32-true"``, ``"bf16-true"`` or ``"16-true"``.

    Raises:
        ValueError: Another value of ``precision``.

    Example:
        >>> XLAPrecision("bf16-true").convert_module(torch.nn.Linear(2, 2)).weight.dtype
        torch.bfloat16
    """

    def __init__(self, precision: str = "32-true") -> None:
        if precision not in _TYPES:
            raise MisconfigurationException(
                f"precision must be one of {', '.join(map(repr, _TYPES))} for XLAPrecision, received {precision!r}. "
                "Use Trainer(precision='bf16-mixed') to mix two types."
            )
        super().__init__(precision, _TYPES[precision])
