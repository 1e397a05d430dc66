"""ModelCheckpoint: saves the run every so often and keeps the best files."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from levin.callbacks.checkpoint_files import is_nonempty_directory
from levin.callbacks.checkpoint_keeper import CheckpointKeeper
from levin.callbacks.checkpoint_trigger import (
    check_triggers,
    validates,
    validates_after_last_batch,
    validates_once_per_epoch,
)
from levin.checkpoint.background import AsyncCheckpointIO
from levin.ranks.clock import AgreedClock
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn

if TYPE_CHECKING:
    from levin.module import LightningModule
    from levin.protocols import Trainer
    from levin.utilities.types import STEP_OUTPUT


class ModelCheckpoint(CheckpointKeeper):
    """Saves a checkpoint every so many epochs, steps or minutes and keeps the newest or the best ones.

    At most one of ``every_n_train_steps``, ``every_n_epochs`` and ``train_time_interval`` may be given; with none of
    them a checkpoint is saved after each epoch.

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
        super().__init__(
            dirpath, filename, monitor, verbose, save_last, save_top_k, save_weights_only, mode, auto_insert_metric_name,
            enable_version_counter, async_save,
        )  # fmt: skip
        check_triggers(every_n_train_steps, every_n_epochs, train_time_interval)
        self.save_on_exception: bool = save_on_exception
        self._save_on_train_epoch_end: bool | None = save_on_train_epoch_end
        has_trigger = not (every_n_train_steps is None and every_n_epochs is None and train_time_interval is None)
        self._every_n_train_steps: int = every_n_train_steps or 0
        self._every_n_epochs: int = (every_n_epochs or 0) if has_trigger else 1
        self._train_time_interval: timedelta | None = train_time_interval
        self._clock: AgreedClock | None = None

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

    @property
    def every_n_epochs(self) -> int:
        """Epochs between checkpoints, 0 when epochs are no trigger."""
        return self._every_n_epochs

    # When to save -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle the folder; all ranks take that of rank 0, whose logger knows the version."""
        self._pending = None
        if self.async_save and stage == "fit" and self._find_background(trainer) is None:
            self._background = AsyncCheckpointIO(trainer.strategy.checkpoint_io)
        found = self._resolve_ckpt_dir(trainer) if trainer.is_global_zero else ""
        dirpath: str = trainer.strategy.broadcast(found)
        self.dirpath = dirpath
        if stage == "fit" and trainer.is_global_zero and self.save_top_k != 0 and is_nonempty_directory(dirpath):
            rank_zero_warn(f"Checkpoint directory {dirpath} exists and is not empty.")

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
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save when so many steps, or so much time, have passed."""
        if trainer.run is None or trainer.run.agreement is None:
            self._settle(trainer, should_wait=False)
        if not self._is_due_after_batch(trainer) or self._should_skip_saving_checkpoint(trainer):
            return
        if self._clock is not None:
            self._clock.restart(trainer)
        if self._must_wait_for_validation(trainer):
            self._defer_save_until_validation = True
        else:
            self._save(trainer, is_always_last=True)

    def _is_due_after_batch(self, trainer: Trainer) -> bool:
        if self._clock is not None:
            return self._clock.is_due(trainer)
        return self._every_n_train_steps >= 1 and trainer.global_step % self._every_n_train_steps == 0

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
            if self.monitor in trainer.callback_metrics or not self._should_save_on_train_epoch_end(trainer):
                self._save(trainer, is_always_last=True)
        elif self._is_due_after_epoch(trainer) and not self._should_save_on_train_epoch_end(trainer):
            self._save(trainer)

    def _is_due_after_epoch(self, trainer: Trainer) -> bool:
        every_n = self._every_n_epochs
        return (
            every_n >= 1
            and (trainer.current_epoch + 1) % every_n == 0
            and not self._should_skip_saving_checkpoint(trainer)
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last`` if nothing else has kept the end of training, and wait for what is in the background."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_end(trainer)
        self._settle(trainer, should_wait=True)

    def _save_end(self, trainer: Trainer) -> None:
        if self._defer_save_until_validation:
            self._defer_save_until_validation = False
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        if self.save_last and (not self._has_saved_last or (self.save_top_k == 0 and self._every_n_epochs >= 1)):
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Wait for what is in the background, and save what there is, if the user asked for it."""
        self._settle_failed_run(trainer, exception)
        try:
            if self.save_on_exception and not self._should_skip_saving_checkpoint(trainer):
                self._save_failed_run(trainer, exception)
                self._settle(trainer, should_wait=True)
        finally:
            self._leave_background()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give back the memory for saving in the background."""
        self._leave_background()

    def _save_failed_run(self, trainer: Trainer, exception: BaseException) -> None:
        candidates = self._monitor_candidates(trainer)
        path = self._free_path(trainer, self._names(candidates))
        self._save_checkpoint(trainer, path)
        if self.save_last:
            self._save_last_checkpoint(trainer, candidates)
        rank_zero_info(f"{type(exception).__name__} was raised ({exception}); saved a checkpoint to {path}")

    def _should_skip_saving_checkpoint(self, trainer: Trainer) -> bool:
        return (
            bool(trainer.fast_dev_run)
            or trainer.state.fn != "fit"
            or trainer.sanity_checking
            or self._last_global_step_saved == trainer.global_step
        )

    def _should_save_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self._save_on_train_epoch_end is not None:
            return self._save_on_train_epoch_end
        return not validates(trainer) or validates_once_per_epoch(trainer)

    def _must_wait_for_validation(self, trainer: Trainer) -> bool:
        """Whether the monitored metric is not there yet, or about to be renewed."""
        if self.monitor is None:
            return False
        if self.monitor not in self._monitor_candidates(trainer):
            return True
        return not self._should_save_on_train_epoch_end(trainer) and validates_after_last_batch(trainer)
