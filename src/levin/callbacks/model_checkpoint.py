"""ModelCheckpoint: saves the run every so often and keeps the best files."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Literal

from torch import Tensor

from levin.callbacks import checkpoint_files as files
from levin.callbacks.checkpoint import Checkpoint
from levin.callbacks.checkpoint_arguments import check_choice, checked_triggers, resolved_folder
from levin.callbacks.checkpoint_trigger import validates, validates_after_last_batch, validates_once_per_epoch
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.ranks.clock import AgreedClock
from levin.utilities.filesystem import absolute, exists, is_inside, list_folder, open_file, replace_link
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn
from levin.utilities.types import STEP_OUTPUT, Batch, Metrics, StateDict


class ModelCheckpoint(Checkpoint):
    """Saves a checkpoint every so many epochs, steps or minutes and keeps the newest or the best ones.

    At most one of ``every_n_train_steps``, ``every_n_epochs`` and ``train_time_interval`` may be given; with none of
    them a checkpoint is saved after each epoch. A file is always written before the one that it replaces is deleted.

    Args:
        dirpath: Folder or URL for the files. By default ``checkpoints`` in the folder of the first logger's version,
            or in the Trainer's ``default_root_dir`` when there is no logger.
        filename: Name without extension, with fields such as ``"{epoch}-{val_loss:.2f}"``. Fields are the logged
            metrics, ``epoch`` (from 0) and ``step`` (optimizer steps done). By default ``"{epoch}-{step}"``.
        monitor: Logged metric by which the best files are chosen. By default the newest file counts as the best.
        verbose: Whether to log a line for each decision.
        save_last: Whether to keep the newest checkpoint under the name ``last`` as well: True writes a file of its own,
            ``"link"`` a symbolic link to the newest kept file.
        save_top_k: How many of the best files are kept; -1 keeps all, 0 none. Without ``monitor``: -1, 0 or 1.
        save_on_exception: Whether to save when anything raises, Ctrl-C included.
        save_weights_only: Whether to leave out what only a resume needs: optimizers, schedulers, callbacks.
        mode: ``"min"`` or ``"max"``: which value of ``monitor`` is the best.
        auto_insert_metric_name: Whether a field of ``filename`` becomes ``key=value`` instead of ``value``. With a
            metric named like ``val/loss`` the former makes a subfolder.
        every_n_train_steps: Optimizer steps between checkpoints; 0 switches the trigger off.
        train_time_interval: Time between checkpoints; looked at after each batch, so they come a little later.
        every_n_epochs: Epochs between checkpoints; 0 switches the trigger off.
        save_on_train_epoch_end: Whether ``every_n_epochs`` counts ends of training epochs (True) or validations
            (False). By default the former, unless validation runs more than or less than once per epoch.
        enable_version_counter: Whether a file that is there already is left alone and ``-v1``, ``-v2``... is added
            to the name.
        async_save: Whether the files are written in the background: training waits for a copy in host memory only, and
            for the save before if that is still going on. A failed save raises at the end of the next batch. Only
            complete files count for ``save_top_k``, and loggers hear of no others. ``save_last=True`` writes a second
            file at the same moment, which has to wait for the first; ``"link"`` does not.

    Raises:
        MisconfigurationException: Arguments that exclude each other or are out of range.

    Example:
        >>> checkpoint = ModelCheckpoint("runs", monitor="val_loss", save_top_k=3, save_last=True)
        >>> checkpoint.format_checkpoint_name({"epoch": 1, "step": 20, "val_loss": 0.25}, "{epoch}-{val_loss:.1f}")
        '.../runs/epoch=1-val_loss=0.2.ckpt'
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: str = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
        async_save: bool = False,
    ) -> None:
        super().__init__()
        check_choice(filename, monitor, save_last, save_top_k, mode)
        triggers = checked_triggers(every_n_train_steps, every_n_epochs, train_time_interval)
        self.dirpath: str | None = None if dirpath is None else resolved_folder(dirpath, save_last)
        self.filename: str | None = filename
        self.monitor: str | None = monitor
        self.verbose: bool = verbose
        self.save_last: bool | Literal["link"] | None = save_last
        self.save_top_k: int = save_top_k
        self.save_on_exception: bool = save_on_exception
        self.save_weights_only: bool = save_weights_only
        self.mode: files.Mode = "min" if mode == "min" else "max"
        self.auto_insert_metric_name: bool = auto_insert_metric_name
        self.async_save: bool = async_save
        self._enable_version_counter: bool = enable_version_counter
        self._save_on_train_epoch_end: bool | None = save_on_train_epoch_end
        self._every_n_train_steps, self._every_n_epochs = triggers
        self._train_time_interval: timedelta | None = train_time_interval
        self._clock: AgreedClock | None = None

        self.current_score: Tensor | None = None
        self.best_k_models: dict[str, Tensor] = {}
        self.best_model_path: str = ""
        self.best_model_score: Tensor | None = None
        self.kth_best_model_path: str = ""
        self.kth_value: Tensor = files.worst_score(self.mode)
        self.last_model_path: str = ""
        self._last_checkpoint_saved: str = ""
        self._last_global_step_saved: int = 0
        # Files of this run, among them those that are still being written in the background.
        self._written: set[str] = set()
        # Files that go as soon as no link points to them any more.
        self._obsolete: list[str] = []
        self._unconfirmed = files.UnconfirmedSave(self)
        self._has_validated = self._has_saved_last = self._defer_save_until_validation = self._has_warned = False

    @property
    def state_key(self) -> str:
        """The key of this callback's state: it names the metric and the triggers."""
        return self._generate_state_key(
            monitor=self.monitor,
            mode=self.mode,
            every_n_train_steps=self._every_n_train_steps,
            every_n_epochs=self._every_n_epochs,
            train_time_interval=self._train_time_interval,
        )

    every_n_epochs: int = reads("_every_n_epochs", "Epochs between checkpoints, 0 when epochs are no trigger.")

    # When to save -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder; all ranks take that of rank 0, whose logger knows the version."""
        self._unconfirmed = files.UnconfirmedSave(self)
        if self.async_save and stage == "fit":
            from levin.checkpoint.background import in_background

            trainer.strategy.checkpoint_io = in_background(trainer.strategy.checkpoint_io)
        found = self._resolve_ckpt_dir(trainer) if trainer.is_global_zero else ""
        self.dirpath = trainer.strategy.broadcast(found)
        if stage == "fit" and trainer.is_global_zero and self.save_top_k != 0 and list_folder(self.dirpath):
            rank_zero_warn(f"Checkpoint directory {self.dirpath} exists and is not empty.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._has_validated = self._has_saved_last = self._defer_save_until_validation = False
        self._written = set()
        if trainer.global_step < self._last_global_step_saved:
            # The callback has been in another run, whose steps say nothing about this one.
            self._last_global_step_saved = 0
        if self._train_time_interval is not None:
            self._clock = AgreedClock(self._train_time_interval.total_seconds(), trainer)
        if self._every_n_train_steps >= 1 and not pl_module.automatic_optimization:
            rank_zero_warn(
                "ModelCheckpoint(every_n_train_steps=...) with manual optimization saves the state after the batch's "
                "optimizer steps. Call trainer.save_checkpoint in training_step to save an earlier one."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Save when so many steps, or so much time, have passed."""
        self._note_written(trainer)
        if self._clock is not None:
            is_due = self._clock.is_due(trainer)
        else:
            is_due = self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0
        if not is_due or self._should_skip_saving_checkpoint(trainer):
            return
        if self._clock is not None:
            self._clock.restart(trainer)
        if self._must_wait_for_validation(trainer):
            self._defer_save_until_validation = True
        else:
            self._save(trainer, is_always_last=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when so many epochs have passed."""
        if self._is_due_after_epoch(trainer) and self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save when so many epochs have passed, or when a save has waited for this validation's metrics."""
        self._has_validated = self._has_validated or not trainer.sanity_checking
        if self._defer_save_until_validation and not self._should_skip_saving_checkpoint(trainer):
            self._defer_save_until_validation = False
            # A value that the training epoch logs comes later than this.
            if self.monitor in self._monitor_candidates(trainer) or not self._should_save_on_train_epoch_end(trainer):
                self._save(trainer, is_always_last=True)
        elif self._is_due_after_epoch(trainer) and not self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)

    def _is_due_after_epoch(self, trainer: Trainer) -> bool:
        every_n = self._every_n_epochs
        is_due = every_n >= 1 and (trainer.current_epoch + 1) % every_n == 0
        return is_due and not self._should_skip_saving_checkpoint(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last`` if nothing else has kept the end of training, and wait for what is in the background."""
        if not self._should_skip_saving_checkpoint(trainer):
            if self._defer_save_until_validation:
                self._defer_save_until_validation = False
                self._save(trainer, is_always_last=True)
            elif self.save_last and (not self._has_saved_last or (self.save_top_k == 0 and self._every_n_epochs >= 1)):
                self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        trainer.strategy.finish_saves()
        self._note_written(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for what is in the background, and save what there is, if the user asked for it."""
        trainer.strategy.checkpoint_io.on_exception(exception)
        self._note_written(trainer)
        self._written.discard(self._unconfirmed.give_up())
        if self.save_on_exception and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            path = self._get_metric_interpolated_filepath_name(candidates, trainer)
            self._save_checkpoint(trainer, path)
            if self.save_last:
                self._save_last_checkpoint(trainer, candidates)
            rank_zero_info(f"{type(exception).__name__} was raised ({exception}); saved a checkpoint to {path}")
            trainer.strategy.finish_saves()
            self._note_written(trainer)

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        given = self._save_on_train_epoch_end
        return not validates(trainer) or validates_once_per_epoch(trainer) if given is None else given

    def _must_wait_for_validation(self, trainer: Trainer) -> bool:
        """Whether the monitored metric is not there yet, or about to be renewed."""
        if self.monitor is None:
            return False
        if self.monitor not in self._monitor_candidates(trainer):
            return True
        return not self._should_save_on_train_epoch_end(trainer) and validates_after_last_batch(trainer)

    # What to save, and which files stay -------------------------------------------------------------------------------

    def _save(self, trainer: Trainer, is_always_last: bool = False) -> None:
        self._wait_for_save(trainer)
        candidates = self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        is_saved = self._last_global_step_saved == trainer.global_step
        if self.save_last and (is_always_last or is_saved or self.save_top_k == 0):
            self._save_last_checkpoint(trainer, candidates)
        self._remove_obsolete(trainer)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.save_top_k == 0:
            return
        if self.monitor is None:
            self._save_none_monitor_checkpoint(trainer, monitor_candidates)
        elif self.monitor in monitor_candidates:
            self._save_monitor_checkpoint(trainer, monitor_candidates)
        else:
            files.report_missing(self.monitor, monitor_candidates, is_error=self._has_validated)

    def _save_none_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save; the newest file counts as the best."""
        previous = self.best_model_path
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, previous)
        with self._unconfirmed.undone_if_it_fails():
            self.best_model_path = path
            self._save_checkpoint(trainer, path)
        if self.save_top_k == 1:
            self._replace(trainer, previous, path)

    def _save_monitor_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        assert self.monitor is not None
        current = monitor_candidates[self.monitor]
        if self.check_monitor_top_k(trainer, current):
            self._update_best_and_save(current, trainer, monitor_candidates)
        elif self.verbose:
            rank_zero_info(
                f"{files.describe_position(monitor_candidates)}: {self.monitor!r} was not in top {self.save_top_k}"
            )

    def _update_best_and_save(self, current: Tensor, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save a file with the score ``current``, in the place of the worst one if there are enough."""
        score = files.comparable(current, self.mode)
        is_full = 0 < self.save_top_k <= len(self.best_k_models)
        previous = self.kth_best_model_path if is_full else ""
        path = self._get_metric_interpolated_filepath_name(monitor_candidates, trainer, previous)
        ranking = files.ranked(self.best_k_models, path, score, self.save_top_k, self.mode)
        best_score = ranking.scores[ranking.best]
        if self.verbose:
            rank_zero_info(
                f"{files.describe_position(monitor_candidates)}: {self.monitor!r} reached {float(score):0.5f} "
                f"(best {float(best_score):0.5f}), saving model to {path!r} as top {len(ranking.scores)}"
            )
        with self._unconfirmed.undone_if_it_fails():
            self.current_score, self.best_k_models = score, ranking.scores
            self.best_model_path, self.best_model_score = ranking.best, best_score
            if ranking.worst:
                self.kth_best_model_path, self.kth_value = ranking.worst, ranking.scores[ranking.worst]
            self._save_checkpoint(trainer, path)
        self._replace(trainer, previous, path)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        """Save under the name ``last``, or let a link of that name point to the newest file."""
        if not self.save_last:
            return
        name = partial(self.format_checkpoint_name, monitor_candidates, self.CHECKPOINT_NAME_LAST)
        previous = reusable = self.last_model_path
        if not previous and self.save_last == "link" and trainer.ckpt_path is not None and os.path.islink(name(None)):
            # The file that the link points to, and the run went on from, was written before there was a link.
            reusable = name(None)
        path = self._free_path(trainer, name, reusable)
        # A resumed run may have saved nothing but `last` so far, and a link must not point to itself.
        can_link = self._last_checkpoint_saved not in ("", previous)
        if self.save_last == "link" and can_link and self.save_top_k != 0:
            self._link_checkpoint(trainer, self._last_checkpoint_saved, path)
            self.last_model_path = path
        else:
            self._wait_for_save(trainer)
            with self._unconfirmed.undone_if_it_fails():
                self.last_model_path = path
                self._save_checkpoint(trainer, path)
        self._has_saved_last = True
        if self._should_remove_checkpoint(trainer, previous, path):
            self._remove_checkpoint(trainer, previous)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with self._unconfirmed.undone_if_it_fails():
            self._last_global_step_saved = trainer.global_step  # so that the file says so
            with trainer.strategy.checkpoint_io.request(filepath, self.async_save) as save:
                trainer.save_checkpoint(filepath, self.save_weights_only)
        self._written.add(filepath)
        self._last_checkpoint_saved = filepath
        self._unconfirmed.watch(save)
        self._note_written(trainer)

    def _link_checkpoint(self, trainer: Trainer, filepath: str, linkpath: str) -> None:
        if trainer.is_global_zero:
            # A link to a file that is still being written would point to nothing if the process died now.
            self._unconfirmed.then(lambda: replace_link(filepath, linkpath), f"Linking {linkpath}")
        trainer.strategy.barrier()

    def _replace(self, trainer: Trainer, previous: str, current: str) -> None:
        """Remove ``previous``, in whose place ``current`` is: at once, or when the link has moved on."""
        if self._should_remove_checkpoint(trainer, previous, current):
            if self.save_last == "link":
                self._obsolete.append(previous)
            else:
                self._remove_checkpoint(trainer, previous)

    def _remove_obsolete(self, trainer: Trainer) -> None:
        while self._obsolete:
            self._remove_checkpoint(trainer, self._obsolete.pop(0))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Delete a file, or let it be deleted once those that are being written are there."""
        trainer.strategy.remove_checkpoint(filepath)
        self._written.discard(filepath)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Whether ``previous`` is a file of this callback's own, neither written anew nor the one the run began with."""
        if not previous or previous == current or self.dirpath is None:
            return False
        began_with = trainer.ckpt_path
        is_start = began_with is not None and absolute(began_with) == absolute(previous)
        return not is_start and is_inside(previous, self.dirpath)

    def _wait_for_save(self, trainer: Trainer) -> None:
        self._unconfirmed.wait()
        self._note_written(trainer)

    def _note_written(self, trainer: Trainer) -> None:
        """Tell the loggers of the file that was being written, if it is complete by now."""
        if self._unconfirmed.confirm() and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    # Metrics and names ------------------------------------------------------------------------------------------------

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether a checkpoint with the score ``current`` is among the best; all ranks must agree."""
        if current is None:
            return False
        if self.save_top_k == -1 or len(self.best_k_models) < self.save_top_k:
            return True
        is_better = files.improves(current, self.best_k_models[self.kth_best_model_path], self.mode)
        return trainer.strategy.reduce_boolean_decision(is_better)

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        """Return the logged metrics with ``epoch`` and ``step``; the monitored one is the same on all ranks."""
        candidates = files.logged_metrics(trainer)
        if self.monitor is not None:
            disagreement = files.take_from_first_rank(trainer, candidates, self.monitor)
            if disagreement and not self._has_warned:
                self._has_warned = True
                rank_zero_warn(disagreement)
        return candidates

    def format_checkpoint_name(
        self, metrics: Metrics, filename: str | None = None, ver: int | None = None, prefix: str | None = None
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
        name = files.fill_template(template, metrics, self.auto_insert_metric_name, self.CHECKPOINT_EQUALS_CHAR)
        parts = [prefix or "", name, "" if ver is None else f"v{ver}"]
        return os.path.join(self.dirpath or "", join.join(part for part in parts if part) + self.FILE_EXTENSION)

    def _get_metric_interpolated_filepath_name(
        self, monitor_candidates: dict[str, Tensor], trainer: Trainer, del_filepath: str | None = None
    ) -> str:
        """Return the path of the next file; that of ``del_filepath``, which goes, may be used again."""
        name = partial(self.format_checkpoint_name, monitor_candidates, None)
        return self._free_path(trainer, name, del_filepath or "")

    def _free_path(self, trainer: Trainer, name: Callable[[int | None], str], reusable: str = "") -> str:
        """Return the path to write to; it is free, or ``reusable``, or the user wants files to be replaced."""

        def of_rank_zero(version: int | None) -> str:
            return trainer.strategy.broadcast(name(version) if trainer.is_global_zero else "")

        def is_taken(path: str) -> bool:
            if not self._enable_version_counter or path == reusable:
                return False
            return self.file_exists(path, trainer) or trainer.strategy.broadcast(path in self._written)

        return files.first_free_name(of_rank_zero, is_taken, self.STARTING_VERSION)

    def file_exists(self, filepath: str | os.PathLike[str], trainer: Trainer) -> bool:
        """Return whether rank 0 sees a file at ``filepath``; called on all ranks."""
        return trainer.strategy.broadcast(trainer.is_global_zero and exists(filepath))

    def _resolve_ckpt_dir(self, trainer: Trainer) -> str:
        """Return the folder for the files: the user's, or one in that of the first logger."""
        return self.dirpath or files.default_folder(trainer.default_root_dir, trainer.loggers)

    __resolve_ckpt_dir = _resolve_ckpt_dir  # stable-pretraining calls it by this name

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        directory = self._resolve_ckpt_dir(trainer)
        is_last = files.template_pattern(self.CHECKPOINT_NAME_LAST, self.FILE_EXTENSION)
        return {path for path in list_folder(directory) if is_last.fullmatch(os.path.basename(path))}

    # State ------------------------------------------------------------------------------------------------------------

    def run_state(self) -> StateDict:
        """Return what was saved and decided in the present run."""
        return {key: getattr(self, name) for key, name in files.RUN_STATE.items()}

    def load_run_state(self, state: dict[str, object]) -> None:
        """Put :meth:`run_state` back."""
        vars(self).update({name: state[key] for key, name in files.RUN_STATE.items()})

    def state_dict(self) -> StateDict:
        """Return the kept files and their scores."""
        return {name: getattr(self, name) for name in ("monitor", "best_model_path", "dirpath", *files.OF_ONE_FOLDER)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Put the kept files back; with another folder than before only the path of the best one."""
        vars(self).update(files.files_from(state_dict, self.dirpath))

    def to_yaml(self, filepath: str | os.PathLike[str] | None = None) -> None:
        """Write the paths and scores of the kept files.

        Args:
            filepath: Where to, by default ``best_k_models.yaml`` in the checkpoints' folder.
        """
        import yaml

        with open_file(filepath or os.path.join(self.dirpath or "", "best_k_models.yaml"), "w") as file:
            yaml.dump({path: score.item() for path, score in self.best_k_models.items()}, file)
