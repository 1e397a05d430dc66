"""Matrix products in 8-bit floats, by torchao."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Linear, Module

from levin.precision.precision import Precision
from levin.precision.true import convert_floats
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.packages import require_package

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
# torch's products of 8-bit floats want dimensions that are multiples of this.
_MULTIPLE = 16
_FIRST_CAPABILITY = (8, 9)


class Float8Precision(Precision):
    """Linear layers multiply in 8-bit floats, everything else is as in ``"bf16-mixed"``; weights stay in single precision.

    Linear layers are replaced in the module, in place, where both dimensions are multiples of 16. Checkpoints have the
    names of the layers that were there.

    Source: https://github.com/pytorch/ao/tree/main/torchao/float8

    Args:
        recipe: How numbers are scaled: ``"tensorwise"`` (fastest), ``"rowwise"``, ``"rowwise_with_gw_hp"`` (most precise), or
            a ``torchao.float8.Float8LinearConfig``.
        device: Type of the device; ``"cuda"`` where there is one, else ``"cpu"``, when None.
        module_filter_fn: ``(layer, name) -> bool``, which linear layers are replaced; by default those with fitting
            dimensions.
        emulate: Whether products are computed in higher precision of rounded numbers, for devices without 8-bit floats.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: The recipe is unknown, or the GPU has no 8-bit floats.

    Example:
        >>> Float8Precision("rowwise").recipe  # doctest: +SKIP
        'rowwise'
    """

    precision = "float8"

    def __init__(
        self,
        recipe: Any = "tensorwise",
        device: str | None = None,
        module_filter_fn: Callable[[Module, str], bool] | None = None,
        emulate: bool = False,
    ) -> None:
        require_package("torchao", "precision='float8'", "Use precision='bf16-mixed'.")
        if isinstance(recipe, str) and recipe not in RECIPES:
            raise MisconfigurationException(
                f"recipe must be one of {', '.join(map(repr, RECIPES))} or a Float8LinearConfig, received {recipe!r}. "
                "Use 'tensorwise'."
            )
        self.recipe = recipe
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.emulate = emulate
        self._module_filter_fn = module_filter_fn
        if self.device == "cuda" and not emulate and torch.cuda.get_device_capability() < _FIRST_CAPABILITY:
            raise MisconfigurationException(
                f"precision='float8' needs a GPU of compute capability 8.9 or more (Ada, Hopper), received "
                f"{torch.cuda.get_device_name()}. Use precision='bf16-mixed', or Float8Precision(emulate=True) to try it out."
            )

    def convert_module(self, module: Module) -> Module:
        """Return ``module`` with its linear layers replaced, in place.

        Raises:
            ValueError: There is none that can be.
        """
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear

        config = Float8LinearConfig.from_recipe_name(self.recipe) if isinstance(self.recipe, str) else self.recipe
        if self.emulate:
            config = replace(config, emulate=True)

        def is_chosen(layer: Module, name: str) -> bool:
            if isinstance(layer, Float8Linear):
                return False  # of the run before
            return has_fitting_dims(layer) if self._module_filter_fn is None else self._module_filter_fn(layer, name)

        convert_to_float8_training(module, config=config, module_filter_fn=is_chosen)
        if not any(isinstance(layer, Float8Linear) for layer in module.modules()):
            raise MisconfigurationException(
                f"precision='float8' found no linear layer in {type(module).__name__} that it could replace: both dimensions "
                f"must be multiples of {_MULTIPLE}. Use precision='bf16-mixed', or change module_filter_fn."
            )
        return module

    def convert_output(self, data: Any) -> Any:
        """Return the output with its floating tensors in torch's default type."""
        return convert_floats(data, torch.get_default_dtype())

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return torch's autocast to bfloat16, in which all other layers compute."""
        return torch.autocast(self.device, dtype=torch.bfloat16, cache_enabled=False)


def has_fitting_dims(layer: Module) -> bool:
    """Return whether a linear layer can be multiplied in 8-bit floats.

    Example:
        >>> has_fitting_dims(Linear(32, 16)), has_fitting_dims(Linear(32, 10))
        (True, False)
    """
    return isinstance(layer, Linear) and layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0
