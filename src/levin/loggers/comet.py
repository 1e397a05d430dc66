"""Metrics and parameters on Comet."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from levin.loggers.logger import Logger, rank_zero_experiment
from levin.loggers.utilities import json_values, to_dict
from levin.utilities.numbers import to_numbers
from levin.utilities.packages import require_package
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_deprecation, rank_zero_only, rank_zero_warn
from levin.utilities.types import HParams, Kwargs, StateDict

# Old name -> new name of arguments.
_RENAMED = {"experiment_name": "name", "save_dir": "offline_directory"}


class CometLogger(Logger):
    """Logs to Comet; needs ``comet_ml``.

    The package sends in the background. Where Comet cannot be reached when the run starts, everything is kept in local files,
    as with ``online=False``.

    Args:
        api_key: Key of the account, by default that of the environment variable COMET_API_KEY or the file
            ``.comet.config``.
        workspace: Name of the workspace.
        project: Name of the project.
        experiment_key: Key of the experiment to make or to go on with, 32 to 50 letters and digits.
        mode: ``"create"``, ``"get"`` (go on with ``experiment_key``) or ``"get_or_create"``, the default.
        online: False keeps everything in local files, to be uploaded by ``comet upload``.
        prefix: Text in front of every metric's name, joined by ``_``.
        kwargs: For ``comet_ml.ExperimentConfig``, for example ``name``, ``tags``, ``offline_directory``, ``log_graph``.

    Raises:
        ModuleNotFoundError: ``comet_ml`` is not installed.

    Example:
        >>> logger = CometLogger(project="my_project", online=False)  # doctest: +SKIP
        >>> logger.log_metrics({"loss": 0.5}, step=1)  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        api_key: Optional[str] = None,
        workspace: Optional[str] = None,
        project: Optional[str] = None,
        experiment_key: Optional[str] = None,
        mode: Optional[Literal["get_or_create", "get", "create"]] = None,
        online: Optional[bool] = None,
        prefix: Optional[str] = None,
        **kwargs: Any,
    ) -> None:
        require_package("comet_ml", "CometLogger")
        super().__init__()
        if "project_name" in kwargs:
            old_project = kwargs.pop("project_name")
            project = project or old_project
            rank_zero_deprecation("The parameter `project_name` is deprecated, please use `project` instead.")
        if "offline" in kwargs:
            online = not kwargs.pop("offline")
            rank_zero_deprecation("The parameter `offline` is deprecated, please use `online` instead.")
        for old, new in _RENAMED.items():
            if old in kwargs:
                kwargs[new] = kwargs.pop(old)
                rank_zero_deprecation(f"The parameter `{old}` is deprecated, please use `{new}` instead.")
        self._api_key: Optional[str] = api_key
        self._workspace: Optional[str] = workspace
        self._project: Optional[str] = project
        self._experiment_key: Optional[str] = experiment_key
        self._mode: Optional[str] = mode
        self._online: Optional[bool] = online
        self._prefix: Optional[str] = prefix
        self._config: Kwargs = kwargs
        self._experiment: Any = None
        self._offline_directory: Optional[str] = None
        # The key of the experiment is the version, which folders of checkpoints are named after.
        _ = self.experiment

    name: Optional[str] = reads("_project", "The project.")
    version: Optional[str] = reads("_experiment_key", "The key of the experiment.")
    save_dir: Optional[str] = reads("_offline_directory", "Where files of an experiment are kept that cannot be sent.")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The experiment of Comet."""
        if self._experiment is None:
            import comet_ml

            # Without disabled=False a variable that turns off automatic logging would turn off ours.
            config = comet_ml.ExperimentConfig(**{"disabled": False, **self._config})
            start = functools.partial(
                comet_ml.start,
                api_key=self._api_key,
                workspace=self._workspace,
                project=self._project,
                experiment_key=self._experiment_key,
                mode=self._mode,
                experiment_config=config,
            )
            if self._online is False or _is_reachable(self._api_key):
                self._experiment = start(online=self._online)
            if self._experiment is None or self._experiment.alive is False:
                self._experiment = start(online=False)
                rank_zero_warn(
                    "Comet cannot be reached. The experiment is kept in local files, and Comet says at the end how to"
                    " upload them."
                )
            self._experiment_key = self._experiment.get_key()
            self._project = self._experiment.project_name or self._project
            self._offline_directory = config.offline_directory
            self._experiment.log_other("Created from", "levin")
        return self._experiment

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Mapping[str, Union[Tensor, float]], step: Optional[int] = None) -> None:
        """Record values.

        Args:
            metrics: Name -> number or tensor with one element; ``epoch`` becomes the epoch of the others.
            step: Position on the x-axis.
        """
        values = to_numbers(metrics)
        epoch = values.pop("epoch", None)
        self.experiment.log_metrics(values, prefix=self._prefix, step=step, epoch=epoch)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: HParams) -> None:
        """Record hyper-parameters."""
        self.experiment.log_parameters(json_values(to_dict(params)))

    @rank_zero_only
    @override
    def log_graph(self, model: Module, input_array: Optional[Tensor] = None) -> None:
        """Record the text form of ``model``, unless the experiment was told ``log_graph=False``.

        Args:
            model: The model.
            input_array: Not needed.
        """
        if self._config.get("log_graph") is not False:
            self.experiment.set_model_graph(model)

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        """Send what is waiting; the experiment stays open until the process ends."""
        if self._experiment is not None:
            self._experiment.flush()

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_experiment": None}


def _is_reachable(api_key: Optional[str]) -> bool:
    """Whether the service answers, be it with an error; where it does not, Comet would try again for minutes."""
    import comet_ml.config
    import requests

    comet_ml.config.get_api_key(api_key, comet_ml.config.get_config())  # it may name a service of one's own
    try:
        requests.head(comet_ml.config.get_backend_address(), timeout=5)
    except requests.RequestException:
        return False
    return True
