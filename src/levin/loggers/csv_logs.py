"""Metrics as a table in a CSV file."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from torch import Tensor
from typing_extensions import override

from levin.loggers.append_file import AppendFile
from levin.loggers.folder_logger import FolderLogger
from levin.loggers.logger import rank_zero_experiment
from levin.loggers.utilities import HPARAMS_FILE, add_prefix, to_dict, write_hparams
from levin.utilities.filesystem import (
    ensure_folder,
    exists,
    get_filesystem,
    is_local,
    list_folder,
    open_file,
    replace_text,
)
from levin.utilities.numbers import to_numbers
from levin.utilities.rank_zero import rank_zero_only, rank_zero_warn
from levin.utilities.types import HParams, PathLike, StateDict

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

REMOTE_WRITE_INTERVAL_S = 5.0
"""An object store takes whole files only, so one there is not written anew more often than this."""


class ExperimentWriter:
    r"""Writes ``metrics.csv`` and ``hparams.yaml`` into one directory.

    Rows wait in ``metrics`` until :meth:`save` appends them to the file. The file is written anew only when a row has a
    name that the header lacks.

    Args:
        log_dir: Local path or URL of the directory; it is created.

    Example:
        >>> writer = ExperimentWriter("logs/run")
        >>> writer.log_metrics({"loss": 0.5}, step=1)
        >>> writer.save()
        >>> open("logs/run/metrics.csv").read()
        'loss,step\n0.5,1\n'
    """

    NAME_METRICS_FILE = "metrics.csv"
    NAME_HPARAMS_FILE = HPARAMS_FILE

    def __init__(self, log_dir: str) -> None:
        self.log_dir: str = log_dir
        self.hparams: dict[str, object] = {}
        self.metrics: list[dict[str, Any]] = []
        self.metrics_keys: list[str] = []
        self.metrics_file_path: str = os.path.join(log_dir, self.NAME_METRICS_FILE)
        self.last_logged: Optional[tuple[float, int]] = None
        self._num_rows: int = 0
        self._has_new_hparams: bool = False
        self._is_local: bool = is_local(log_dir)
        self._file: Optional[AppendFile] = None
        self._remote_text: str = ""
        self._remote_written_at: float = float("-inf")
        self._check_log_dir_exists()
        ensure_folder(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Say that files of an earlier run go; subclasses whose :attr:`metrics_keys` keep them override it."""
        if list_folder(self.log_dir):
            rank_zero_warn(
                f"Experiment logs directory {self.log_dir} exists and is not empty."
                " Previous log files in this directory will be deleted when the new ones are saved, but for the rows of the"
                " steps before the one that a run goes on from.",
                stacklevel=5,
            )

    @property
    def _fs(self) -> AbstractFileSystem:
        """The file system, for subclasses that look at the table of an earlier run (stable-pretraining)."""
        return get_filesystem(self.log_dir)

    def log_hparams(self, params: Mapping[str, object]) -> None:
        """Add hyper-parameters to those that the next :meth:`save` writes."""
        self.hparams.update(params)
        self._has_new_hparams = True

    def log_metrics(self, metrics_dict: Mapping[str, object], step: Optional[int] = None) -> None:
        """Add one row.

        Args:
            metrics_dict: Column -> value; tensors must have one element.
            step: Value of the column ``step``, by default the number of the row.
        """
        row = to_numbers(metrics_dict)
        row["step"] = self._num_rows if step is None else step
        self._num_rows += 1
        self.metrics.append(row)
        last, num = self.last_logged or (None, 0)
        self.last_logged = (row["step"], num + 1 if last == row["step"] else 1)

    def continue_from(self, step: int, last_logged: Optional[tuple[float, int]] = None) -> None:
        """Keep the rows of an earlier process that do not come again.

        Args:
            step: The first step that runs again.
            last_logged: The last step that had rows then, and how many; None if nobody knows.
        """
        if self._num_rows or not exists(self.metrics_file_path):
            return
        with open_file(self.metrics_file_path) as file:
            rows = _rows_until(csv.DictReader(file), *(last_logged or (step, 0)))
        self.metrics = [{name: cell for name, cell in row.items() if name and cell} for row in rows]
        self.metrics_keys = []  # so that these rows take the place of the file, also where a subclass or a program keeps it
        self._num_rows = len(self.metrics)
        self.last_logged = last_logged

    def save(self, force: bool = True) -> None:
        """Write what has come since the last time.

        Args:
            force: False leaves a remote file for later when it was written a moment ago.
        """
        if self._has_new_hparams:
            write_hparams(self.log_dir, self.hparams)
            self._has_new_hparams = False
        if self._is_local:
            self._save_local()
        elif self.metrics or self._remote_text:
            self._save_remote(force)

    def close(self) -> None:
        """Release the file; a later :meth:`save` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _save_local(self) -> None:
        if not self.metrics:
            return
        header = self._new_header()
        if header is not None:
            previous = Path(self.metrics_file_path).read_bytes().decode() if self.metrics_keys else ""
            self.close()
            replace_text(self.metrics_file_path, _table(header, previous) + _rows(header, self.metrics))
            self.metrics_keys = header
        else:
            self._file = self._file or AppendFile(self.metrics_file_path)
            self._file.write(_rows(self.metrics_keys, self.metrics).encode())
        self.metrics.clear()

    def _save_remote(self, force: bool) -> None:
        if not force and time.monotonic() - self._remote_written_at < REMOTE_WRITE_INTERVAL_S:
            return
        header = self._new_header()
        if header is not None:
            self._remote_text = _table(header, self._remote_text)
            self.metrics_keys = header
        self._remote_text += _rows(self.metrics_keys, self.metrics)
        self.metrics.clear()
        replace_text(self.metrics_file_path, self._remote_text)
        self._remote_written_at = time.monotonic()

    def _new_header(self) -> Optional[list[str]]:
        """Return the header that the waiting rows need, None when the one in the file will do."""
        known = set(self.metrics_keys)
        missing = {name for row in self.metrics if not row.keys() <= known for name in row}
        return sorted(known | missing) if missing else None

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_file": None}


class CSVLogger(FolderLogger):
    """Writes metrics to ``save_dir/name/version/metrics.csv`` and hyper-parameters to ``hparams.yaml`` beside it.

    The columns are the names of the metrics and ``step``, sorted. Rows reach the file at every ``save()``, which the
    Trainer calls after each logging step, so a killed process loses none of them. Under a URL the file is written anew
    at most every five seconds and when the run ends.

    Args:
        save_dir: Directory of all experiments, local or any URL that fsspec knows.
        name: Name of the experiment, a folder in ``save_dir``. None or ``""`` for no such folder.
        version: Folder of the run. A number N stands for ``version_N``, None for the next free one.
        prefix: Text in front of every metric's name, joined by ``-``.
        flush_logs_every_n_steps: Without ``save()``, rows are written at every step N-1, 2N-1, ...

    Raises:
        ValueError: ``flush_logs_every_n_steps`` is less than 1.

    Example:
        >>> logger = CSVLogger("logs", name="my_model")
        >>> logger.log_metrics({"loss": 0.5}, step=0)
        >>> logger.save()
        >>> logger.log_dir
        'logs/my_model/version_0'
    """

    def __init__(
        self,
        save_dir: PathLike,
        name: Optional[str] = "lightning_logs",
        version: Optional[Union[int, str]] = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        if flush_logs_every_n_steps < 1:
            raise ValueError(
                f"flush_logs_every_n_steps must be >= 1, received {flush_logs_every_n_steps}."
                " Use 1 to write every row at once."
            )
        super().__init__(save_dir, name, version, prefix)
        self._flush_every: int = flush_logs_every_n_steps
        self._experiment: Optional[ExperimentWriter] = None

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer; the first access creates the directory."""
        if self._experiment is None:
            self._experiment = ExperimentWriter(self.log_dir)
        return self._experiment

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Mapping[str, Union[Tensor, float]], step: Optional[int] = None) -> None:
        """Add one row to the table.

        Args:
            metrics: Column -> value; tensors must have one element.
            step: Value of the column ``step``, by default the number of the row.
        """
        writer = self.experiment
        writer.log_metrics(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR), step)
        if (writer.metrics[-1]["step"] + 1) % self._flush_every == 0:
            self.save()

    @rank_zero_only
    @override
    def log_hyperparams(self, params: Optional[HParams] = None) -> None:
        """Add hyper-parameters to ``hparams.yaml``."""
        self.experiment.log_hparams(to_dict(params))

    @override
    def last_logged(self) -> Optional[tuple[float, int]]:
        # Programs put writers of their own into its place.
        return getattr(self._experiment, "last_logged", None)

    @rank_zero_only
    @override
    def continue_from(self, step: int, last_logged: Optional[tuple[float, int]] = None) -> None:
        self.experiment.continue_from(step, last_logged)

    @rank_zero_only
    @override
    def save(self) -> None:
        self.experiment.save(force=False)

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        """Write everything and close the file; nothing happens when the logger was never used."""
        if self._experiment is None:
            return
        self._experiment.save()
        self._experiment.close()


def _rows_until(rows: Iterable[dict[str, str]], step: float, num: int) -> list[dict[str, str]]:
    """Return those before ``step`` and the first ``num`` of it; damaged ones are left out."""
    kept, places = [], Counter[float]()
    for row in rows:
        with contextlib.suppress(ValueError):
            place = float(row.get("step") or "nan")
            places[place] += 1
            if place < step or (place == step and places[place] <= num):
                kept.append(row)
    return kept


def _table(header: list[str], previous: str) -> str:
    """Return the header and the rows of the table ``previous``, which may be empty, with the columns of ``header``."""
    return _rows(header, [dict(zip(header, header)), *csv.DictReader(io.StringIO(previous, newline=""))])


def _rows(header: list[str], rows: list[dict[str, object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[row.get(name, "") for name in header] for row in rows])
    return text.getvalue()
