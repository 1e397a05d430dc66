"""What a LightningModule finds as its Trainer when it runs under Fabric."""

from __future__ import annotations

from typing import Any


class TrainerShim:
    """The attributes that a Trainer and Fabric have in common, and the module's optimizers.

    Args:
        fabric: The Fabric that the module was set up with.
        module: The LightningModule.
    """

    gradient_clip_val: None = None
    gradient_clip_algorithm: None = None

    def __init__(self, fabric: Any, module: Any) -> None:
        self._fabric = fabric
        self._module = module

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers that the module was set up with."""
        return list(self._module._fabric_optimizers or ())

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(self._fabric, name):
            return getattr(self._fabric, name)
        raise AttributeError(
            f"self.trainer has no {name!r} under Fabric, where the loop is your own. Use Trainer, or leave it out."
        )
