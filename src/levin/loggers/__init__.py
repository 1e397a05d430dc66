"""Where metrics and hyper-parameters go: files, TensorBoard, and services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.loggers.comet import CometLogger
    from levin.loggers.csv_logs import CSVLogger
    from levin.loggers.logger import DummyLogger, Logger, rank_zero_experiment
    from levin.loggers.mlflow import MLFlowLogger
    from levin.loggers.tensorboard import TensorBoardLogger
    from levin.loggers.trackio import TrackioLogger
    from levin.loggers.wandb import WandbLogger

_HOMES = {
    "CometLogger": "levin.loggers.comet",
    "CSVLogger": "levin.loggers.csv_logs",
    "DummyLogger": "levin.loggers.logger",
    "Logger": "levin.loggers.logger",
    "MLFlowLogger": "levin.loggers.mlflow",
    "TensorBoardLogger": "levin.loggers.tensorboard",
    "TrackioLogger": "levin.loggers.trackio",
    "WandbLogger": "levin.loggers.wandb",
    "rank_zero_experiment": "levin.loggers.logger",
}

__all__ = [
    "CometLogger",
    "CSVLogger",
    "DummyLogger",
    "Logger",
    "MLFlowLogger",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "rank_zero_experiment",
]


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
