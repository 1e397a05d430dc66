"""Metrics, parameters and checkpoints in MLflow."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, Literal, Optional

from typing_extensions import override

from levin.loggers.logger import ModelCheckpoint, rank_zero_experiment
from levin.loggers.outbox import Entry, Outbox, is_unreachable
from levin.loggers.uploads import SavedCheckpoint, UploadingLogger, checkpoint_metadata, hold, release
from levin.loggers.utilities import add_prefix, flatten, to_dict
from levin.utilities.exceptions import causes
from levin.utilities.numbers import to_numbers
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn
from levin.utilities.types import HParams, Kwargs, Metrics, PathLike, StateDict

_FILE = "file:"
_AWAY_CODES = ("TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED")
_START_LIMIT_S = 30.0
_UPLOAD_LIMIT_S = 3600.0
_MAX_METRICS_PER_CALL = 1000
_MAX_PARAM_CHARS = 250
_MAX_PARAMS_PER_CALL = 100
_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}


class MLFlowLogger(UploadingLogger):
    """Logs to MLflow; needs ``mlflow`` (or ``mlflow-skinny``).

    Args:
        experiment_name: Name of the experiment; it is created if there is none.
        run_name: Name of the run, by default one that MLflow makes up.
        tracking_uri: Server or database, by default that in the environment variable MLFLOW_TRACKING_URI, else the
            folder ``save_dir``. Newer versions of MLflow refuse folders: give ``"sqlite:///mlflow.db"`` then.
        tags: Tags of the run.
        save_dir: Folder to log to when there is no ``tracking_uri``.
        log_model: Which checkpoints are uploaded: those left at the end (True), each when it is saved (``"all"``), or
            none.
        prefix: Text in front of every metric's name, joined by ``-``.
        artifact_location: Where the artifacts of a new experiment go; the server decides by default.
        run_id: Id of a run to go on with.
        synchronous: True waits for every request, and raises when one fails. Otherwise a thread makes them, in their
            order: a server that is slow or away neither slows nor ends the training. What cannot be sent until the end of
            the run is kept in the folder ``<save_dir>-unsent``, for :meth:`send_unsent`.

    Raises:
        ModuleNotFoundError: ``mlflow`` is not installed.

    Example:
        >>> logger = MLFlowLogger("my_model", tracking_uri="sqlite:///mlflow.db")  # doctest: +SKIP
        >>> logger.log_metrics({"loss": 0.5}, step=1)  # doctest: +SKIP
    """

    def __init__(
        self,
        experiment_name: str = "lightning_logs",
        run_name: Optional[str] = None,
        tracking_uri: Optional[str] = None,
        tags: Optional[dict[str, object]] = None,
        save_dir: Optional[str] = "./mlruns",
        log_model: Literal[True, False, "all"] = False,
        prefix: str = "",
        artifact_location: Optional[str] = None,
        run_id: Optional[str] = None,
        synchronous: Optional[bool] = None,
    ) -> None:
        require_package("mlflow", "MLFlowLogger")
        super().__init__(log_model)
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_FILE}{save_dir or './mlruns'}"
        self.tags: dict[str, object] = dict(tags or {})
        self._experiment_name: str = experiment_name
        self._experiment_id: Optional[str] = None
        self._tracking_uri: str = uri
        self._run_name: Optional[str] = run_name
        self._run_id: Optional[str] = run_id
        self._prefix: str = prefix
        self._artifact_location: Optional[str] = artifact_location
        self._is_synchronous: bool = synchronous is True
        self._unsent_dir: str = f"{save_dir or './mlruns'}-unsent"
        # Set while the run could not be started: stands for its id.
        self._stand_in: Optional[str] = None
        self._client: Any = None
        self._outbox: Outbox = Outbox("MLflow", self._send, _is_away, self._keep)

    @property
    @override
    def name(self) -> Optional[str]:
        return self.experiment_id or (self._stand_in and self._experiment_name)

    @property
    @override
    def version(self) -> Optional[str]:
        return self.run_id or self._stand_in

    @property
    def experiment_id(self) -> Optional[str]:
        """Id of the experiment; asking for it starts the run. None while MLflow cannot be reached."""
        _ = self.experiment
        return self._experiment_id

    @property
    def run_id(self) -> Optional[str]:
        """Id of the run; asking for it starts the run. None while MLflow cannot be reached."""
        _ = self.experiment
        return self._run_id

    @property
    @override
    def save_dir(self) -> Optional[str]:
        return self._tracking_uri[len(_FILE) :] if self._tracking_uri.startswith(_FILE) else None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``MlflowClient``; the first access starts the run, or goes on with the one given."""
        if self._client is None:
            from mlflow.tracking import MlflowClient

            self._client = MlflowClient(self._tracking_uri)
            started = self._deliver("start", {"run_id": self._run_id})
            try:
                started.result(_START_LIMIT_S)
            except FutureTimeoutError:
                self._stand_in = time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
                rank_zero_warn(
                    f"MLflow at {_without_password(self._tracking_uri)} did not answer within {_START_LIMIT_S} s. The run"
                    " goes on without it, and what it logs is sent when MLflow answers."
                )
            except BaseException:  # Ctrl-C too: what has no run yet is begun again
                self._client = None
                raise
        return self._client

    def _start_run(self) -> None:
        """Create the run, or find that which was given; several attempts may be needed."""
        if self._experiment_id is not None and self._run_id is not None:
            return
        if self._run_id is not None:
            self._experiment_id = self._client.get_run(self._run_id).info.experiment_id
        else:
            self._experiment_id = self._find_or_create_experiment(self._client)
            self._run_id = self._client.create_run(self._experiment_id, tags=self._all_tags()).info.run_id

    def _deliver(self, kind: str, payload: object, limit_s: float = 30.0) -> Future[None]:
        if not self._is_synchronous:
            return self._outbox.put(kind, payload, limit_s)
        self._send(kind, [payload])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _send(self, kind: str, payloads: list[Any]) -> None:
        """Send payloads of one kind; this is where requests are made."""
        from mlflow.entities import Metric, Param

        self._start_run()
        options = {"run_id": self._run_id, **({"synchronous": True} if self._is_synchronous else {})}
        if kind == "metrics":
            metrics = [Metric(*entry) for payload in payloads for entry in payload]
            for part in _parts(metrics, _MAX_METRICS_PER_CALL):
                self._client.log_batch(metrics=part, **options)
        elif kind == "params":
            params = [Param(*entry) for payload in payloads for entry in payload.items()]
            for part in _parts(params, _MAX_PARAMS_PER_CALL):
                self._client.log_batch(params=part, **options)
        elif kind == "checkpoint":
            for payload in payloads:
                self._send_checkpoint(**payload)
        elif kind == "status":
            if self._client.get_run(self._run_id).info.status != payloads[-1]:
                self._client.set_terminated(self._run_id, payloads[-1])

    def _keep(self, entries: list[Entry]) -> str:
        """Write what was not sent into a file."""
        os.makedirs(self._unsent_dir, exist_ok=True)
        path = os.path.join(self._unsent_dir, f"{self._run_id or self._stand_in or 'run'}.jsonl")
        is_new = not os.path.exists(path)
        with open(path, "a", encoding="utf-8") as file:
            if is_new:
                file.write(json.dumps(self._arguments()) + "\n")
            file.writelines(json.dumps([entry.kind, entry.payload, entry.limit_s]) + "\n" for entry in entries)
        return f"They are in {path}. Send them with MLFlowLogger.send_unsent({path!r})."

    def _arguments(self) -> Kwargs:
        return {
            "experiment_name": self._experiment_name,
            "run_name": self._run_name,
            "tracking_uri": _without_password(self._tracking_uri),
            "tags": {name: str(value) for name, value in self.tags.items()},
            "artifact_location": self._artifact_location,
            "run_id": self._run_id,
        }

    @classmethod
    def send_unsent(cls, path: PathLike, tracking_uri: Optional[str] = None) -> None:
        """Send what a run kept in a file because MLflow could not be reached; the file is removed.

        Args:
            path: The file, which the run named.
            tracking_uri: Server or database, by default that of the run.

        Raises:
            ConnectionError: MLflow cannot be reached now either. The file stays.

        Example:
            >>> MLFlowLogger.send_unsent("mlruns-unsent/3f0c.jsonl")  # doctest: +SKIP
        """
        with open(path, encoding="utf-8") as file:
            arguments, *entries = map(json.loads, file)
        logger = cls(**{**arguments, **({"tracking_uri": tracking_uri} if tracking_uri else {})}, synchronous=True)
        try:
            _ = logger.experiment
            for kind, grouped in itertools.groupby(entries, key=lambda entry: entry[0]):
                logger._send(kind, [payload for _, payload, _ in grouped])
        except Exception as error:
            if not _is_away(error):
                raise
            raise ConnectionError(
                f"MLflow at {logger._tracking_uri} cannot be reached, {os.fspath(path)} stays as it is: {error}"
            ) from error
        os.remove(path)

    def _find_or_create_experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage != "deleted":
            return str(found.experiment_id)
        rank_zero_info("Experiment with name %s not found. Creating it.", self._experiment_name)
        return str(client.create_experiment(self._experiment_name, artifact_location=self._artifact_location))

    def _all_tags(self) -> dict[str, object]:
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        tags = dict(self.tags)
        if self._run_name is not None:
            if MLFLOW_RUN_NAME in tags:
                rank_zero_warn(
                    f"The tag {MLFLOW_RUN_NAME} is found in tags. The value will be overridden by {self._run_name}."
                )
            tags[MLFLOW_RUN_NAME] = self._run_name
        resolved: dict[str, object] = resolve_tags(tags)
        return resolved

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Metrics, step: Optional[int] = None) -> None:
        """Record values.

        Args:
            metrics: Name -> number or tensor with one element. Texts are left out with a warning; characters that MLflow
                does not allow in names are left out too.
            step: Position on the x-axis, 0 by default.
        """
        _ = self.experiment
        timestamp_ms = int(time.time() * 1000)
        entries = []
        for name, value in to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)).items():
            if isinstance(value, str):
                rank_zero_warn(f"Discarding metric with string value {name}={value}.")
                continue
            entries.append((_allowed(name), value, timestamp_ms, step or 0))
        self._deliver("metrics", entries)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: HParams) -> None:
        """Record hyper-parameters, cut to 250 characters each."""
        _ = self.experiment
        self._deliver(
            "params", {name: str(value)[:_MAX_PARAM_CHARS] for name, value in flatten(to_dict(params)).items()}
        )

    @rank_zero_only
    @override
    def finalize(self, status: str = "success") -> None:
        """Upload the checkpoints that are left and end the run; nothing happens when the logger was never used."""
        if self._client is None:
            return
        self._log_checkpoints_left()
        self._deliver("status", _STATUS.get(status, status))
        self._outbox.close()

    @override
    def _upload(self, callback: ModelCheckpoint, checkpoint: SavedCheckpoint, aliases: list[str]) -> None:
        _ = self.experiment
        payload = {
            "path": checkpoint.path if self._is_synchronous else hold(checkpoint.path, self._unsent_dir),
            "metadata": checkpoint_metadata(callback, checkpoint, "Checkpoint"),
            "aliases": aliases,
        }
        self._deliver("checkpoint", payload, limit_s=_UPLOAD_LIMIT_S)

    def _send_checkpoint(self, path: str, metadata: dict[str, object], aliases: list[str]) -> None:
        import yaml

        folder = Path(path).stem
        self._client.log_artifact(self._run_id, path, folder)
        with tempfile.TemporaryDirectory(prefix="checkpoint_") as directory:
            Path(directory, "metadata.yaml").write_text(yaml.dump(metadata), encoding="utf-8")
            Path(directory, "aliases.txt").write_text(str(aliases))
            self._client.log_artifacts(self._run_id, directory, folder)
        release(path, self._unsent_dir)

    def __getstate__(self) -> StateDict:
        return {**super().__getstate__(), "_client": None}


def _parts(entries: list[object], size: int) -> Iterator[list[Any]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _is_away(error: BaseException) -> bool:
    """Whether MLflow, or the network on the way to it, failed, and not what was sent."""
    from mlflow.exceptions import MlflowException

    return is_unreachable(error) or any(
        isinstance(cause, MlflowException) and cause.error_code in _AWAY_CODES for cause in causes(error)
    )


def _allowed(name: str) -> str:
    allowed = re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)
    if allowed != name:
        rank_zero_warn(
            f"MLflow allows only letters, digits, '_', '/', '.', '-' and ' ' in the names of metrics: {name!r} becomes"
            f" {allowed!r}.",
            category=RuntimeWarning,
        )
    return allowed
