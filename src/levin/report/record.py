"""What ran: the part of a report that no logger keeps, taken from a run when its fit ends."""

from __future__ import annotations

import functools
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from typing import Optional

import torch

from levin.loops.run import Run
from levin.loops.time_shares import Point
from levin.settings import DEFAULTS
from levin.utilities.packages import versions_of


def record_of(run: Run, error: Optional[BaseException]) -> dict[str, object]:
    """Return what ran as plain values.

    Args:
        run: Whose fit has ended.
        error: What ended it; None where it came to its end.
    """
    # After an interruption the program is left by way of SystemExit.
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        error = error.__context__
    shares = run.time_shares
    points: list[Point] = [] if shares is None else shares.points
    last = Point(time.time(), run.global_step, run.current_epoch, 0.0, math.nan)
    first = points[0] if points else last
    strategy = run.strategy
    weights = sum(parameter.numel() for parameter in run.module.parameters())
    return {
        "what": {
            "module": _qualname(run.module),
            "data": _data(run),
            "parameters": f"{weights:,}",
            "command": shlex.join([os.path.basename(sys.executable), *sys.orig_argv[1:]]),
            "folder": os.getcwd(),
            "git": _git_revision(os.getcwd()) or "-",
            "host": platform.node(),
            "device": _device(strategy.root_device),
            "processes": strategy.world_size,
            "strategy": type(strategy).__name__,
            "precision": str(strategy.precision.precision),
            "callbacks": ", ".join(type(callback).__name__ for callback in run.callbacks) or "-",
        },
        "settings": dict(_settings(run)),
        "versions": dict(_versions()),
        "started": first.time_s,
        "ended": last.time_s,
        "steps": [first.step, last.step],
        "epochs": [first.epoch, last.epoch],
        "resumed_from": None if run.ckpt_path is None else str(run.ckpt_path),
        "ended_by": "" if error is None else f"{type(error).__name__}: {error}".strip(": ")[:300],
        "is_signal": error is not None
        and type(error).__name__ in ("SIGTERMException", "KeyboardInterrupt", "SystemExit"),
        "bad_steps": sorted({step for callback in run.callbacks for step in _bad_steps(callback)}),
        "best": list(_best(run)),
        "shares": {} if shares is None else {part: shares.share(part) for part in shares.counts},
        "points": [[point.time_s, point.step, point.epoch, point.data_share, point.memory] for point in points],
    }


def _qualname(thing: object) -> str:
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def _data(run: Run) -> str:
    if run.datamodule is not None:
        return _qualname(run.datamodule)
    combined = run.loaders.train.combined
    words = []
    for loader in [] if combined is None else combined.flattened:
        dataset = getattr(loader, "dataset", loader)
        size = f" of {len(dataset):,}" if hasattr(dataset, "__len__") else ""
        words.append(f"{type(dataset).__name__}{size}, batch size {getattr(loader, 'batch_size', '?')}")
    return "; ".join(words) or "-"


def _settings(run: Run) -> Iterator[tuple[str, object]]:
    """The settings that are not the default ones."""
    given = dict.fromkeys((name for name in vars(run.settings) if name.startswith("limit_")), 1.0)
    given |= {"accumulate_grad_batches": 1, "max_steps": -1, "check_val_every_n_epoch": 1, "val_check_interval": 1.0}
    given |= {"inference_mode": True, "enable_autolog_hparams": True}
    for field in fields(run.settings):
        name, value = field.name, getattr(run.settings, field.name)
        default = DEFAULTS.get(name, given.get(name))
        if name in ("logger", "default_root_dir", "use_distributed_sampler") or value == default or value is None:
            continue
        if isinstance(value, (bool, int, float, str)) and value is not False and value != 0:
            yield name, value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _versions() -> Iterator[tuple[str, str]]:
    from levin import __version__

    yield "levin", __version__
    yield "python", platform.python_version()
    yield from versions_of(["torch", "torchmetrics", "numpy"])


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.cache
def _git_revision(folder: str) -> Optional[str]:
    """Return the revision of the working tree, with ``+`` where files were changed; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=5,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _bad_steps(callback: object) -> Iterator[int]:
    """The steps that BadStepGuard left out and kept, by the names of its files."""
    for path in getattr(callback, "paths", None) or [] if hasattr(callback, "num_bad_steps") else []:
        if found := re.search(r"step=(\d+)", os.path.basename(str(path))):
            yield int(found[1])


def _best(run: Run) -> Iterator[list[object]]:
    """Of each callback that ranks files: path, monitored name and score of those it keeps, best first."""
    for callback in run.checkpoint_callbacks:
        monitor, mode = getattr(callback, "monitor", None), getattr(callback, "mode", "min")
        kept = {str(path): float(score) for path, score in (getattr(callback, "best_k_models", None) or {}).items()}
        for path in sorted(kept, key=lambda path: kept[path], reverse=mode == "max"):
            yield [path, monitor, kept[path]]
        best = getattr(callback, "best_model_path", "")
        if best and best not in kept:
            yield [str(best), monitor, None]
