"""Where the time of a run goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.profilers.advanced import AdvancedProfiler as AdvancedProfiler
    from levin.profilers.profiler import PassThroughProfiler as PassThroughProfiler
    from levin.profilers.profiler import Profiler as Profiler
    from levin.profilers.pytorch import PyTorchProfiler as PyTorchProfiler
    from levin.profilers.simple import SimpleProfiler as SimpleProfiler
    from levin.profilers.xla import XLAProfiler as XLAProfiler

_HOMES = {
    "levin.profilers.advanced": "AdvancedProfiler",
    "levin.profilers.profiler": "PassThroughProfiler Profiler",
    "levin.profilers.pytorch": "PyTorchProfiler",
    "levin.profilers.simple": "SimpleProfiler",
    "levin.profilers.xla": "XLAProfiler",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
