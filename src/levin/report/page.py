"""The page: the data of runs, thinned to what can be seen, in one file with all that draws it."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from levin.report.read import LoggedRun, Series
from levin.utilities.filesystem import replace_text

MAX_POINTS, MIN_POINTS, MAX_NUMBERS = 1000, 40, 150_000
"""Points of a curve at most and at least, and of all curves together about at most."""
_NOT_DRAWN = ("epoch", "hp_metric")
_HERE = Path(__file__).parent


def make_page(runs: Sequence[LoggedRun], title: str) -> str:
    """Return the page of one or several runs.

    Args:
        runs: As :func:`levin.report.read.read_run` reads them.
        title: Head of the page.
    """
    names = short_names([run.path for run in runs])
    num_curves = sum(len(run.series) for run in runs)
    limit = max(MIN_POINTS, min(MAX_POINTS, MAX_NUMBERS // max(1, num_curves)))
    data = [_plain(run, name, limit) for run, name in zip(runs, names)]
    records = [record for run in runs for record in run.records] if len(runs) == 1 else []
    parts = {
        "title": html.escape(title),
        "style": _file("uplot/uPlot.min.css") + _file("page.css"),
        "runs": _json(data),
        "records": _json(records),
        "uplot": f"/*{_file('uplot/LICENSE')}*/\n{_file('uplot/uPlot.iife.min.js')}",
        "script": _file("page.js"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _file("page.html"))


def write_page(path: Path, text: str) -> None:
    """Write a page, whole or not at all."""
    replace_text(path, text)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return names for folders: what is not the same at the beginning of all of them.

    Example:
        >>> short_names([Path("/logs/a/version_0"), Path("/logs/b/version_0")])
        ['a/version_0', 'b/version_0']
        >>> short_names([Path("/logs/a/version_0")])
        ['a/version_0']
    """
    parts = [path.absolute().parts for path in paths]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    common = 0
    while all(len(each) > common + 1 for each in parts) and len({each[common] for each in parts}) == 1:
        common += 1
    return ["/".join(each[common:]) for each in parts]


def _plain(run: LoggedRun, name: str, limit: int) -> dict[str, object]:
    epochs = run.series.get("epoch")
    series = run.series.items()
    return {
        "name": name,
        "path": str(run.path),
        "hparams": run.hparams,
        "records": run.records,
        "epochs": [] if epochs is None else _epoch_starts(epochs),
        "series": {metric: _curve(each, limit) for metric, each in sorted(series) if metric not in _NOT_DRAWN},
    }


def _curve(series: Series, limit: int) -> dict[str, object]:
    order = sorted(range(len(series.steps)), key=series.steps.__getitem__)
    steps = [series.steps[index] for index in order]
    values = [value if math.isfinite(value := series.values[index]) else None for index in order]
    kept = thinned([series.values[index] for index in order], limit)
    finite = [value for value in values if value is not None]
    curve: dict[str, object] = {
        "x": [steps[index] for index in kept],
        "y": [values[index] for index in kept],
        "n": len(values),
        "bad": [step for step, value in zip(steps, values) if value is None][:100],
        "last": values[-1] if values else None,
        "min": min(finite, default=None),
        "max": max(finite, default=None),
    }
    # Two loggers of one folder may have written it, one of which knows no times.
    if len(series.times) == len(series.steps):
        curve["t"] = [series.times[order[index]] for index in kept]
    return curve


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """Return the indices of at most about ``limit`` values that look the same in a plot: of each group least and largest.

    Example:
        >>> thinned([0, 5, 1, 2, 9, 3, 4, 4], 4)
        [0, 1, 4, 5, 7]
    """
    if len(values) <= limit:
        return list(range(len(values)))
    size = math.ceil(2 * len(values) / limit)
    kept = {0, len(values) - 1}
    for start in range(0, len(values), size):
        group = range(start, min(start + size, len(values)))
        finite = [index for index in group if math.isfinite(values[index])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        kept.update(itertools.islice((index for index in group if not math.isfinite(values[index])), 1))
    return sorted(kept)


def _epoch_starts(epochs: Series) -> list[list[float]]:
    """Return pairs of an epoch and the first step that was logged in it."""
    pairs = sorted(zip(epochs.steps, epochs.values))
    starts = [[value, step] for step, value in pairs[:1]]
    starts += [
        [after, step]
        for (_, before), (step, after) in itertools.pairwise(pairs)
        if after > before and math.isfinite(after)
    ]
    return starts if len(starts) <= 2000 else starts[:: len(starts) // 1000]


def _file(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _json(value: object) -> str:
    """JSON that may stand in a script element, whatever names are in it."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _finite(value: object) -> object:
    if isinstance(value, float):
        rounded: Optional[float] = float(f"{value:.7g}") if abs(value) < 1e6 else value
        return rounded if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
