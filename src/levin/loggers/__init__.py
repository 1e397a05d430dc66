"""Where metrics and hyper-parameters go: files and TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.loggers.csv_logs import CSVLogger
    from levin.loggers.logger import DummyLogger, Logger, rank_zero_experiment
    from levin.loggers.tensorboard import TensorBoardLogger

_HOMES = {
    "CSVLogger": "levin.loggers.csv_logs",
    "DummyLogger": "levin.loggers.logger",
    "Logger": "levin.loggers.logger",
    "TensorBoardLogger": "levin.loggers.tensorboard",
    "rank_zero_experiment": "levin.loggers.logger",
}

__all__ = [
    "CSVLogger",
    "DummyLogger",
    "Logger",
    "TensorBoardLogger",
    "rank_zero_experiment",
]


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
