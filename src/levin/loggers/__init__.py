"""Where metrics and hyper-parameters go: files, TensorBoard, and services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.loggers.comet import CometLogger as CometLogger
    from levin.loggers.csv_logs import CSVLogger as CSVLogger
    from levin.loggers.litlogger import LitLogger as LitLogger
    from levin.loggers.logger import DummyLogger as DummyLogger
    from levin.loggers.logger import Logger as Logger
    from levin.loggers.logger import rank_zero_experiment as rank_zero_experiment
    from levin.loggers.mlflow import MLFlowLogger as MLFlowLogger
    from levin.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from levin.loggers.trackio import TrackioLogger as TrackioLogger
    from levin.loggers.wandb import WandbLogger as WandbLogger

_HOMES = {
    "levin.loggers.comet": "CometLogger",
    "levin.loggers.csv_logs": "CSVLogger",
    "levin.loggers.litlogger": "LitLogger",
    "levin.loggers.logger": "DummyLogger Logger rank_zero_experiment",
    "levin.loggers.mlflow": "MLFlowLogger",
    "levin.loggers.tensorboard": "TensorBoardLogger",
    "levin.loggers.trackio": "TrackioLogger",
    "levin.loggers.wandb": "WandbLogger",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
