"""A progress bar that draws by the clock: when to draw, without the drawing."""

from __future__ import annotations

import builtins
import math
import sys
from abc import abstractmethod
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from levin.callbacks.progress.lines import END_INTERVAL_S, LINE_INTERVAL_S, format_line
from levin.callbacks.progress.progress_bar import Metrics, ProgressBar, convert_inf
from levin.callbacks.progress.terminal import draws_in_place

if TYPE_CHECKING:
    from levin.module import LightningModule
    from levin.trainer import Trainer
    from levin.utilities.types import STEP_OUTPUT

DRAW_INTERVAL_S = 0.1
"""Least time between two drawings of a running loop."""
MAX_DRAW_INTERVAL_S = 1.0
DRAW_SHARE = 0.02
"""Part of the time that may go into drawing: a slow terminal, or a wait for the device, makes drawings rarer."""
MAX_CHANGES_AT_ONCE = 8
"""How many beginnings and ends of loops may be drawn in a burst, where each would otherwise wait for the clock."""

TRAIN, SANITY, VALIDATE, TEST, PREDICT = "train", "sanity_check", "validate", "test", "predict"


@dataclass
class ShownLoop:
    """One pass over a loader, as a bar shows it.

    Args:
        stage: Which bar.
        description: Label of the bar.
        total: Number of batches; infinite if unknown.
        first: How many batches were done before this run.
        done: How many batches are done.
        start: ``time.monotonic()`` at the beginning.
    """

    stage: str
    description: str
    total: int | float = math.inf
    first: int = 0
    done: int = 0
    start: float = field(default_factory=monotonic)


class ClockedProgressBar(ProgressBar):
    """Base of the bars that are drawn at most ten times a second, and as lines of text where no terminal is.

    Between two drawings a batch costs one look at the clock. The values of ``self.log`` are read only for a
    drawing; the last state of a bar that stays on the screen is exact.

    Args:
        refresh_rate: An upper bound on how often the bar is drawn, in the unit of the subclass; 0 turns it off.
        leave: Whether the bar of each epoch stays on the screen.

    Raises:
        ValueError: ``refresh_rate`` is negative or no number.
    """

    def __init__(self, refresh_rate: int, leave: bool) -> None:
        super().__init__()
        if not isinstance(refresh_rate, (int, float)) or refresh_rate < 0:
            raise ValueError(f"refresh_rate must be >= 0, received {refresh_rate!r}. Use 0 to turn the bar off.")
        self._refresh_rate: int = refresh_rate
        self._leave: bool = leave
        self._enabled: bool = True
        self._is_terminal: bool = True
        # time.monotonic() of the earliest next drawing; infinite while there is nothing to draw.
        self._next_draw: float = math.inf
        self._interval_s: float = DRAW_INTERVAL_S
        self._last_cost: float = 0.0
        self._next_end_line: float = -math.inf
        self._changes_left: float = MAX_CHANGES_AT_ONCE
        self._last_change: float = -math.inf
        self._train_done: int = 0
        self._train_loop: ShownLoop | None = None
        self._is_train_stale: bool = False
        self._eval_done: int = 0
        self._eval_loop: ShownLoop | None = None

    @property
    def refresh_rate(self) -> int:
        """The upper bound on how often the bar is drawn."""
        return self._refresh_rate

    @property
    def is_enabled(self) -> bool:
        """Whether the bar is shown in this process."""
        return self._enabled and self._refresh_rate > 0

    @is_enabled.setter
    def is_enabled(self, value: bool) -> None:
        self._enabled = value

    def disable(self) -> None:
        """Show nothing in this process."""
        self._enabled = False
        self._next_draw = math.inf
        self._close_all()

    def enable(self) -> None:
        """Show the bar again after :meth:`disable`."""
        self._enabled = True
        if self._train_loop is not None or self._eval_loop is not None:
            self._start_clock()

    # ---------------------------------------------------------------- what a subclass draws

    @abstractmethod
    def _draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        """Show the loop in the bar of its stage; None leaves the values that are there."""

    @abstractmethod
    def _close(self, stage: str, keep: bool) -> None:
        """Let the bar of ``stage`` stay on the screen as it is, or take it away. Safe to call without a bar."""

    @abstractmethod
    def _close_all(self) -> None:
        """Leave everything as it is on the screen and give the terminal back. Safe to call twice."""

    @abstractmethod
    def _is_batch_due(self, done: int, total: int | float) -> bool:
        """Return whether ``refresh_rate`` allows a drawing after ``done`` batches."""

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"

    def _get_eval_description(self, label: str, dataloader_idx: int, num_dataloaders: int) -> str:
        return f"{label} DataLoader {dataloader_idx}"

    # ---------------------------------------------------------------- the clock

    def _start_clock(self) -> None:
        """Let the batches of the loop that begins be drawn."""
        if self._next_draw == math.inf:
            self._next_draw = 0.0 if self._is_terminal else monotonic() + LINE_INTERVAL_S

    def _draw_timed(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        """Draw, and set the clock for the next time."""
        start = monotonic()
        self._draw(loop, metrics)
        end = monotonic()
        # One slow drawing may be the first, which imports and sets up; two are a slow terminal or device.
        cost = min(end - start, self._last_cost)
        self._last_cost = end - start
        self._next_draw = end + max(min(cost / DRAW_SHARE, MAX_DRAW_INTERVAL_S), self._interval_s)

    def _may_draw_change(self) -> bool:
        """Return whether the beginning or the end of a loop may be drawn now; many short loops may not draw all."""
        now = monotonic()
        refilled = self._changes_left + (now - self._last_change) / DRAW_INTERVAL_S
        self._changes_left, self._last_change = min(refilled, MAX_CHANGES_AT_ONCE), now
        if not self._is_terminal or self._changes_left < 1:
            return False
        self._changes_left -= 1
        return True

    # ---------------------------------------------------------------- training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the trainer, be silent on every rank but 0, and look at where the output goes."""
        super().setup(trainer, pl_module, stage)
        self._is_terminal = draws_in_place(sys.stdout)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar; within an epoch that goes on after a resume, at its place there."""
        self._train_loop = None
        if self.is_enabled and trainer.fit_loop.restarted_mid_epoch:
            self._begin_epoch(trainer, first=int(trainer.fit_loop.epoch_loop.batch_progress.current.ready))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the bar again."""
        if self.is_disabled:
            return
        # The epoch before is closed only here, when the values of the whole epoch are there.
        if self._train_loop is not None and self._train_done > 0:
            if not self._is_terminal:
                if monotonic() >= self._next_end_line:
                    self._write_train_line(trainer, pl_module)
                    self._next_end_line = monotonic() + END_INTERVAL_S
            elif self._leave:
                self._draw_train(trainer, pl_module)
                self._close(TRAIN, keep=True)
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Trainer, first: int = 0) -> None:
        description = self._get_train_description(trainer.current_epoch)
        self._train_loop = ShownLoop(TRAIN, description, self.total_train_batches, first, first)
        self._train_done = first
        self._start_clock()
        if self._may_draw_change():
            self._draw_timed(self._train_loop, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Count, and draw if it is time."""
        self._train_done = batch_idx + 1
        if monotonic() < self._next_draw:
            return
        if not self._is_terminal:
            self._write_train_line(trainer, pl_module)
        elif self._is_batch_due(batch_idx + 1, self.total_train_batches):
            self._draw_train(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last batch."""
        if self.is_enabled and self._may_draw_change():
            self._draw_train(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last epoch on the screen."""
        if self.is_enabled and self._train_loop is not None and self._train_done > 0:
            if self._is_terminal:
                self._draw_train(trainer, pl_module)
            else:
                self._write_train_line(trainer, pl_module)
            self._close(TRAIN, keep=True)
        self._stop()

    def _draw_train(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._train_loop is not None:
            self._train_loop.done = self._train_done
            self._draw_timed(self._train_loop, self.get_metrics(trainer, pl_module))
            self._is_train_stale = False

    def _write_train_line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._train_loop is not None:
            self._train_loop.done = self._train_done
            self._write_line(self._train_loop, self.get_metrics(trainer, pl_module))

    def _write_line(self, loop: ShownLoop, metrics: Metrics) -> None:
        self._draw(loop, metrics)  # into nothing, for those who read the state of the bar
        now = monotonic()
        total = convert_inf(loop.total)
        line = format_line(
            loop.description.strip(), loop.done, total, now - loop.start, loop.done - loop.first, metrics
        )
        self._print_line(line)
        self._next_draw = now + LINE_INTERVAL_S

    def _print_line(self, line: str) -> None:
        builtins.print(line, flush=True)

    # ---------------------------------------------------------------- evaluation

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the sanity check."""
        self._begin_eval(SANITY)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar of the sanity check away."""
        self._end_eval(keep=False)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the validation, below that of the training if there is one."""
        if not trainer.sanity_checking:
            self._is_train_stale = self._train_loop is not None
            self._begin_eval(VALIDATE)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the bar away in fit, with the new values at the training bar; else leave it."""
        if trainer.sanity_checking:
            return
        is_fit = self._train_loop is not None
        self._end_eval(keep=not is_fit)
        if is_fit and self.is_enabled and self._may_draw_change():
            self._draw_train(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the test."""
        self._begin_eval(TEST)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar of the test."""
        self._end_eval(keep=True)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar of the prediction."""
        self._begin_eval(PREDICT)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar of the prediction."""
        self._end_eval(keep=True)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Start the bar again when the next loader begins."""
        if dataloader_idx != self._current_eval_dataloader_idx:
            self._begin_dataloader(dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and draw if it is time."""
        self._eval_done = batch_idx + 1
        if monotonic() < self._next_draw:
            return
        self._show_eval_batch()

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_predict_batch_start = on_validation_batch_start
    on_predict_batch_end = on_validation_batch_end

    def _begin_eval(self, stage: str) -> None:
        self.reset_dataloader_idx_tracker()
        self._eval_done = 0
        if self.is_enabled:
            self._eval_loop = ShownLoop(stage, self._eval_label(stage))
            self._start_clock()

    def _begin_dataloader(self, dataloader_idx: int) -> None:
        self._finish_dataloader()
        self.has_dataloader_changed(dataloader_idx)
        self._eval_done = 0
        if self._eval_loop is not None and self.is_enabled:
            stage = self._eval_loop.stage
            totals = self._eval_totals(stage)
            description = self._get_eval_description(self._eval_label(stage), dataloader_idx, len(totals))
            self._eval_loop = ShownLoop(stage, description, totals[dataloader_idx])
            if self._may_draw_change():
                self._draw_eval(self._eval_loop)

    def _draw_eval(self, loop: ShownLoop) -> None:
        if self._is_train_stale and self._train_loop is not None:
            # The last batch before the validation may have come too soon after another to be drawn.
            self._train_loop.done = self._train_done
            self._draw(self._train_loop, None)
            self._is_train_stale = False
        self._draw_timed(loop, None)

    def _show_eval_batch(self) -> None:
        loop = self._eval_loop
        if loop is None:
            return
        loop.done = self._eval_done
        if not self._is_terminal:
            self._write_line(loop, {})
        elif self._is_batch_due(loop.done, loop.total):
            self._draw_eval(loop)

    def _finish_dataloader(self) -> None:
        """Show the end of a loader; in a log only where it is not a part of fit."""
        loop = self._eval_loop
        if loop is None or self._eval_done == 0 or self.is_disabled:
            return
        loop.done = self._eval_done
        is_fit = loop.stage == SANITY or self._train_loop is not None
        if not self._is_terminal and not is_fit:
            self._write_line(loop, {})
        elif not is_fit or self._may_draw_change():
            self._draw_eval(loop)

    def _end_eval(self, keep: bool) -> None:
        self._finish_dataloader()
        if self._eval_loop is not None:
            self._close(self._eval_loop.stage, keep)
        self._eval_loop = None
        self.reset_dataloader_idx_tracker()
        if keep:
            self._stop()

    def _eval_label(self, stage: str) -> str:
        labels = {
            SANITY: self.sanity_check_description,
            VALIDATE: self.validation_description,
            TEST: self.test_description,
            PREDICT: self.predict_description,
        }
        return labels[stage]

    def _eval_totals(self, stage: str) -> list[int | float]:
        trainer = self.trainer
        totals = {
            SANITY: trainer.num_sanity_val_batches,
            VALIDATE: trainer.num_val_batches,
            TEST: trainer.num_test_batches,
            PREDICT: trainer.num_predict_batches,
        }
        return list(totals[stage])

    # ---------------------------------------------------------------- the end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the bars where they were, so that the traceback begins on a line of its own."""
        for loop, done in ((self._train_loop, self._train_done), (self._eval_loop, self._eval_done)):
            if loop is not None and done > 0 and self.is_enabled:
                loop.done = done
                self._draw(loop, None)  # no values: the device they are on may be what failed
                self._close(loop.stage, keep=True)
        self._eval_loop = None
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._stop()

    def _stop(self) -> None:
        self._next_draw = math.inf
        self._train_loop = None
        self._close_all()
