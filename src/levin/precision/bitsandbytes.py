"""Weights of linear layers in 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch.nn import Linear, Module

from levin.precision.true import TruePrecision
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.packages import require_package

_FOUR_BITS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4-dq": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "fp4-dq": {"quant_type": "fp4", "compress_statistics": True},
}
_EIGHT_BITS = {"int8": {"has_fp16_weights": False}, "int8-training": {"has_fp16_weights": True}}
MODES = (*_FOUR_BITS, *_EIGHT_BITS)


class BitsandbytesPrecision(TruePrecision):
    """Linear layers keep their weights in 4 or 8 bits, everything else is in 16; for inference, and adapters to learn.

    Linear layers are replaced in the module, in place. Quantized weights do not learn, but in ``"int8-training"``.

    Source: https://huggingface.co/docs/bitsandbytes

    Args:
        mode: ``"nf4"``, ``"fp4"``, the same with ``"-dq"`` (scales are quantized, too), ``"int8"`` or ``"int8-training"``.
        dtype: Of everything else and of the products; bfloat16 when None.
        ignore_modules: Names of submodules whose layers stay, for example ``{"head"}``.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        ValueError: The mode is unknown.
        RuntimeError: ``"int8-training"`` without a GPU; the others run on the CPU as well, where ``in_features`` must be a
            multiple of 64 for 4 bits.

    Example:
        >>> BitsandbytesPrecision("nf4").mode  # doctest: +SKIP
        'nf4'
    """

    def __init__(
        self, mode: str, dtype: torch.dtype | None = None, ignore_modules: Iterable[str] | None = None
    ) -> None:
        require_package("bitsandbytes", "BitsandbytesPrecision", "Use precision='bf16-true'.")
        if mode not in MODES:
            raise MisconfigurationException(
                f"mode must be one of {', '.join(map(repr, MODES))}, received {mode!r}. Use 'nf4'."
            )
        if mode == "int8-training" and not torch.cuda.is_available():
            raise RuntimeError(
                "BitsandbytesPrecision('int8-training') needs a CUDA GPU, and there is none. Use 'int8', whose weights do not "
                "learn, or precision='bf16-true'."
            )
        super().__init__("bitsandbytes", dtype or torch.bfloat16)
        self.mode = mode
        self.ignore_modules = frozenset(ignore_modules or ())

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its linear layers replaced, in place, and the rest in 16 bits.

        Raises:
            TypeError: There is no linear layer to replace.
        """
        import bitsandbytes

        make: Any = (
            partial(bitsandbytes.nn.Linear4bit, compute_dtype=self.dtype, **_FOUR_BITS[self.mode])
            if self.mode in _FOUR_BITS
            else partial(bitsandbytes.nn.Linear8bitLt, **_EIGHT_BITS[self.mode])
        )
        kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
        for name, part in list(module.named_modules()):
            for child_name, child in list(part.named_children()):
                full_name = f"{name}.{child_name}".lstrip(".")
                if type(child) is Linear and not self._is_ignored(full_name):
                    setattr(part, child_name, _replaced(child, make, self.dtype))
        if not any(isinstance(part, kinds) for part in module.modules()):
            raise TypeError(
                f"BitsandbytesPrecision found no linear layer to replace in {type(module).__name__}. Use "
                "precision='bf16-true', or name fewer layers in ignore_modules."
            )
        quantized = {id(tensor) for part in module.modules() if isinstance(part, kinds) for tensor in part.parameters()}
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and id(tensor) not in quantized:
                tensor.data = tensor.data.to(self.dtype)
        return module

    def _is_ignored(self, name: str) -> bool:
        return any(name == ignored or name.startswith(f"{ignored}.") for ignored in self.ignore_modules)


def _replaced(layer: Linear, make: Any, dtype: torch.dtype) -> Module:
    """Return a layer of bitsandbytes with the weights of ``layer``, which it quantizes when it comes to its device."""
    with torch.device("meta"):
        new: Module = make(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight: Any = new.weight
    settings = {key: value for key, value in vars(weight).items() if not key.startswith("_")}
    new.weight = type(weight)(layer.weight.detach().to(dtype), requires_grad=weight.requires_grad, **settings)
    if layer.bias is not None:
        new.bias = torch.nn.Parameter(layer.bias.detach().to(dtype), requires_grad=layer.bias.requires_grad)
    # Quantized where they are moved; on the CPU by a move to where they are.
    return new.to(layer.weight.device)
