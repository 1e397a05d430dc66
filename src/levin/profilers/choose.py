"""Which profiler ``Trainer(profiler=...)`` means."""

from __future__ import annotations

from typing import Any

from levin import profilers
from levin.profilers.profiler import PassThroughProfiler, Profiler
from levin.utilities.exceptions import did_you_mean, require_instance, value_error


def resolve_profiler(profiler: Any) -> Profiler:
    """Return the profiler for ``Trainer(profiler=...)``: None, a name or a Profiler.

    Raises:
        MisconfigurationException: An unknown name, or a class.
    """
    if profiler is None:
        return PassThroughProfiler()
    require_instance("profiler", profiler)
    if not isinstance(profiler, str):
        if not hasattr(profiler, "profile"):
            raise value_error("profiler", profiler, "must be a name, a Profiler or None")
        given: Profiler = profiler
        return given
    names = {
        "simple": "SimpleProfiler",
        "advanced": "AdvancedProfiler",
        "pytorch": "PyTorchProfiler",
        "xla": "XLAProfiler",
    }
    if profiler.lower() not in names:
        raise value_error(
            "profiler",
            profiler,
            f"must be one of {', '.join(names)}, a Profiler or None",
            did_you_mean(profiler, names).strip(),
        )
    chosen: Profiler = getattr(profilers, names[profiler.lower()])()
    return chosen
