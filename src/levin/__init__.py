"""levin: a training framework for PyTorch.

Write a LightningModule (what to compute) and perhaps a LightningDataModule (on what); a Trainer does the rest.
Everything here is imported when it is first used, so that ``import levin`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.datamodule import LightningDataModule as LightningDataModule
    from levin.fabric import Fabric as Fabric
    from levin.hooks import Callback as Callback
    from levin.module import LightningModule as LightningModule
    from levin.trainer import Trainer as Trainer
    from levin.utilities.seed import seed_everything as seed_everything

__version__ = "0.1.0"

_HOMES = {
    "levin.datamodule": "LightningDataModule",
    "levin.fabric": "Fabric fabric",
    "levin.hooks": "Callback",
    "levin.module": "LightningModule",
    "levin.trainer": "Trainer",
    "levin.utilities.seed": "seed_everything",
}
_ROOMS = (
    "accelerators",
    "callbacks",
    "checkpoint",
    "cli",
    "compat",
    "data",
    "demos",
    "environments",
    "fabric",
    "launchers",
    "loggers",
    "precision",
    "profilers",
    "strategies",
    "tuner",
)

__all__ = [
    "Callback",
    "Fabric",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
    "__version__",
    "seed_everything",
]


__getattr__, __dir__ = lazy_face(__name__, {**{f"levin.{room}": room for room in _ROOMS}, **_HOMES})
