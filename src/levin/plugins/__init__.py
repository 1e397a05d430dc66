"""What ``Trainer(plugins=...)`` takes, in one place."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.checkpoint.background import AsyncCheckpointIO as AsyncCheckpointIO
    from levin.checkpoint.io import CheckpointIO as CheckpointIO
    from levin.checkpoint.io import TorchCheckpointIO as TorchCheckpointIO
    from levin.environments import ClusterEnvironment as ClusterEnvironment
    from levin.precision import DoublePrecision as DoublePrecision
    from levin.precision import HalfPrecision as HalfPrecision
    from levin.precision import MixedPrecision as MixedPrecision
    from levin.precision import Precision as Precision
    from levin.strategies.layer_sync import LayerSync as LayerSync
    from levin.strategies.layer_sync import TorchSyncBatchNorm as TorchSyncBatchNorm

_MODULE_OF = {
    "AsyncCheckpointIO": "levin.checkpoint.background",
    "CheckpointIO": "levin.checkpoint.io",
    "ClusterEnvironment": "levin.environments",
    "DoublePrecision": "levin.precision",
    "HalfPrecision": "levin.precision",
    "LayerSync": "levin.strategies.layer_sync",
    "MixedPrecision": "levin.precision",
    "Precision": "levin.precision",
    "TorchCheckpointIO": "levin.checkpoint.io",
    "TorchSyncBatchNorm": "levin.strategies.layer_sync",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
