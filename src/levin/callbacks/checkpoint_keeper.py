"""What ModelCheckpoint saves, under which names, and which files stay."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from levin.callbacks.checkpoint import Checkpoint
from levin.callbacks.checkpoint_files import is_inside, link_or_copy, list_directory, path_exists
from levin.callbacks.checkpoint_names import check_template, fill_template, first_free_name, template_pattern
from levin.callbacks.checkpoint_ranking import Mode, comparable, improves, ranked, worst_score
from levin.checkpoint.background import AsyncCheckpointIO
from levin.utilities.exceptions import MisconfigurationException, value_error
from levin.utilities.filesystem import get_filesystem, is_local, local_path
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from levin.loggers.logger import ModelCheckpoint
    from levin.protocols import Trainer


@dataclass
class _Pending:
    """A file that is being written in the background.

    Args:
        path: Its path.
        old: What the callback has to remember in case that it fails.
        is_written: Whether the file is complete; the writer sets it.
    """

    path: str
    old: dict[str, Any] = field(default_factory=dict)
    is_written: bool = False

    def complete(self) -> None:
        """Note that the file is complete."""
        self.is_written = True


class CheckpointKeeper(Checkpoint):
    """The part of :class:`~levin.callbacks.ModelCheckpoint` that saves, names, ranks and deletes files; not when.

    A file is always written before the one that it replaces is deleted. What the callback knows about its files changes
    when a save begins, so that the file says so too, and changes back if it fails.

    Args: as in ModelCheckpoint.

    Raises:
        MisconfigurationException: Arguments that exclude each other or are out of range.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None,
        filename: str | None,
        monitor: str | None,
        verbose: bool,
        save_last: bool | Literal["link"] | None,
        save_top_k: int,
        save_weights_only: bool,
        mode: str,
        auto_insert_metric_name: bool,
        enable_version_counter: bool,
        async_save: bool,
    ) -> None:
        super().__init__()
        if save_top_k < -1:
            raise value_error("save_top_k", save_top_k, "must be >= -1", "Use -1 to keep all checkpoints.")
        if mode not in ("min", "max"):
            raise value_error("mode", mode, "must be 'min' or 'max'")
        if monitor is None and save_top_k not in (-1, 0, 1):
            raise MisconfigurationException(
                f"ModelCheckpoint(save_top_k={save_top_k}, monitor=None) has no metric to choose the best files by. "
                "Give `monitor`, or save_top_k=-1 (keep all), 0 (none) or 1 (the newest)."
            )
        if save_last not in (None, True, False, "link"):
            raise value_error("save_last", save_last, "must be True, False, None or 'link'")
        if filename is not None:
            check_template(filename)
        if dirpath is not None:
            dirpath = os.fspath(dirpath)
            if is_local(dirpath):
                dirpath = os.path.realpath(os.path.expanduser(local_path(dirpath)))
            elif save_last == "link":
                raise ValueError(f"save_last='link' needs a local dirpath, received {dirpath!r}. Use save_last=True.")

        self.dirpath: str | None = dirpath
        self.filename: str | None = filename
        self.monitor: str | None = monitor
        self.verbose: bool = verbose
        self.save_last: bool | Literal["link"] | None = save_last
        self.save_top_k: int = save_top_k
        self.save_weights_only: bool = save_weights_only
        self.mode: Mode = "min" if mode == "min" else "max"
        self.auto_insert_metric_name: bool = auto_insert_metric_name
        self._enable_version_counter: bool = enable_version_counter
        self.async_save: bool = async_save

        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path: str = ""
        self.best_model_score: Tensor | None = None
        self.kth_best_model_path: str = ""
        self.kth_value: Tensor = worst_score(self.mode)
        self.last_model_path: str = ""
        self._last_checkpoint_saved: str = ""
        self._last_global_step_saved: int = 0
        # Files of this run, among them those that are still being written in the background.
        self._written: set[str] = set()
        self._background: AsyncCheckpointIO | None = None
        self._pending: _Pending | None = None
        self._has_validated: bool = False
        self._has_saved_last: bool = False
        self._defer_save_until_validation: bool = False

    def _save(self, trainer: Trainer, is_always_last: bool = False) -> None:
        candidates = self._monitor_candidates(trainer)
        obsolete = self._save_topk_checkpoint(trainer, candidates)
        was_saved = self._last_global_step_saved == trainer.global_step
        is_last_due = bool(self.save_last) and (is_always_last or was_saved or self.save_top_k == 0)
        if is_last_due and self.save_last == "link":
            # The link moves on before the file it points to may go.
            self._save_last_checkpoint(trainer, candidates)
        if obsolete:
            self._remove_checkpoint(trainer, obsolete)
        if is_last_due and self.save_last != "link":
            self._save_last_checkpoint(trainer, candidates)

    def _save_topk_checkpoint(self, trainer: Trainer, candidates: dict[str, Tensor]) -> str:
        """Save if this is one of the best; return the file that is no longer one of them, or ""."""
        if self.save_top_k == 0:
            return ""
        if self.monitor is None:
            return self._save_newest(trainer, candidates)
        if self.monitor not in candidates:
            self._report_missing_metric(candidates)
            return ""
        score = candidates[self.monitor]
        if self.check_monitor_top_k(trainer, score):
            return self._save_best(trainer, candidates, comparable(score, self.mode))
        if self.verbose:
            epoch, step = int(candidates["epoch"]), int(candidates["step"])
            rank_zero_info(f"Epoch {epoch}, global step {step}: {self.monitor!r} was not in top {self.save_top_k}")
        return ""

    def _save_newest(self, trainer: Trainer, candidates: dict[str, Tensor]) -> str:
        previous = self.best_model_path
        path = self._free_path(trainer, self._names(candidates), reusable=previous)
        self._save_and_take_up(trainer, path, {"best_model_path": path})
        return previous if self.save_top_k == 1 and self._should_remove_checkpoint(trainer, previous, path) else ""

    def _save_best(self, trainer: Trainer, candidates: dict[str, Tensor], score: Tensor) -> str:
        is_full = 0 < self.save_top_k <= len(self.best_k_models)
        previous = self.kth_best_model_path if is_full else ""
        path = self._free_path(trainer, self._names(candidates), reusable=previous)
        ranking = ranked(self.best_k_models, path, score, self.save_top_k, self.mode)
        best_score = ranking.scores[ranking.best]
        if self.verbose:
            epoch, step = int(candidates["epoch"]), int(candidates["step"])
            rank_zero_info(
                f"Epoch {epoch}, global step {step}: {self.monitor!r} reached {float(score):0.5f} "
                f"(best {float(best_score):0.5f}), saving model to {path!r} as top {len(ranking.scores)}"
            )
        new: dict[str, Any] = {
            "current_score": score,
            "best_k_models": ranking.scores,
            "best_model_path": ranking.best,
            "best_model_score": best_score,
        }
        if ranking.worst:
            new.update(kth_best_model_path=ranking.worst, kth_value=ranking.scores[ranking.worst])
        self._save_and_take_up(trainer, path, new)
        return previous if self._should_remove_checkpoint(trainer, previous, path) else ""

    def _save_last_checkpoint(self, trainer: Trainer, candidates: dict[str, Tensor]) -> None:
        def name(version: int | None) -> str:
            return self.format_checkpoint_name(candidates, self.CHECKPOINT_NAME_LAST, version)

        previous = self.last_model_path
        link = name(None)
        if not previous and self.save_last == "link" and trainer.ckpt_path is not None and os.path.islink(link):
            # The file that the link points to, and the run went on from, was written before there was a link.
            path = self._free_path(trainer, name, reusable=link)
        else:
            path = self._free_path(trainer, name, reusable=previous)
        # A resumed run may have saved nothing but `last` so far, and a link must not point to itself.
        can_link = self._last_checkpoint_saved not in ("", previous)
        if self.save_last == "link" and can_link and self.save_top_k != 0:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, path)
            self._written.add(path)
            if self._pending is not None:
                self._pending.old.setdefault("last_model_path", previous)
            self.last_model_path = path
        else:
            self._save_and_take_up(trainer, path, {"last_model_path": path})
        self._has_saved_last = True
        if self._should_remove_checkpoint(trainer, previous, path):
            self._remove_checkpoint(trainer, previous)

    def _save_and_take_up(self, trainer: Trainer, path: str, new: dict[str, Any]) -> None:
        """Save with the attributes ``new`` in place, so that the file knows them; if that fails they are undone."""
        self._settle_before_save(trainer)
        old = {name: getattr(self, name) for name in (*new, "_last_global_step_saved", "_last_checkpoint_saved")}
        vars(self).update(new)
        try:
            self._save_checkpoint(trainer, path)
        except BaseException:
            vars(self).update(old)
            raise
        if self._pending is not None:
            self._pending.old = old

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        before, self._last_global_step_saved = self._last_global_step_saved, trainer.global_step
        try:
            with self._own_checkpoint_io(trainer):
                trainer.save_checkpoint(filepath, self.save_weights_only)
        except BaseException:
            self._last_global_step_saved = before
            raise
        self._written.add(filepath)
        self._last_checkpoint_saved = filepath
        if not trainer.is_global_zero:
            return
        background = self._find_background(trainer)
        if background is None:
            self._tell_loggers(trainer)
        else:
            self._pending = _Pending(filepath)
            background.call_after_saves(self._pending.complete, f"Noting {filepath}")

    def _tell_loggers(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            logger.after_save_checkpoint(cast("ModelCheckpoint", self))

    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            background = self._find_background(trainer)
            if background is None:
                link_or_copy(filepath, linkpath)
            else:
                # A link to a file that is still being written would point to nothing if the process died now.
                background.call_after_saves(lambda: link_or_copy(filepath, linkpath), f"Linking {linkpath}")
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with self._own_checkpoint_io(trainer):
            trainer.strategy.remove_checkpoint(filepath)
        self._written.discard(filepath)

    # Saving in the background -----------------------------------------------------------------------------------------

    def _find_background(self, trainer: Trainer) -> AsyncCheckpointIO | None:
        """Return what saves in the background, this callback's own or the Trainer's plugin, if either does."""
        if self._background is not None:
            return self._background
        checkpoint_io = trainer.strategy.checkpoint_io
        return checkpoint_io if isinstance(checkpoint_io, AsyncCheckpointIO) else None

    @contextmanager
    def _own_checkpoint_io(self, trainer: Trainer) -> Iterator[None]:
        """Let the strategy save and remove by this callback's own CheckpointIO, if it has one."""
        strategy, own = trainer.strategy, self._background
        if own is None:
            yield
            return
        before = strategy.checkpoint_io
        strategy.checkpoint_io = own
        try:
            yield
        finally:
            strategy.checkpoint_io = before

    def _settle_before_save(self, trainer: Trainer) -> None:
        """Wait for the file that is being written; if writing it failed, raise, and on several ranks on all of them."""
        agreement = None if trainer.run is None else trainer.run.agreement
        if agreement is None:
            self._settle(trainer, should_wait=True)
            return
        background = self._find_background(trainer)
        if background is not None:
            background.wait()
        agreement.sync()

    def check_saves(self, trainer: Trainer) -> None:
        """Take note of what became of the file that is being written, and raise what writing it failed with."""
        self._settle(trainer, should_wait=False)

    def _settle(self, trainer: Trainer, should_wait: bool) -> None:
        """Take note of what became of the file that is being written in the background, if there is one.

        Raises:
            Exception: Whatever writing it failed with; the callback knows nothing of the file any more.
        """
        if self._pending is None and self._background is None:
            return
        background = self._find_background(trainer)
        if background is None:
            return
        if should_wait:
            background.wait()
        try:
            background.check()
        except BaseException:
            self._forget_unwritten()
            raise
        if self._pending is not None and self._pending.is_written:
            self._pending = None
            self._tell_loggers(trainer)

    def _settle_failed_run(self, trainer: Trainer, exception: BaseException) -> None:
        """Wait for the file that is being written in the background, and raise nothing."""
        background = self._find_background(trainer)
        if background is not None:
            background.on_exception(exception)
        self._forget_unwritten()
        if self._pending is not None:
            self._pending = None
            self._tell_loggers(trainer)

    def _forget_unwritten(self) -> None:
        """Go back to what was known before the save that has failed."""
        pending = self._pending
        if pending is not None and not pending.is_written:
            vars(self).update(pending.old)
            self._written.discard(pending.path)
            self._pending = None

    def _leave_background(self) -> None:
        """Wait for this callback's own writer and give its memory back.

        Raises:
            Exception: Whatever it failed with.
        """
        background, self._background = self._background, None
        if background is not None:
            background.end()

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Whether ``previous`` is a file of this callback's own, neither written anew nor the one the run began with."""
        if not previous or previous == current:
            return False
        if not is_local(previous):
            return True
        resumed = trainer.ckpt_path
        if resumed is not None and os.path.abspath(local_path(resumed)) == os.path.abspath(previous):
            return False
        return self.dirpath is not None and is_inside(previous, self.dirpath)

    # Metrics and names ------------------------------------------------------------------------------------------------

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether a checkpoint with the score ``current`` is among the best; all ranks must agree."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        is_better = improves(current, self.best_k_models[self.kth_best_model_path], self.mode)
        return trainer.strategy.reduce_boolean_decision(is_better)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the logged metrics with ``epoch`` and ``step`` as whole numbers."""
        candidates = dict(trainer.callback_metrics)
        for name, number in (("epoch", trainer.current_epoch), ("step", trainer.global_step)):
            candidates[name] = torch.as_tensor(candidates.get(name, number)).long()
        return candidates

    def _report_missing_metric(self, candidates: dict[str, Tensor]) -> None:
        message = (
            f"`ModelCheckpoint(monitor={self.monitor!r})` could not find the monitored key in the returned metrics: "
            f"{list(candidates)}. HINT: Did you call `log({self.monitor!r}, value)` in the `LightningModule`?"
        )
        if self._has_validated:
            raise MisconfigurationException(message)
        rank_zero_warn(message)

    def format_checkpoint_name(
        self, metrics: dict[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """Return the path of a checkpoint.

        Args:
            metrics: Values of the fields; one that is missing counts as 0.
            filename: Template, by default the callback's own.
            ver: Version number to add to the name.
            prefix: Text in front of the name.
        """
        join = self.CHECKPOINT_JOIN_CHAR
        template = filename or self.filename or f"{{epoch}}{join}{{step}}"
        name = fill_template(template, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        if prefix:
            name = f"{prefix}{join}{name}"
        if ver is not None:
            name = f"{name}{join}v{ver}"
        name += self.FILE_EXTENSION
        return os.path.join(self.dirpath, name) if self.dirpath else name

    def _names(self, candidates: dict[str, Tensor]) -> Callable[[int | None], str]:
        return lambda version: self.format_checkpoint_name(candidates, ver=version)

    def _free_path(self, trainer: Trainer, name: Callable[[int | None], str], reusable: str = "") -> str:
        """Return the path to write to; it is free, or ``reusable``, or the user wants files to be replaced."""
        path = ""
        if trainer.is_global_zero:

            def is_taken(path: str) -> bool:
                if path == reusable or not self._enable_version_counter:
                    return False
                return path in self._written or path_exists(path)

            path = first_free_name(name, is_taken, self.STARTING_VERSION)
        agreed: str = trainer.strategy.broadcast(path)
        return agreed

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Return whether rank 0 sees a file at ``filepath``; called on all ranks."""
        exists: bool = trainer.strategy.broadcast(path_exists(filepath))
        return exists

    def _resolve_ckpt_dir(self, trainer: Trainer) -> str:
        """Return the folder for the files: the user's, or one in that of the first logger."""
        if self.dirpath is not None:
            return self.dirpath
        if not trainer.loggers:
            return os.path.join(trainer.default_root_dir, "checkpoints")
        logger = trainer.loggers[0]
        root = trainer.default_root_dir if logger.save_dir is None else logger.save_dir
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return os.path.join(root, str(logger.name or ""), version, "checkpoints")

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Return the files that were written as ``last``, of any version."""
        directory = self._resolve_ckpt_dir(trainer)
        is_last = template_pattern(self.CHECKPOINT_NAME_LAST, self.FILE_EXTENSION)
        return {path for path in list_directory(directory) if is_last.fullmatch(os.path.basename(path))}

    # State ------------------------------------------------------------------------------------------------------------

    def run_state(self) -> dict[str, Any]:
        """Return what was saved and decided in the present run."""
        return {
            "last_global_step_saved": self._last_global_step_saved,
            "has_saved_last": self._has_saved_last,
            "has_validated": self._has_validated,
            "defers_save": self._defer_save_until_validation,
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Take up :meth:`run_state`."""
        self._last_global_step_saved = state["last_global_step_saved"]
        self._has_saved_last = state["has_saved_last"]
        self._has_validated = state["has_validated"]
        self._defer_save_until_validation = state["defers_save"]

    def state_dict(self) -> dict[str, Any]:
        """Return the kept files and their scores."""
        return {
            "monitor": self.monitor,
            "best_model_score": self.best_model_score,
            "best_model_path": self.best_model_path,
            "current_score": self.current_score,
            "dirpath": self.dirpath,
            "best_k_models": self.best_k_models,
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value,
            "last_model_path": self.last_model_path,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the kept files; with another folder than before only the path of the best one."""
        self.best_model_path = state_dict.get("best_model_path", self.best_model_path)
        before = state_dict.get("dirpath", self.dirpath)
        if before != self.dirpath:
            rank_zero_warn(
                f"The dirpath has changed from {before!r} to {self.dirpath!r}, therefore `best_model_score`, "
                "`kth_best_model_path`, `kth_value`, `last_model_path` and `best_k_models` won't be reloaded. "
                "Only `best_model_path` will be reloaded."
            )
            return
        for name in ("best_model_score", "current_score", "best_k_models", "last_model_path"):
            setattr(self, name, state_dict.get(name, getattr(self, name)))
        self.kth_best_model_path = state_dict.get("kth_best_model_path", self.kth_best_model_path)
        self.kth_value = state_dict.get("kth_value", self.kth_value)

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write the paths and scores of the kept files.

        Args:
            filepath: Where to, by default ``best_k_models.yaml`` in the checkpoints' folder.
        """
        import yaml

        if filepath is None:
            filepath = os.path.join(self.dirpath or "", "best_k_models.yaml")
        scores = {path: score.item() for path, score in self.best_k_models.items()}
        with get_filesystem(filepath).open(str(filepath), "w") as file:
            yaml.dump(scores, file)
