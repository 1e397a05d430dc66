"""Runs as their loggers left them on the disk: the folders of CSVLogger and TensorBoardLogger, Lightning's too."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import yaml

PAGE = "report.html"
"""Name of the page in the folder of a run; it holds the records of the fits that wrote there."""
_RECORDS = re.compile(r'<script type="application/json" id="records">(.*?)</script>', re.DOTALL)


Record = dict[str, Any]
"""What ran, as plain values: what the page of a run holds besides what loggers keep."""


@dataclass
class Series:
    """The values of one name, in the order in which they were logged."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """Seconds since 1970, where the logger keeps them; else empty."""


@dataclass
class LoggedRun:
    """One run: a folder in which a logger has written.

    Args:
        path: The folder.
        series: Name of a metric -> its values.
        hparams: Hyper-parameters.
        records: What ran, one for each fit; see report/record.py.
    """

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    hparams: dict[str, object] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


def find_runs(path: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of runs at and below ``path``, in the order of their names.

    Raises:
        FileNotFoundError: There is nothing at ``path``, or no run in it.
    """
    root = Path(path)
    if root.is_file() and _is_run(root.parent):
        return [root.parent]
    if not root.is_dir():
        raise FileNotFoundError(f"{str(path)!r} is no folder of a run. Pass the folder in which a logger wrote.")
    found = sorted((folder for folder in {root, *_folders(root)} if _is_run(folder)), key=_natural)
    if not found:
        raise FileNotFoundError(f"{str(path)!r} holds no run: no metrics.csv and no TensorBoard event file.")
    return found


def read_run(path: Path) -> LoggedRun:
    """Return what the loggers wrote into a folder."""
    run = LoggedRun(path)
    if (path / "metrics.csv").is_file():
        _read_csv(path / "metrics.csv", run)
    for file in sorted(path.glob("events.out.tfevents.*")):
        _read_events(file, run)
    run.hparams = dict(_read_hparams(path / "hparams.yaml"))
    run.records = read_records(path / PAGE)
    return run


def read_records(page: Path) -> list[Record]:
    """Return the records that an earlier page holds; none where it cannot be read."""
    try:
        found = _RECORDS.search(page.read_text(encoding="utf-8"))
        records = json.loads(found[1]) if found else []
    except (OSError, ValueError):
        return []
    return [record for record in records if isinstance(record, dict)]


def _folders(root: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(root):
        names[:] = [name for name in names if name not in ("checkpoints", "__pycache__") and not name.startswith(".")]
        yield from (Path(folder, name) for name in names)


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.csv").is_file() or any(folder.glob("events.out.tfevents.*"))


def _natural(path: Path) -> list[object]:
    return [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", str(path))]


def _read_csv(path: Path, run: LoggedRun) -> None:
    with path.open(encoding="utf-8", newline="", errors="replace") as file:
        for number, row in enumerate(csv.DictReader(file)):
            step = _number(row.get("step"))
            for name, cell in row.items():
                value = _number(cell)
                if name and name != "step" and value is not None:
                    series = run.series.setdefault(name, Series())
                    series.steps.append(number if step is None else step)
                    series.values.append(value)


def _number(cell: Any) -> Optional[float]:
    try:
        return None if cell in (None, "") else float(cell)
    except (TypeError, ValueError):
        return None


def _read_events(path: Path, run: LoggedRun) -> None:
    """Add the scalars of an event file, as far as it is whole.

    Raises:
        ModuleNotFoundError: ``tensorboard`` is not installed.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.util import tensor_util
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} is read with `tensorboard`, which is not installed. Install it.") from error
    for raw in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(raw)
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            if kind == "simple_value":
                number = float(value.simple_value)
            elif kind == "tensor" and value.metadata.plugin_data.plugin_name in ("scalars", ""):
                array = tensor_util.make_ndarray(value.tensor)
                if array.size != 1 or array.dtype.kind not in "fiu":
                    continue
                number = float(array.reshape(-1)[0])
            else:
                continue
            series = run.series.setdefault(value.tag, Series())
            series.steps.append(float(event.step))
            series.values.append(number)
            series.times.append(float(event.wall_time))


class _Loader(yaml.SafeLoader):
    """Reads objects as text: nothing in a file is run."""


_Loader.add_multi_constructor("", lambda loader, suffix, node: _text(loader, suffix, node))


def _text(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> object:
    name = suffix.rpartition(":")[2]
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True) or name
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node) or name  # type: ignore[arg-type]  # a scalar is left


def _read_hparams(path: Path) -> Iterator[tuple[str, object]]:
    """The hyper-parameters as names with dots and plain values."""
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, yaml.YAMLError, ValueError):
        return
    yield from _flat(loaded if isinstance(loaded, Mapping) else {}, "")


def _flat(values: Mapping[object, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        is_plain = isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if is_plain else str(value)
