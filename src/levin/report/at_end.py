"""What is written and said when a fit ends: the page of the run, and where things are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from levin.loops.run import Run
from levin.loops.time_shares import TimeShares
from levin.report.record import record_of
from levin.utilities.filesystem import is_local
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn

MIN_SAMPLES = 50
"""How often it must have been looked before anything is said about where the time went: 5 seconds."""
HELD_UP_SHARE = 0.2
"""Part of the time above which something is said to have held training up."""
_WAYS_OUT = {
    "data": "waiting for batches. Give the DataLoader more workers (num_workers, persistent_workers=True)",
    "logging": "logging. Log less often: Trainer(log_every_n_steps=...)",
    "checkpoints": "saving checkpoints. Save in the background: ModelCheckpoint(async_save=True)",
    "validation": "validation. Validate less often, or on less: check_val_every_n_epoch, limit_val_batches",
    "callbacks": "callbacks. Trainer(profiler='simple') says which",
    "moving batches": "moving batches to the device. Let the DataLoader pin its memory (pin_memory=True)",
}
"""Part of the work -> what it is, and the setting that helps."""


def write_report(run: Run, error: Optional[BaseException]) -> Optional[Path]:
    """Write the page of a run beside the files of its first logger that keeps some; None where no logger does."""
    folder = _folder(run)
    if folder is None:
        return None
    # Not before there is a page to write: they would make every `import levin` slower.
    from levin.report.page import make_page, short_names, write_page
    from levin.report.read import PAGE, read_run

    page = folder / PAGE
    try:
        logged = read_run(folder)
        logged.records = [*logged.records, record_of(run, error)]
        write_page(page, make_page([logged], short_names([folder])[0]))
    except Exception as failure:
        # A run that is complete does not fail for its page.
        rank_zero_warn(f"The report {page} could not be written: {type(failure).__name__}: {failure}")
        return None
    return page


def say_where(run: Run, page: Optional[Path]) -> None:
    """Say where best checkpoint, logs and report are, and what held training up."""
    places = [*_best(run)]
    if page is not None:
        places += [f"Logs: {page.parent}", f"Report: {page}"]
    if places:
        rank_zero_info("\n".join(places))
    if held := held_up_by(run.time_shares):
        rank_zero_info(held)


def held_up_by(shares: Optional[TimeShares]) -> Optional[str]:
    """Return a line on what held training up most, with what helps; None where nothing did.

    Args:
        shares: A :class:`levin.loops.time_shares.TimeShares`, or None.
    """
    if shares is None or shares.num_samples < MIN_SAMPLES:
        return None
    part = max(_WAYS_OUT, key=shares.share)
    share = shares.share(part)
    least = HELD_UP_SHARE if part != "validation" else 2 * HELD_UP_SHARE
    return f"{share:.0%} of the time of training went into {_WAYS_OUT[part]}." if share >= least else None


def _best(run: Run) -> Iterator[str]:
    for callback in run.checkpoint_callbacks:
        path, score = getattr(callback, "best_model_path", ""), getattr(callback, "best_model_score", None)
        if path:
            said = f" ({callback.monitor}={float(score):.4g})" if score is not None and callback.monitor else ""
            yield f"Best checkpoint: {path}{said}"


def _folder(run: Run) -> Optional[Path]:
    for logger in run.loggers:
        folder = logger.log_dir
        if folder and is_local(str(folder)) and os.path.isdir(folder):
            names = os.listdir(folder)
            if any(name == "metrics.csv" or name.startswith("events.out.tfevents") for name in names):
                return Path(folder)
    return None
