"""Which checkpoints a logger uploads, and when."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Optional, Union

from torch import Tensor
from typing_extensions import override

from levin.loggers.logger import Logger, ModelCheckpoint
from levin.utilities.rank_zero import rank_zero_only
from levin.utilities.types import StateDict


class UploadingLogger(Logger):
    """Base of the loggers that can upload the files of ModelCheckpoint callbacks.

    Args:
        log_model: ``"all"`` uploads each file as soon as it is saved, True those that are left when the run ends.
    """

    LOGGER_JOIN_CHAR = "-"

    def __init__(self, log_model: Union[Literal["all"], bool]) -> None:
        super().__init__()
        self._log_model: Union[Literal["all"], bool] = log_model
        self._logged_checkpoints: dict[str, float] = {}
        self._callbacks: dict[int, ModelCheckpoint] = {}

    @abstractmethod
    def _upload(self, callback: ModelCheckpoint, checkpoint: SavedCheckpoint, aliases: list[str]) -> None:
        """Upload one file."""

    @override
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        if self._log_model == "all" or (self._log_model is True and checkpoint_callback.save_top_k == -1):
            self._log_checkpoints(checkpoint_callback)
        elif self._log_model is True:
            self._callbacks[id(checkpoint_callback)] = checkpoint_callback

    def _log_checkpoints_left(self) -> None:
        for callback in self._callbacks.values():
            self._log_checkpoints(callback)

    @rank_zero_only
    def _log_checkpoints(self, callback: ModelCheckpoint) -> None:
        for checkpoint in new_checkpoints(callback, self._logged_checkpoints):
            is_best = checkpoint.path == callback.best_model_path
            self._upload(callback, checkpoint, ["latest", "best"] if is_best else ["latest"])
            self._logged_checkpoints[checkpoint.path] = checkpoint.time

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_callbacks": {}}


class SavedCheckpoint(NamedTuple):
    """A checkpoint file that a ModelCheckpoint callback wrote."""

    time: float
    """Modification time in seconds since the epoch."""
    path: str
    score: Optional[float]
    """The monitored value, None for the last checkpoint when it is not among the best."""
    tag: str
    """``"best"``, ``"latest"`` or ``"best_k"``."""


def new_checkpoints(callback: ModelCheckpoint, logged: Mapping[str, float]) -> list[SavedCheckpoint]:
    """Return the existing files of ``callback`` that are not in ``logged`` or are newer than noted there, oldest first.

    Args:
        callback: The callback that saves.
        logged: Path -> modification time at which it was logged.
    """
    scores: dict[str, Optional[float]] = {
        callback.last_model_path: _number(callback.current_score),
        callback.best_model_path: _number(callback.best_model_score),
        **{path: _number(score) for path, score in callback.best_k_models.items()},
    }
    found = []
    for path, score in scores.items():
        if not path or not os.path.isfile(path):
            continue
        if path == callback.last_model_path:
            tag = "latest"
        elif path == callback.best_model_path:
            tag = "best"
        else:
            tag = "best_k"
        modified = os.path.getmtime(path)
        if path not in logged or logged[path] < modified:
            found.append(SavedCheckpoint(modified, path, score, tag))
    return sorted(found)


def _number(value: Any) -> Optional[float]:
    return value.item() if isinstance(value, Tensor) else value


def checkpoint_metadata(callback: ModelCheckpoint, checkpoint: SavedCheckpoint, title: str) -> StateDict:
    """Return what is noted beside an uploaded checkpoint.

    Args:
        callback: The callback that saved it.
        checkpoint: The file.
        title: Key for the settings of the callback.
    """
    settings = ("monitor", "mode", "save_last", "save_top_k", "save_weights_only", "_every_n_train_steps")
    return {
        "score": checkpoint.score,
        "original_filename": os.path.basename(checkpoint.path),
        title: {name: getattr(callback, name) for name in settings if hasattr(callback, name)},
    }


def hold(path: str, folder: str) -> str:
    """Return a second path to the file as it is now: the callback may remove or replace it before it is sent.

    Args:
        path: The file.
        folder: Where the second path lies; :func:`release` removes it.
    """
    os.makedirs(folder, exist_ok=True)
    held = os.path.join(tempfile.mkdtemp(dir=os.path.abspath(folder)), os.path.basename(path))
    try:
        os.link(os.path.realpath(path), held)
    except OSError:  # Another file system, or one without links.
        shutil.copyfile(path, held)
    return held


def release(path: str, folder: str) -> None:
    """Remove what :func:`hold` made; another path stays."""
    if os.path.dirname(os.path.dirname(path)) == os.path.abspath(folder):
        shutil.rmtree(os.path.dirname(path))
