"""Where metrics and hyper-parameters go: files and TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.loggers.csv_logs import CSVLogger
    from levin.loggers.logger import DummyLogger, Logger, rank_zero_experiment
    from levin.loggers.tensorboard import TensorBoardLogger

_HOMES = {
    "CSVLogger": "csv_logs",
    "DummyLogger": "logger",
    "Logger": "logger",
    "TensorBoardLogger": "tensorboard",
    "rank_zero_experiment": "logger",
}

__all__ = [
    "CSVLogger",
    "DummyLogger",
    "Logger",
    "TensorBoardLogger",
    "rank_zero_experiment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
