"""The files of a ModelCheckpoint: their names, which are the best and by what, which is not there yet, what is kept."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from levin.callbacks.checkpoint import Checkpoint
from levin.checkpoint.io import Save
from levin.loggers.logger import Logger
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException, did_you_mean
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict

Mode = Literal["min", "max"]
_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")
# What is known about the files of one folder.
OF_ONE_FOLDER = (
    "best_model_score", "current_score", "best_k_models", "kth_best_model_path", "kth_value", "last_model_path",
)  # fmt: skip
# What becomes untrue when the save that it is about fails.
_OF_NEWEST_SAVE = (*OF_ONE_FOLDER, "best_model_path", "_last_checkpoint_saved", "_last_global_step_saved")
RUN_STATE = {
    "last_global_step_saved": "_last_global_step_saved",
    "has_saved_last": "_has_saved_last",
    "has_validated": "_has_validated",
    "defers_save": "_defer_save_until_validation",
}
"""Key in a checkpoint -> the attribute."""


def check_template(template: str) -> None:
    """Raise if ``template`` is not made of text and ``{key}`` or ``{key:format}`` fields.

    Raises:
        ValueError: A brace without its partner, or a field without a name.
    """
    rest = _FIELD.sub("", template)
    empty = any(not match.group(1) for match in _FIELD.finditer(template))
    if "{" in rest or "}" in rest or empty:
        raise ValueError(
            f"filename must be text with fields like {{epoch}} or {{val_loss:.2f}}, received {template!r}. "
            "Give every field a name and close every brace."
        )


def fill_template(
    template: str, metrics: Mapping[str, object], auto_insert_metric_name: bool = True, equals: str = "="
) -> str:
    """Return ``template`` with its fields replaced by metrics.

    Args:
        template: Text with ``{key}`` and ``{key:format}`` fields.
        metrics: Values by key; numbers or tensors of one element. A key that is not there counts as 0.
        auto_insert_metric_name: Whether a field becomes ``key=value`` instead of ``value``.
        equals: What stands between key and value.

    Raises:
        ValueError: A value does not fit its format.

    Example:
        >>> fill_template("{epoch:02d}-{val_loss:.2f}", {"epoch": 3, "val_loss": 0.126})
        'epoch=03-val_loss=0.13'
    """

    def replace(match: re.Match[str]) -> str:
        name, spec = match.group(1), match.group(2) or ""
        value = metrics.get(name, 0)
        if name not in metrics and (meant := did_you_mean(name, map(str, metrics))):
            rank_zero_warn(f"The file name shows {name!r} as 0, since it is not logged (yet).{meant}")
        if isinstance(value, torch.Tensor):
            value = value.item()
        try:
            text = format(value, spec)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The file name field {{{name}:{spec}}} cannot show the value {value!r} of {name!r}: {error}. "
                "Use a format that fits the value, such as :.2f for a float."
            ) from error
        return f"{name}{equals}{text}" if auto_insert_metric_name else text

    return _FIELD.sub(replace, template)


def template_pattern(template: str, extension: str) -> re.Pattern[str]:
    """Return the expression that matches any name made of ``template``, with or without a version number.

    Example:
        >>> bool(template_pattern("last-{epoch}", ".ckpt").fullmatch("last-epoch=3-v2.ckpt"))
        True
    """
    fixed = (re.escape(text) for text in _FIELD.sub("\0", template).split("\0"))
    return re.compile(".*".join(fixed) + ".*" + re.escape(extension))


def first_free_name(
    name: Callable[[int | None], str], is_taken: Callable[[str], bool], starting_version: int = 1
) -> str:
    """Return ``name(None)`` if it is free, else the first of ``name(starting_version)``, ``name(... + 1)`` that is.

    Args:
        name: Gives the path for a version number, or for None the path without one.
        is_taken: Whether a path may not be used.
        starting_version: The first number to try.

    Example:
        >>> first_free_name(lambda v: "last" if v is None else f"last-v{v}", {"last", "last-v1"}.__contains__)
        'last-v2'
    """
    path = name(None)
    version = starting_version
    while is_taken(path):
        path = name(version)
        version += 1
    return path


def default_folder(root: str, loggers: Sequence[Logger]) -> str:
    """Return the folder for checkpoints where the user names none: one in that of the first logger's version.

    Args:
        root: Folder of the run, for the case that there is no logger, or that it keeps nothing on disk.
        loggers: Of the run.
    """
    if not loggers:
        return os.path.join(root, "checkpoints")
    logger = loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    save_dir = root if logger.save_dir is None else logger.save_dir
    return os.path.join(save_dir, str(logger.name or ""), version, "checkpoints")


def worst_score(mode: Mode) -> Tensor:
    """Return the score that any other one improves on."""
    return torch.tensor(float("inf") if mode == "min" else float("-inf"))


def comparable(score: Tensor, mode: Mode) -> Tensor:
    """Return ``score`` as a scalar on the CPU that can be ranked: NaN counts as the worst score."""
    score = torch.as_tensor(score).detach().cpu().squeeze()
    return worst_score(mode).to(score.dtype) if torch.isnan(score) else score


def improves(score: Tensor, on: Tensor, mode: Mode) -> bool:
    """Return whether ``score`` is strictly better than ``on``; NaN never is."""
    score, on = torch.as_tensor(score).cpu(), torch.as_tensor(on).cpu()
    return bool(score < on) if mode == "min" else bool(score > on)


@dataclass(frozen=True)
class Ranking:
    """The checkpoints that are kept, and the best and the worst of them.

    Args:
        scores: Score of each kept checkpoint by its path.
        best: Path of the best one, "" if there is none.
        worst: Path of the one that must go next, "" while there is room for more.
    """

    scores: dict[str, Tensor]
    best: str
    worst: str


def ranked(scores: Mapping[str, Tensor], path: str, score: Tensor, k: int, mode: Mode) -> Ranking:
    """Return the ranking after ``path`` came in, which may have pushed out the worst one.

    Args:
        scores: The kept checkpoints so far.
        path: The new one. A path that is there already gets the new score.
        score: Its score, from :func:`comparable`.
        k: How many are kept; -1 keeps all.
        mode: Whether the best is the smallest or the largest score.

    Example:
        >>> kept = ranked({"a": torch.tensor(3.0)}, "b", torch.tensor(1.0), k=2, mode="min")
        >>> kept.best, kept.worst
        ('b', 'a')
    """
    kept = dict(scores)
    if k > 0 and len(kept) >= k:
        kept.pop(_worst(kept, mode))
    kept[path] = score
    is_full = k == -1 or len(kept) >= k
    best = min(kept, key=kept.__getitem__) if mode == "min" else max(kept, key=kept.__getitem__)
    return Ranking(kept, best, _worst(kept, mode) if is_full else "")


def _worst(scores: Mapping[str, Tensor], mode: Mode) -> str:
    return max(scores, key=scores.__getitem__) if mode == "min" else min(scores, key=scores.__getitem__)


class UnconfirmedSave:
    """The newest save of a callback, and what the callback knew before it.

    Attributes change when a save begins, so that the file says so too, and change back if it fails.

    Args:
        owner: The callback.
    """

    def __init__(self, owner: Checkpoint) -> None:
        self._owner = owner
        self._save: Save | None = None
        self._before: StateDict = {}

    @contextmanager
    def undone_if_it_fails(self) -> Iterator[None]:
        """Put the attributes back to what they were when the block began, if the save in it fails, now or later."""
        before = {name: getattr(self._owner, name) for name in _OF_NEWEST_SAVE}
        try:
            yield
        except BaseException:  # Ctrl-C too: no name may speak of a file that is not there
            vars(self._owner).update(before)
            raise
        self._before = before

    def watch(self, save: Save) -> None:
        """Take the place of the save before, which is confirmed."""
        self._save = save

    def then(self, function: Callable[[], None], name: str) -> None:
        """Call ``function`` once the file is there."""
        if self._save is None:
            function()
        else:
            self._save.then(function, name)

    def wait(self) -> None:
        """Wait until the file is there or cannot be; what it failed with, the next save raises on all ranks."""
        if self._save is not None:
            self._save.wait()

    def confirm(self) -> bool:
        """Return whether the file has come to be there since the last call."""
        if self._save is None or not self._save.is_written:
            return False
        self._save = None
        return True

    def give_up(self) -> str:
        """Put the attributes back if the file is not there and will not be; return its path, else an empty string."""
        save, self._save = self._save, None
        if save is None:
            return ""
        vars(self._owner).update(self._before)
        return str(save.path)


def files_from(state: StateDict, dirpath: str | None) -> StateDict:
    """Return the attributes that a state was made of; only the best file's path if the folder is another.

    Args:
        state: From a checkpoint.
        dirpath: The folder of now.
    """
    names = ["best_model_path", *OF_ONE_FOLDER]
    before = state.get("dirpath", dirpath)
    if before != dirpath:
        names = ["best_model_path"]
        rank_zero_warn(
            f"The dirpath has changed from {before!r} to {dirpath!r}, therefore `best_model_score`, "
            "`kth_best_model_path`, `kth_value`, `last_model_path` and `best_k_models` won't be reloaded. "
            "Only `best_model_path` will be reloaded."
        )
    return {name: state[name] for name in names if name in state}


def logged_metrics(trainer: Trainer) -> dict[str, Tensor]:
    """Return the logged metrics of this rank, with ``epoch`` and ``step`` as whole numbers."""
    metrics: dict[str, Tensor] = dict(trainer.callback_metrics)
    for name, number in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
        metrics[name] = torch.as_tensor(metrics.get(name, number)).long()
    return metrics


def take_from_first_rank(trainer: Trainer, metrics: dict[str, Tensor], monitor: str) -> str:
    """Put the value of rank 0 in the place of this rank's own, so that all decide alike; all ranks call this.

    Returns:
        What to tell the user where the ranks have different values; empty where they agree.
    """
    own = float(metrics[monitor]) if monitor in metrics else None
    first = trainer.strategy.broadcast(own)
    is_other = repr(own) != repr(first)  # NaN is like NaN
    if first is None:
        metrics.pop(monitor, None)
    elif is_other:
        metrics[monitor] = torch.tensor(first)
    if not trainer.strategy.reduce_boolean_decision(is_other, all=False):
        return ""
    return (
        f"ModelCheckpoint(monitor={monitor!r}): the value differs from rank to rank, and that of rank 0 "
        f"({first}) decides for all. Log it with sync_dist=True to have the files ranked by the mean."
    )


def report_missing(monitor: str, metrics: dict[str, Tensor], is_error: bool) -> None:
    """Say that the monitored metric was not logged: as a warning while it may still come.

    Raises:
        MisconfigurationException: ``is_error`` is set.
    """
    message = (
        f"`ModelCheckpoint(monitor={monitor!r})` could not find the monitored key in the returned metrics: "
        f"{list(metrics)}.{did_you_mean(monitor, metrics)} HINT: Did you call `log({monitor!r}, value)` in the `LightningModule`?"
    )
    if is_error:
        raise MisconfigurationException(message)
    rank_zero_warn(message)


def describe_position(metrics: dict[str, Tensor]) -> str:
    """Return where in the run the metrics are from, as messages begin."""
    return f"Epoch {int(metrics['epoch'])}, global step {int(metrics['step'])}"
