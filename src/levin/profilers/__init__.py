"""Where the time of a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.profilers.advanced import AdvancedProfiler
    from levin.profilers.profiler import PassThroughProfiler, Profiler
    from levin.profilers.pytorch import PyTorchProfiler
    from levin.profilers.simple import SimpleProfiler
    from levin.profilers.xla import XLAProfiler

_HOMES = {
    "AdvancedProfiler": "levin.profilers.advanced",
    "PassThroughProfiler": "levin.profilers.profiler",
    "Profiler": "levin.profilers.profiler",
    "PyTorchProfiler": "levin.profilers.pytorch",
    "SimpleProfiler": "levin.profilers.simple",
    "XLAProfiler": "levin.profilers.xla",
}

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "XLAProfiler",
]


__getattr__, __dir__ = lazy_face(__name__, _HOMES)
