"""Metrics and parameters in Trackio, a tracker that keeps them on this machine."""

from __future__ import annotations

import secrets
import time
from typing import Any, Optional

from typing_extensions import override

from levin.loggers.logger import Logger, rank_zero_experiment
from levin.loggers.utilities import add_prefix, json_values, to_dict
from levin.utilities.packages import require_package
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_only
from levin.utilities.types import HParams, Kwargs, Metrics, StateDict


class TrackioLogger(Logger):
    """Logs to Trackio; needs ``trackio``.

    Everything lies in a database below the folder TRACKIO_DIR, which ``trackio show`` draws; with ``space_id`` the package
    sends it on to a Space of Hugging Face, in the background.

    Args:
        project: Name of the project.
        name: Name of the run, by default one made of the time. A run of that name is gone on with.
        prefix: Text in front of every metric's name, joined by ``-``.
        kwargs: For ``trackio.init``, for example ``group``, ``space_id``, ``auto_log_gpu``.

    Raises:
        ModuleNotFoundError: ``trackio`` is not installed.

    Example:
        >>> logger = TrackioLogger("digits")  # doctest: +SKIP
        >>> logger.log_metrics({"loss": 0.5}, step=1)  # doctest: +SKIP
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(
        self, project: str = "lightning_logs", name: Optional[str] = None, prefix: str = "", **kwargs: Any
    ) -> None:
        require_package("trackio", "TrackioLogger")
        super().__init__()
        self._project: str = project
        self._run_name: str = name or time.strftime(f"%Y%m%d-%H%M%S-{secrets.token_hex(2)}")
        self._prefix: str = prefix
        self._init: Kwargs = {"embed": False, "resume": "allow", **kwargs}
        self._experiment: Any = None

    name: str = reads("_project", "The project.")
    version: str = reads("_run_name", "Name of the run.")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Trackio; the first access starts it, or goes on with the one of that name."""
        if self._experiment is None:
            import trackio

            self._experiment = trackio.init(self._project, name=self._run_name, **self._init)
        return self._experiment

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Metrics, step: Optional[int] = None) -> None:
        """Record values.

        Args:
            metrics: Name -> number, or anything that ``trackio.log`` takes.
            step: Position on the x-axis.
        """
        self.experiment.log(dict(add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR)), step=step)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: HParams) -> None:
        """Add hyper-parameters to the configuration of the run, which is written with the next values."""
        # Kept for a run that is gone on with, whose first values bring the whole configuration again.
        config = self._init["config"] = {**(self._init.get("config") or {}), **json_values(to_dict(params))}
        self.experiment.config.update(config)

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        """Write out everything and end the run; what is logged afterwards goes on with it."""
        if self._experiment is not None:
            self._experiment.finish()
            self._experiment = None

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_experiment": None}
