"""Metrics, parameters and checkpoints in MLflow."""

from __future__ import annotations

import os
import re
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

from typing_extensions import override

from levin.loggers.logger import Logger, rank_zero_experiment
from levin.loggers.utilities import add_prefix, checkpoint_metadata, flatten, new_checkpoints, to_dict
from levin.utilities.numbers import to_numbers
from levin.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

if TYPE_CHECKING:
    from levin.loggers.logger import ModelCheckpoint

_FILE = "file:"
_MAX_PARAM_CHARS = 250
_MAX_PARAMS_PER_CALL = 100
_STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED"}


class MLFlowLogger(Logger):
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
        synchronous: False lets MLflow send metrics and parameters in the background.

    Raises:
        ModuleNotFoundError: ``mlflow`` is not installed.

    Example:
        >>> logger = MLFlowLogger("my_model", tracking_uri="sqlite:///mlflow.db")  # doctest: +SKIP
        >>> logger.log_metrics({"loss": 0.5}, step=1)  # doctest: +SKIP
    """

    LOGGER_JOIN_CHAR = "-"

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
        if find_spec("mlflow") is None:
            raise ModuleNotFoundError("MLFlowLogger needs the package mlflow. Install it with: pip install mlflow")
        super().__init__()
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"{_FILE}{save_dir or './mlruns'}"
        self.tags: dict[str, Any] = dict(tags or {})
        self._experiment_name: str = experiment_name
        self._experiment_id: Optional[str] = None
        self._tracking_uri: str = uri
        self._run_name: Optional[str] = run_name
        self._run_id: Optional[str] = run_id
        self._log_model: Literal[True, False, "all"] = log_model
        self._prefix: str = prefix
        self._artifact_location: Optional[str] = artifact_location
        self._log_kwargs: dict[str, Any] = {} if synchronous is None else {"synchronous": synchronous}
        self._logged_checkpoints: dict[str, float] = {}
        self._callbacks: dict[int, ModelCheckpoint] = {}
        self._client: Any = None

    @property
    @override
    def name(self) -> Optional[str]:
        return self.experiment_id

    @property
    @override
    def version(self) -> Optional[str]:
        return self.run_id

    @property
    def experiment_id(self) -> Optional[str]:
        """Id of the experiment; asking for it starts the run."""
        _ = self.experiment
        return self._experiment_id

    @property
    def run_id(self) -> Optional[str]:
        """Id of the run; asking for it starts the run."""
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

            client = MlflowClient(self._tracking_uri)
            if self._run_id is not None:
                self._experiment_id = client.get_run(self._run_id).info.experiment_id
            else:
                self._experiment_id = self._find_or_create_experiment(client)
                self._run_id = client.create_run(self._experiment_id, tags=self._all_tags()).info.run_id
            self._client = client
        return self._client

    def _find_or_create_experiment(self, client: Any) -> str:
        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage != "deleted":
            return str(found.experiment_id)
        rank_zero_info("Experiment with name %s not found. Creating it.", self._experiment_name)
        return str(client.create_experiment(self._experiment_name, artifact_location=self._artifact_location))

    def _all_tags(self) -> dict[str, object]:
        from mlflow.tracking.context.registry import resolve_tags
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        if self._run_name is not None:
            if MLFLOW_RUN_NAME in self.tags:
                rank_zero_warn(
                    f"The tag {MLFLOW_RUN_NAME} is found in tags. The value will be overridden by {self._run_name}."
                )
            self.tags[MLFLOW_RUN_NAME] = self._run_name
        tags: dict[str, Any] = resolve_tags(self.tags)
        return tags

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Mapping[str, Any], step: Optional[int] = None) -> None:
        """Record values.

        Args:
            metrics: Name -> number or tensor with one element. Texts are left out with a warning; characters that MLflow
                does not allow in names are left out too.
            step: Position on the x-axis, 0 by default.
        """
        from mlflow.entities import Metric

        client = self.experiment
        timestamp_ms = int(time.time() * 1000)
        entries = []
        for name, value in to_numbers(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)).items():
            if isinstance(value, str):
                rank_zero_warn(f"Discarding metric with string value {name}={value}.")
                continue
            entries.append(Metric(key=_allowed(name), value=value, timestamp=timestamp_ms, step=step or 0))
        client.log_batch(run_id=self._run_id, metrics=entries, **self._log_kwargs)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: Union[dict[str, Any], Namespace]) -> None:
        """Record hyper-parameters, cut to 250 characters each.

        Args:
            params: Name -> value, nested as you like.
        """
        from mlflow.entities import Param

        client = self.experiment
        entries = [
            Param(key=name, value=str(value)[:_MAX_PARAM_CHARS]) for name, value in flatten(to_dict(params)).items()
        ]
        for start in range(0, len(entries), _MAX_PARAMS_PER_CALL):
            part = entries[start : start + _MAX_PARAMS_PER_CALL]
            client.log_batch(run_id=self._run_id, params=part, **self._log_kwargs)

    @rank_zero_only
    @override
    def finalize(self, status: str = "success") -> None:
        """Upload the checkpoints that are left and end the run; nothing happens when the logger was never used.

        Args:
            status: ``"success"``, ``"failed"`` or a status of MLflow.
        """
        if self._client is None:
            return
        for callback in self._callbacks.values():
            self._log_checkpoints(callback)
        status = _STATUS.get(status, status)
        if self._client.get_run(self._run_id).info.status != status:
            self._client.set_terminated(self._run_id, status)

    @override
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Upload the new checkpoints now or remember to do it at the end, as ``log_model`` says.

        Args:
            checkpoint_callback: The callback that saved.
        """
        if self._log_model == "all" or (self._log_model is True and checkpoint_callback.save_top_k == -1):
            self._log_checkpoints(checkpoint_callback)
        elif self._log_model is True:
            self._callbacks[id(checkpoint_callback)] = checkpoint_callback

    @rank_zero_only
    def _log_checkpoints(self, callback: ModelCheckpoint) -> None:
        import yaml

        client = self.experiment
        for checkpoint in new_checkpoints(callback, self._logged_checkpoints):
            folder = Path(checkpoint.path).stem
            is_best = checkpoint.path == callback.best_model_path
            client.log_artifact(self._run_id, checkpoint.path, folder)
            with tempfile.TemporaryDirectory(prefix="checkpoint_") as directory:
                metadata = checkpoint_metadata(callback, checkpoint, "Checkpoint")
                Path(directory, "metadata.yaml").write_text(yaml.dump(metadata), encoding="utf-8")
                Path(directory, "aliases.txt").write_text(str(["latest", "best"] if is_best else ["latest"]))
                client.log_artifacts(self._run_id, directory, folder)
            self._logged_checkpoints[checkpoint.path] = checkpoint.time

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_callbacks": {}}


def _allowed(name: str) -> str:
    allowed = re.sub(r"[^a-zA-Z0-9_/. -]+", "", name)
    if allowed != name:
        rank_zero_warn(
            f"MLflow allows only letters, digits, '_', '/', '.', '-' and ' ' in the names of metrics: {name!r} becomes"
            f" {allowed!r}.",
            category=RuntimeWarning,
        )
    return allowed
