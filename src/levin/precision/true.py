"""Everything in one type other than single precision."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import Module

from levin.precision.precision import Precision, default_dtype
from levin.utilities.collections import apply_to_collection
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.types import Tree


class TruePrecision(Precision):
    """Weights, inputs and computation in one type.

    Args:
        precision: Its name.
        dtype: The type.
    """

    def __init__(self, precision: str, dtype: torch.dtype) -> None:
        self.precision = precision
        self.dtype = dtype

    def _convert(self, tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.to(self.dtype)
        # Complex numbers of half precision are not there for most operations: they stay as they are.
        return tensor.to(torch.complex128) if tensor.is_complex() and self.dtype == torch.float64 else tensor

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its floating parameters and buffers in this type, complex ones in that of its pairs."""
        # `module.to(dtype)` would drop the imaginary parts.
        converted: Module = module._apply(self._convert)
        return converted

    def convert_input(self, data: object) -> Tree:
        """Return the batch with its floating tensors in this type, complex ones in that of its pairs."""
        return apply_to_collection(data, Tensor, self._convert)

    def convert_output(self, data: object) -> Tree:
        """Return the output with its floating tensors in torch's default type."""
        return convert_floats(data, torch.get_default_dtype())

    def tensor_init_context(self) -> AbstractContextManager[None]:
        """Return a context in which new floating tensors have this type."""
        return default_dtype(self.dtype)

    def module_init_context(self) -> AbstractContextManager[None]:
        """Return a context in which new modules have this type."""
        return default_dtype(self.dtype)

    def forward_context(self) -> AbstractContextManager[None]:
        """Return a context in which tensors made during the forward pass have this type."""
        return default_dtype(self.dtype)


class HalfPrecision(TruePrecision):
    """Weights, inputs and computation in 16 bits: half the memory, for models that bear it.

    Args:
        precision: ``"bf16-true"`` or ``"16-true"``.

    Raises:
        ValueError: Another value of ``precision``.

    Example:
        >>> HalfPrecision("bf16-true").convert_module(torch.nn.Linear(2, 2)).weight.dtype
        torch.bfloat16
    """

    def __init__(self, precision: str = "16-true") -> None:
        dtypes = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
        if precision not in dtypes:
            raise MisconfigurationException(
                f"precision must be '16-true' or 'bf16-true' for HalfPrecision, received {precision!r}."
            )
        super().__init__(precision, dtypes[precision])


class DoublePrecision(TruePrecision):
    """Weights, inputs and computation in 64 bits.

    Example:
        >>> DoublePrecision().convert_input(torch.zeros(1)).dtype
        torch.float64
    """

    def __init__(self) -> None:
        super().__init__("64-true", torch.float64)


def convert_floats(data: object, dtype: torch.dtype) -> Tree:
    """Return ``data`` with every floating tensor in it converted to ``dtype``."""

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if torch.is_floating_point(tensor) else tensor

    return apply_to_collection(data, Tensor, convert)
