"""Metrics, media and checkpoints on Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Optional, Union

from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from levin.loggers.logger import ModelCheckpoint, rank_zero_experiment
from levin.loggers.uploads import SavedCheckpoint, UploadingLogger, checkpoint_metadata
from levin.loggers.utilities import add_prefix, json_values, to_dict
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.packages import require_package
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_only, rank_zero_warn
from levin.utilities.types import HParams, Kwargs, Metrics, PathLike, StateDict

STEP = "trainer/global_step"
"""The metric that all others are drawn over."""


class WandbLogger(UploadingLogger):
    """Logs to Weights & Biases; needs ``wandb``.

    The package sends in the background and keeps what it has not sent yet in local files. Where the service cannot be reached
    when the run starts, all of it is kept, as with ``offline=True``.

    A run that is under way in this process is used instead of a new one. The run stays open after training, so that one
    can go on logging to it; ``wandb.finish()`` or the end of the process closes it.

    Args:
        name: Name of the run.
        save_dir: Directory of the local files.
        version: Id of the run, to go on with an earlier one.
        offline: Keep everything in local files, to be uploaded by ``wandb sync``.
        dir: The same as ``save_dir``.
        id: The same as ``version``, which wins.
        anonymous: Whether to log without an account.
        project: Name of the project, by default that in the environment variable WANDB_PROJECT, else
            ``"lightning_logs"``.
        log_model: Which checkpoints become artifacts: those left at the end (True), each when it is saved (``"all"``), or
            none.
        experiment: A run to use.
        prefix: Text in front of every metric's name, joined by ``-``.
        checkpoint_name: Name of the artifacts, by default ``model-<id of the run>``.
        add_file_policy: ``"mutable"`` copies a checkpoint before it is uploaded, ``"immutable"`` does not and so the file
            must not change.
        kwargs: For ``wandb.init``, for example ``entity``, ``group``, ``tags``, ``mode``.

    Raises:
        ModuleNotFoundError: ``wandb`` is not installed.
        MisconfigurationException: ``log_model`` together with ``offline``.

    Example:
        >>> logger = WandbLogger(project="my_project", offline=True)  # doctest: +SKIP
        >>> logger.log_metrics({"loss": 0.5}, step=1)  # doctest: +SKIP
        >>> logger.log_image("samples", images=[torch.rand(3, 8, 8)])  # doctest: +SKIP
    """

    def __init__(
        self,
        name: Optional[str] = None,
        save_dir: PathLike = ".",
        version: Optional[str] = None,
        offline: bool = False,
        dir: Optional[PathLike] = None,
        id: Optional[str] = None,
        anonymous: Optional[bool] = None,
        project: Optional[str] = None,
        log_model: Union[Literal["all"], bool] = False,
        experiment: object = None,
        prefix: str = "",
        checkpoint_name: Optional[str] = None,
        add_file_policy: Literal["mutable", "immutable"] = "mutable",
        **kwargs: object,
    ) -> None:
        require_package("wandb", "WandbLogger")
        if offline and log_model:
            raise MisconfigurationException(
                f"log_model must be False with offline=True, received {log_model!r}, since checkpoints cannot be"
                " uploaded then. Use offline=False, or log_model=False."
            )
        super().__init__(log_model)
        self.add_file_policy: Literal["mutable", "immutable"] = add_file_policy
        self._offline: bool = offline
        self._prefix: str = prefix
        self._experiment: Any = experiment
        self._save_dir: str = os.fspath(dir if dir is not None and os.fspath(save_dir) == "." else save_dir)
        self._project: str = project or os.environ.get("WANDB_PROJECT", "lightning_logs")
        self._id: Optional[str] = version or id
        self._checkpoint_name: Optional[str] = checkpoint_name
        # Whether the process of wandb was found to be gone.
        self._is_lost: bool = False
        # Set in a copy of the logger in another process, which joins the run of this one.
        self._attach_id: Optional[str] = None
        self._wandb_init: Kwargs = {
            "name": name,
            "project": self._project,
            "dir": self._save_dir,
            "id": self._id,
            "resume": "allow",
            **kwargs,
        }
        if anonymous:
            self._wandb_init["anonymous"] = "allow"  # Newer versions warn of it, even when it is None.
        if offline:
            self._wandb_init.setdefault("mode", "offline")

    name: str = reads("_project", "The project.")

    @property
    @override
    def version(self) -> Optional[str]:
        return self._experiment.id if self._experiment is not None else self._id

    save_dir: str = reads("_save_dir", "Folder of the files of all runs.")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; the first access starts it, or takes the one under way in this process."""
        if self._experiment is None:
            import wandb

            attach = getattr(wandb, "_attach", None)
            if wandb.run is not None:
                rank_zero_warn(
                    "There is a wandb run already in progress and newly created instances of `WandbLogger` will reuse"
                    " this run. If this is not desired, call `wandb.finish()` before instantiating `WandbLogger`."
                )
                self._experiment = wandb.run
            elif self._attach_id is not None and attach is not None:
                self._experiment = attach(self._attach_id)
            else:
                os.makedirs(self._save_dir, exist_ok=True)
                self._experiment = self._start()
            self._define_step()
        return self._experiment

    def _start(self) -> Any:
        import wandb

        try:
            return wandb.init(**self._wandb_init)
        except Exception as error:
            if not _is_away(error):
                raise
            run = wandb.init(**{**self._wandb_init, "mode": "offline"})
            rank_zero_warn(
                f"Weights & Biases cannot be reached: {error} The run is kept in {run.dir}. Upload it later with:"
                f" wandb sync {os.path.dirname(run.dir)}"
            )
            return run

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        """Let training go on where the process is gone that wandb started to keep and to send what is logged."""
        try:
            yield
        except ConnectionError as error:
            if not self._is_lost:
                rank_zero_warn(
                    f"The process of wandb is gone ({error!r}). Training goes on, and nothing more is logged to Weights &"
                    " Biases; what came before is in the files of the run."
                )
            self._is_lost = True

    def _define_step(self) -> None:
        define = getattr(self._experiment, "define_metric", None)
        if define is not None:
            define(STEP)
            define("*", step_metric=STEP, step_sync=True)

    def watch(
        self, model: Module, log: Optional[str] = "gradients", log_freq: int = 100, log_graph: bool = True
    ) -> None:
        """Record histograms of a model's gradients or parameters.

        Args:
            model: The model.
            log: ``"gradients"``, ``"parameters"``, ``"all"`` or None.
            log_freq: Every so many backward passes.
            log_graph: Whether to record the graph too.
        """
        self.experiment.watch(model, log=log, log_freq=log_freq, log_graph=log_graph)

    @rank_zero_only
    @override
    def log_metrics(self, metrics: Metrics, step: Optional[int] = None) -> None:
        """Record values.

        Args:
            metrics: Name -> number, tensor or anything that ``wandb.log`` takes.
            step: Position on the x-axis, which is the metric ``trainer/global_step``.
        """
        values = {
            name: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for name, value in add_prefix(metrics, self._prefix, self.LOGGER_JOIN_CHAR).items()
        }
        if step is not None:
            values[STEP] = step
        with self._going_on():
            self.experiment.log(values)

    @rank_zero_only
    @override
    def log_hyperparams(self, params: HParams) -> None:
        """Add hyper-parameters to the configuration of the run."""
        with self._going_on():
            self.experiment.config.update(json_values(to_dict(params)), allow_val_change=True)

    @rank_zero_only
    def log_table(
        self,
        key: str,
        columns: Optional[list[str]] = None,
        data: Optional[list[list[object]]] = None,
        dataframe: object = None,
        step: Optional[int] = None,
    ) -> None:
        """Record a table, given by columns and rows or as a data frame.

        Args:
            key: Name.
            columns: Titles.
            data: Rows.
            dataframe: Of pandas, instead of ``columns`` and ``data``.
            step: Position on the x-axis.
        """
        import wandb

        self.log_metrics({key: wandb.Table(columns=columns, data=data, dataframe=dataframe)}, step)

    @rank_zero_only
    def log_text(
        self,
        key: str,
        columns: Optional[list[str]] = None,
        data: Optional[list[list[str]]] = None,
        dataframe: object = None,
        step: Optional[int] = None,
    ) -> None:
        """Record texts as a table; see :meth:`log_table`.

        Args:
            key: Name.
            columns: Titles.
            data: Rows.
            dataframe: Of pandas, instead of ``columns`` and ``data``.
            step: Position on the x-axis.
        """
        self.log_table(key, columns, data, dataframe, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[object], step: Optional[int] = None, **kwargs: list[Any]) -> None:
        """Record images.

        Args:
            key: Name.
            images: Tensors (C x H x W), arrays, PIL images or paths.
            step: Position on the x-axis.
            kwargs: For ``wandb.Image``, each a list with one value per image, for example ``caption``.

        Raises:
            TypeError: ``images`` is no list.
            ValueError: A list in ``kwargs`` has another length.
        """
        self._log_media("Image", key, "images", images, step, kwargs)

    @rank_zero_only
    def log_audio(self, key: str, audios: list[object], step: Optional[int] = None, **kwargs: list[Any]) -> None:
        """Record sounds.

        Args:
            key: Name.
            audios: Arrays or paths.
            step: Position on the x-axis.
            kwargs: For ``wandb.Audio``, each a list with one value per sound, for example ``sample_rate``.

        Raises:
            TypeError: ``audios`` is no list.
            ValueError: A list in ``kwargs`` has another length.
        """
        self._log_media("Audio", key, "audios", audios, step, kwargs)

    @rank_zero_only
    def log_video(self, key: str, videos: list[object], step: Optional[int] = None, **kwargs: list[Any]) -> None:
        """Record videos.

        Args:
            key: Name.
            videos: Arrays (T x C x H x W) or paths.
            step: Position on the x-axis.
            kwargs: For ``wandb.Video``, each a list with one value per video, for example ``fps`` and ``format``.

        Raises:
            TypeError: ``videos`` is no list.
            ValueError: A list in ``kwargs`` has another length.
        """
        self._log_media("Video", key, "videos", videos, step, kwargs)

    def _log_media(
        self, kind: str, key: str, argument: str, items: object, step: Optional[int], options: dict[str, list[object]]
    ) -> None:
        import wandb

        if not isinstance(items, list):
            raise TypeError(
                f"{argument} must be a list, received {type(items).__name__}. Put a single one into a list."
            )
        for name, values in options.items():
            if len(values) != len(items):
                raise ValueError(
                    f"{name} must have one value for each of {len(items)} {argument}, received {len(values)}."
                )
        make = getattr(wandb, kind)
        media = [make(item, **{name: options[name][i] for name in options}) for i, item in enumerate(items)]
        self.log_metrics({key: media}, step)

    @staticmethod
    @rank_zero_only
    def download_artifact(
        artifact: str,
        save_dir: Optional[PathLike] = None,
        artifact_type: Optional[str] = None,
        use_artifact: Optional[bool] = True,
    ) -> str:
        """Download an artifact.

        Args:
            artifact: ``entity/project/name:version``.
            save_dir: Where to; a folder of wandb's by default.
            artifact_type: Its type.
            use_artifact: Whether to note in the run that it used the artifact.

        Returns:
            The directory.
        """
        import wandb

        if wandb.run is not None and use_artifact:
            found = wandb.run.use_artifact(artifact)
        else:
            found = wandb.Api().artifact(artifact, type=artifact_type)
        return str(found.download(root=None if save_dir is None else os.fspath(save_dir)))

    def use_artifact(self, artifact: str, artifact_type: Optional[str] = None) -> Any:
        """Note that the run uses an artifact, and return it.

        Args:
            artifact: ``entity/project/name:version``.
            artifact_type: Its type.
        """
        return self.experiment.use_artifact(artifact, type=artifact_type)

    @rank_zero_only
    @override
    def finalize(self, status: str) -> None:
        """Upload the checkpoints that are left after a successful run."""
        if status == "success" and self._experiment is not None:
            self._log_checkpoints_left()

    @override
    def _upload(self, callback: ModelCheckpoint, checkpoint: SavedCheckpoint, aliases: list[str]) -> None:
        import wandb

        metadata = checkpoint_metadata(callback, checkpoint, type(callback).__name__)
        name = self._checkpoint_name or f"model-{self.experiment.id}"
        artifact = wandb.Artifact(name=name, type="model", metadata=metadata)
        artifact.add_file(checkpoint.path, name="model.ckpt", policy=self.add_file_policy)
        with self._going_on():
            self.experiment.log_artifact(artifact, aliases=aliases)

    def __getstate__(self) -> StateDict:
        state = {**super().__getstate__(), "_experiment": None}
        if self._experiment is not None:
            # Runs have this only while a service process of wandb holds them.
            state["_attach_id"] = getattr(self._experiment, "_attach_id", None)
            state["_id"] = self._experiment.id
        return state


def _is_away(error: Exception) -> bool:
    """Whether the service was not reached, and not that it refused the account or the arguments."""
    import wandb.errors

    return isinstance(error, wandb.errors.CommError) and not isinstance(error, wandb.errors.AuthenticationError)
