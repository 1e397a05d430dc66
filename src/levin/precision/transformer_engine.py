"""Layers in 8-bit floats, by NVIDIA's Transformer Engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn import LayerNorm, Linear, Module

from levin.precision.precision import default_dtype
from levin.precision.true import TruePrecision
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_info


class TransformerEnginePrecision(TruePrecision):
    """Linear layers and layer norms of Transformer Engine, in 8-bit floats on Hopper, Ada and newer GPUs.

    Source: https://docs.nvidia.com/deeplearning/transformer-engine/

    Args:
        weights_dtype: Format of the weights: ``torch.bfloat16`` or ``torch.float16``.
        recipe: A ``transformer_engine.common.recipe.DelayedScaling``, or a dict of its arguments; the default when None.
        replace_layers: Whether ``Linear`` and ``LayerNorm`` are replaced; when None, unless the module has layers of
            Transformer Engine.
        fallback_compute_dtype: Format of all other operations; ``weights_dtype`` when None.

    Raises:
        ModuleNotFoundError: transformer_engine is not installed.
        RuntimeError: There is no GPU.
        ValueError: ``weights_dtype`` has not 16 bits.

    Example:
        >>> TransformerEnginePrecision(weights_dtype=torch.bfloat16)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        weights_dtype: torch.dtype,
        recipe: Mapping[str, Any] | Any | None = None,
        replace_layers: bool | None = None,
        fallback_compute_dtype: torch.dtype | None = None,
    ) -> None:
        if weights_dtype not in (torch.bfloat16, torch.float16):
            raise MisconfigurationException(
                f"weights_dtype must be torch.bfloat16 or torch.float16, received {weights_dtype!r}. Use torch.bfloat16."
            )
        require_package(
            "transformer_engine", "precision='transformer-engine'", "Use precision='float8' or 'bf16-mixed'."
        )
        if not torch.cuda.is_available():
            raise RuntimeError(
                "precision='transformer-engine' needs an NVIDIA GPU of the Hopper or Ada generation or newer, and there is "
                "none. Use precision='bf16-true'."
            )
        name = "transformer-engine" if weights_dtype == torch.bfloat16 else "transformer-engine-float16"
        super().__init__(name, weights_dtype)
        self.weights_dtype = weights_dtype
        self.replace_layers = replace_layers
        self.fallback_compute_dtype = fallback_compute_dtype or weights_dtype
        self.recipe = _recipe(recipe)

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its layers replaced, in place, and its weights in 16 bits."""
        if self.replace_layers is not False:
            if not _has_layers_of_the_package(module):
                replace_layers(module)
            elif self.replace_layers:
                rank_zero_info("The module has layers of Transformer Engine already: none is replaced.")
        return super().convert_module(module)

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Compute in 8-bit floats where layers can, in 16 bits elsewhere."""
        import transformer_engine.pytorch as te

        with ExitStack() as stack:
            stack.enter_context(default_dtype(self.weights_dtype))
            stack.enter_context(torch.autocast("cuda", dtype=self.fallback_compute_dtype))
            stack.enter_context(te.fp8_autocast(enabled=True, fp8_recipe=self.recipe))
            yield


def replace_layers(module: Module) -> None:
    """Replace the linear layers and layer norms of a module whose dimensions Transformer Engine can take, in place."""
    import transformer_engine.pytorch as te

    for name, child in list(module.named_children()):
        if isinstance(child, Linear) and child.in_features % 16 == 0 and child.out_features % 8 == 0:
            has_bias = child.bias is not None
            new = te.Linear(child.in_features, child.out_features, bias=has_bias, params_dtype=child.weight.dtype)
        elif isinstance(child, LayerNorm) and len(child.normalized_shape) == 1 and child.bias is not None:
            new = te.LayerNorm(child.normalized_shape[0], eps=child.eps)
        else:
            replace_layers(child)
            continue
        for key, tensor in child.named_parameters(recurse=False):
            replacement = getattr(new, key)
            replacement.data = tensor.data.to(replacement.device)
            replacement.requires_grad_(tensor.requires_grad)
        setattr(module, name, new)


def _has_layers_of_the_package(module: Module) -> bool:
    return any(type(part).__module__.startswith("transformer_engine.") for part in module.modules())


def _recipe(recipe: Any) -> Any:
    from transformer_engine.common.recipe import DelayedScaling, Format

    if not isinstance(recipe, Mapping):
        return DelayedScaling() if recipe is None else recipe
    arguments = dict(recipe)
    if isinstance(arguments.get("fp8_format"), str):
        arguments["fp8_format"] = getattr(Format, arguments["fp8_format"])
    return DelayedScaling(**arguments)
