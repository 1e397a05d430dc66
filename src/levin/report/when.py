"""Whether a fit gets a page; apart from what writes it, which most programs never load."""

from __future__ import annotations

from levin.loops.run import Run

LONG_SAMPLES = 100
"""From how many samples on a fit without a progress bar leaves a page: 10 seconds."""


def is_worth_a_report(run: Run) -> bool:
    """Whether somebody watches the run, or it took a while: hundreds of short fits in a search or in tests leave no pages."""
    shares = run.time_shares
    is_watched = any(
        getattr(callback, "is_enabled", False) for callback in run.callbacks if hasattr(callback, "get_metrics")
    )
    return shares is not None and (is_watched or shares.num_samples >= LONG_SAMPLES)
