"""Metrics, files and checkpoints on the platform of Lightning AI."""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from abc import ABCMeta
from collections import defaultdict
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Optional

from typing_extensions import override

from levin.loggers.logger import ModelCheckpoint, rank_zero_experiment
from levin.loggers.outbox import Entry, Outbox, is_unreachable
from levin.loggers.uploads import SavedCheckpoint, UploadingLogger, hold, release
from levin.loggers.utilities import flatten, join_path, to_dict
from levin.utilities.exceptions import causes
from levin.utilities.numbers import to_numbers
from levin.utilities.packages import require_package
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from levin.utilities.types import HParams, Metrics, PathLike, StateDict

_START_LIMIT_S = 30.0
_UPLOAD_LIMIT_S = 3600.0
_MAX_VALUES_PER_CALL = 1000


class _EachBaseOnce(ABCMeta):
    """Lets ``litlogger`` derive from what it imports from ``lightning`` and from ``pytorch_lightning``: by the alias one class."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> _EachBaseOnce:
        return super().__new__(cls, name, tuple(dict.fromkeys(bases)), body)


class LitLogger(UploadingLogger, metaclass=_EachBaseOnce):
    """Logs to the platform of Lightning AI; needs ``litlogger``.

    A thread makes all requests, in their order: a service that is slow or away neither slows nor ends the training. What
    cannot be sent until the end of the run is kept in the folder ``unsent`` of ``log_dir``.

    Args:
        root_dir: Folder of the local files, by default ``./lightning_logs``.
        name: Name of the experiment, by default one made of the time. One of that name is gone on with.
        teamspace: Where it goes, by default your own teamspace.
        metadata: Tags of a new experiment.
        store_step: Whether values keep the step they were logged at.
        log_model: Whether checkpoints are uploaded, each when it is saved.
        save_logs: Is not there: ``litlogger`` starts the program a second time for it. True warns.
        checkpoint_name: Name of the uploaded checkpoints, by default that of the experiment.

    Raises:
        ModuleNotFoundError: ``litlogger`` is not installed.

    Example:
        >>> logger = LitLogger(name="digits", metadata={"data": "v2"})  # doctest: +SKIP
        >>> logger.log_metrics({"loss": 0.5}, step=1)  # doctest: +SKIP
        >>> logger.log_file("confusion.png")  # doctest: +SKIP
    """

    version = None

    def __init__(
        self,
        root_dir: Optional[PathLike] = None,
        name: Optional[str] = None,
        teamspace: Optional[str] = None,
        metadata: Optional[dict[str, str]] = None,
        store_step: bool = True,
        log_model: bool = False,
        save_logs: bool = False,
        checkpoint_name: Optional[str] = None,
    ) -> None:
        require_package("litlogger", "LitLogger")
        super().__init__("all" if log_model else False)
        if save_logs:
            rank_zero_warn(
                "save_logs=True has no effect: litlogger would start the program a second time to record what it prints."
                " Write the output to a file, and upload that with log_file(path)."
            )
        self._root_dir: str = os.fspath(root_dir) if root_dir is not None else "./lightning_logs"
        self._name: str = name or time.strftime(f"%Y%m%d-%H%M%S-{secrets.token_hex(2)}")
        self._teamspace: Optional[str] = teamspace
        self._metadata: dict[str, str] = {key: str(value) for key, value in (metadata or {}).items()}
        self._store_step: bool = store_step
        self._checkpoint_name: str = checkpoint_name or self._name
        self._is_started: bool = False
        self._experiment: Any = None
        self._outbox: Outbox = Outbox("Lightning", self._send, _is_away, self._keep)

    name: str = reads("_name", "Name of the experiment.")
    root_dir: str = reads("_root_dir", "Folder of all experiments.")
    save_dir: str = reads("log_dir", "Folder of this experiment.")

    @property
    @override
    def log_dir(self) -> str:
        return join_path(self._root_dir, self._name)

    @property
    def _unsent_dir(self) -> str:
        return os.path.join(self.log_dir, "unsent")

    @property
    def url(self) -> Optional[str]:
        """Where the experiment is shown; None while Lightning cannot be reached."""
        return self.experiment and str(self.experiment.url)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``litlogger.Experiment``, which the first access starts; None while Lightning cannot be reached."""
        if not self._is_started:
            try:
                self._outbox.put("start", {}).result(_START_LIMIT_S)
            except FutureTimeoutError:
                rank_zero_warn(
                    f"Lightning did not answer within {_START_LIMIT_S} s. The run goes on without it, and what it logs is"
                    " sent when Lightning answers."
                )
            self._is_started = True
        return self._experiment

    def _required_experiment(self) -> Any:
        if self.experiment is None:
            raise ConnectionError(f"Lightning cannot be reached: the experiment {self._name!r} is not there yet.")
        return self._experiment

    def _start(self) -> None:
        from litlogger import Experiment

        self._experiment = Experiment(
            name=self._name,
            log_dir=self.log_dir,
            teamspace=self._teamspace,
            metadata=self._metadata,
            store_step=self._store_step,
            verbose=False,
        )
        rank_zero_info(f"The run is shown at {self._experiment.url}")

    def _send(self, kind: str, payloads: list[Any]) -> None:
        """Send payloads of one kind; this is where requests are made, in the outbox's thread.

        That is also where the experiment is made: in the main thread it would take over the signals that end a run.
        """
        from litlogger import File, Model

        if self._experiment is None:
            self._start()
        if kind == "metrics":
            self._send_metrics([entry for payload in payloads for entry in payload])
        elif kind == "metadata":
            for payload in payloads:
                self._experiment.update(payload)
        elif kind == "file":
            for path in payloads:
                self._experiment[_key_of(path)] = File(path)
        elif kind == "model":
            for payload in payloads:
                self._experiment[payload["key"]].append(Model(payload["path"], version=payload["version"]))
                release(payload["path"], self._unsent_dir)
        elif kind == "end":
            self._experiment.finalize(print_summary=False)

    def _send_metrics(self, values: list[tuple[str, float, Optional[int]]]) -> None:
        # Not by `Experiment`, whose own thread ends for good when the service is away, and loses what it holds.
        from litlogger.api.metrics_api import MetricsApi
        from litlogger.types import Metrics as Series
        from litlogger.types import MetricValue

        api = MetricsApi()
        for start in range(0, len(values), _MAX_VALUES_PER_CALL):
            points = defaultdict(list)
            for name, value, step in values[start : start + _MAX_VALUES_PER_CALL]:
                points[name].append(MetricValue(value, step if self._store_step else None))
            series = [Series(name, line) for name, line in points.items()]
            api.append_experiment_metrics(self._experiment.teamspace.id, self._experiment.id, series)

    def _keep(self, entries: list[Entry]) -> str:
        """Write what was not sent into a file."""
        os.makedirs(self._unsent_dir, exist_ok=True)
        path = os.path.join(self._unsent_dir, "entries.jsonl")
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps([entry.kind, entry.payload]) + "\n" for entry in entries)
        return f"They are in {path}, as JSON."

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Metrics, step: Optional[int] = None) -> None:
        """Record values. Lightning takes finite numbers alone; others are left out, with a warning."""
        _ = self.experiment
        numbers = to_numbers(metrics)
        finite = [
            (name, float(value), step)
            for name, value in numbers.items()
            if not isinstance(value, str) and math.isfinite(value)
        ]
        if len(finite) < len(numbers):
            left_out = sorted(numbers.keys() - {name for name, _, _ in finite})
            rank_zero_warn(f"Lightning takes finite numbers alone. Left out: {left_out}", category=RuntimeWarning)
        self._outbox.put("metrics", finite)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: HParams, metrics: Optional[dict[str, Any]] = None) -> None:
        """Record hyper-parameters as tags of the experiment.

        Args:
            params: Name -> value, nested as you like.
            metrics: Values to record beside them.
        """
        self.log_metadata(params)
        if metrics:
            self.log_metrics(metrics)

    @rank_zero_only
    def log_metadata(self, params: HParams) -> None:
        """Add tags to the experiment.

        Args:
            params: Name -> value, nested as you like.
        """
        _ = self.experiment
        self._outbox.put("metadata", {name: str(value) for name, value in flatten(to_dict(params)).items()})

    @rank_zero_only
    def log_file(self, path: str) -> None:
        """Upload a file in the background.

        Args:
            path: The file, which has to stay as it is until then. Its name there is the path below the working directory.
        """
        _ = self.experiment
        self._outbox.put("file", path, _UPLOAD_LIMIT_S)

    @rank_zero_only
    def get_file(self, path: str, verbose: bool = True) -> str:
        """Download a file that :meth:`log_file` uploaded.

        Args:
            path: Where it goes, which is also how it was named.
            verbose: Whether to say so.

        Returns:
            The path.

        Raises:
            ConnectionError: Lightning cannot be reached.
        """
        saved = str(self._required_experiment()[_key_of(path)].save(path))
        if verbose:
            rank_zero_info(f"Downloaded {saved}.")
        return saved

    @rank_zero_only
    def log_model(
        self,
        model: object,
        staging_dir: Optional[str] = None,
        verbose: bool = False,
        version: Optional[str] = None,
        metadata: Optional[dict[str, Any]] = None,
    ) -> None:
        """Upload an object, such as a module, as a model of the registry, and wait for it.

        Args:
            model: The object.
            staging_dir: Folder for the file on its way; a temporary one by default.
            verbose: Whether to say so.
            version: Its version.
            metadata: What is noted beside it.

        Raises:
            ConnectionError: Lightning cannot be reached.
        """
        from litlogger import Model

        experiment = self._required_experiment()
        experiment[self._checkpoint_name].append(
            Model(model, version=version, metadata=metadata, staging_dir=staging_dir)
        )
        if verbose:
            rank_zero_info(f"Uploaded a model to the experiment {self._name}.")

    @rank_zero_only
    def log_model_artifact(self, path: str, verbose: bool = False, version: Optional[str] = None) -> None:
        """Upload a file or a folder as a model of the registry, in the background.

        Args:
            path: The file or folder, which has to stay as it is until then.
            verbose: Whether to say so.
            version: Its version.
        """
        _ = self.experiment
        key = os.path.splitext(os.path.basename(path))[0]
        self._outbox.put("model", {"path": path, "key": key, "version": version}, _UPLOAD_LIMIT_S)
        if verbose:
            rank_zero_info(f"{path} is uploaded to the experiment {self._name}.")

    @override
    def _upload(self, callback: ModelCheckpoint, checkpoint: SavedCheckpoint, aliases: list[str]) -> None:
        _ = self.experiment
        version = os.path.splitext(os.path.basename(checkpoint.path))[0]
        payload = {"path": hold(checkpoint.path, self._unsent_dir), "key": self._checkpoint_name, "version": version}
        self._outbox.put("model", payload, _UPLOAD_LIMIT_S)

    @rank_zero_only
    @override
    def finalize(self, status: Optional[str] = None) -> None:
        """Send what is waiting and end the experiment; nothing happens when the logger was never used."""
        if self._is_started:
            self._outbox.put("end", status)
            self._outbox.close()
            self._is_started, self._experiment = False, None

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "_is_started": False, "_experiment": None}


def _key_of(path: str) -> str:
    relative = os.path.relpath(path)
    return os.path.basename(path) if relative.startswith("..") else relative.replace(os.sep, "/")


def _is_away(error: BaseException) -> bool:
    """Whether Lightning, or the network on the way to it, failed, and not what was sent."""
    from urllib3.exceptions import HTTPError

    return is_unreachable(error) or any(isinstance(cause, HTTPError) for cause in causes(error))
