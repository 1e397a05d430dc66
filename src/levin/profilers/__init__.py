"""Where the time of a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from levin.profilers.advanced import AdvancedProfiler
    from levin.profilers.profiler import PassThroughProfiler, Profiler
    from levin.profilers.pytorch import PyTorchProfiler
    from levin.profilers.simple import SimpleProfiler
    from levin.profilers.xla import XLAProfiler

_HOMES = {
    "AdvancedProfiler": "advanced",
    "PassThroughProfiler": "profiler",
    "Profiler": "profiler",
    "PyTorchProfiler": "pytorch",
    "SimpleProfiler": "simple",
    "XLAProfiler": "xla",
}

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "XLAProfiler",
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
