"""A progress bar that is drawn by the clock: when to draw, without the drawing."""

from __future__ import annotations

import builtins
import math
import sys
from time import monotonic
from typing import Any

from typing_extensions import override

from levin.callbacks.progress.lines import describe, format_seconds
from levin.callbacks.progress.progress_bar import Metrics, ProgressBar
from levin.callbacks.progress.renderer import PREDICT, SANITY, TEST, TRAIN, VALIDATE, Renderer, ShownLoop
from levin.callbacks.progress.terminal import draws_in_place
from levin.data.combined import combined_length
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.numbers import plain_number
from levin.utilities.properties import reads
from levin.utilities.types import STEP_OUTPUT, Batch

DRAW_INTERVAL_S = 0.1
"""Least time between two drawings of a running loop."""
MAX_DRAW_INTERVAL_S = 1.0
DRAW_SHARE = 0.02
"""Part of the time that may go into drawing: a slow terminal, or a wait for the device, makes drawings rarer."""
MAX_CHANGES_AT_ONCE = 8
"""How many beginnings and ends of loops may be drawn in a burst, where each would otherwise wait for the clock."""
LINE_INTERVAL_S = 60.0
"""Least time between two lines of a log about one unfinished loop."""
NOTE_AFTER_S = 2.0
"""Seconds after which the time that a run has left is worth a guess."""
MIN_SAMPLES, MIN_NOTED_SHARE = 20, 0.05
"""How often it was looked, and which part of the time must wait for data, before that is shown."""
LINE_END_INTERVAL_S = 10.0
"""Least time between the lines of a log that end an epoch; the last epoch always has its line."""


class DrawClock:
    """Says when the next drawing is due.

    Args:
        interval_s: Least time between two drawings of a running loop.
        end_interval_s: Least time between the drawings of two finished epochs.
        burst: How many beginnings and ends of loops may be drawn at once.
    """

    def __init__(self, interval_s: float, end_interval_s: float = 0.0, burst: int = MAX_CHANGES_AT_ONCE) -> None:
        self.interval_s: float = interval_s
        self.next: float = math.inf
        """``time.monotonic()`` of the earliest next drawing; infinite while there is nothing to draw."""
        self._end_interval_s: float = end_interval_s
        self._next_end: float = -math.inf
        self._burst: int = burst
        self._changes_left: float = burst
        self._last_change: float = -math.inf
        self._last_cost_s: float = 0.0

    def start(self) -> None:
        """Let the batches of the loop that begins be drawn, at once in a terminal, after the interval in a log."""
        if self.next == math.inf:
            self.next = 0.0 if self._burst else monotonic() + self.interval_s

    def stop(self) -> None:
        """Let nothing be drawn."""
        self.next = math.inf

    def set_next(self, start: float) -> None:
        """Set the time of the next drawing, now that one is done which began at ``start``."""
        end = monotonic()
        # One slow drawing may be the first, which imports and sets up; two are a slow terminal or device.
        cost_s = min(end - start, self._last_cost_s)
        self._last_cost_s = end - start
        self.next = end + max(min(cost_s / DRAW_SHARE, MAX_DRAW_INTERVAL_S), self.interval_s)

    def may_draw_change(self) -> bool:
        """Return whether the beginning or the end of a loop may be drawn now; many short loops may not draw all."""
        now = monotonic()
        refilled = self._changes_left + (now - self._last_change) / DRAW_INTERVAL_S
        self._changes_left, self._last_change = min(refilled, self._burst), now
        if self._changes_left < 1:
            return False
        self._changes_left -= 1
        return True

    def may_draw_end(self) -> bool:
        """Return whether an epoch that is over, but not the last, may be drawn now."""
        if monotonic() < self._next_end:
            return False
        self._next_end = monotonic() + self._end_interval_s
        return True


class DrawnProgressBar(ProgressBar):
    """Base of the bars that are drawn at most ten times a second, and as lines of text where no terminal is.

    Between two drawings a batch costs one look at the clock. The values of ``self.log`` are read only for a
    drawing; the last state of a bar that stays on the screen is exact.

    Args:
        refresh_rate: An upper bound on how often the bar is drawn, in the unit of the subclass; 0 turns it off.
        leave: Whether the bar of each epoch stays on the screen.
        renderer: Draws the bars, into nothing where there is no terminal, for those who read their state.

    Raises:
        ValueError: ``refresh_rate`` is negative or no number.
    """

    def __init__(self, refresh_rate: int, leave: bool, renderer: Renderer) -> None:
        super().__init__()
        refresh_rate = plain_number(refresh_rate)
        if not isinstance(refresh_rate, (int, float)) or refresh_rate < 0:
            raise ValueError(f"refresh_rate must be >= 0, received {refresh_rate!r}. Use 0 to turn the bar off.")
        self._refresh_rate: int = refresh_rate
        self._leave: bool = leave
        self._enabled: bool = True
        self._is_terminal: bool = True
        self._renderer: Renderer = renderer
        # A drawing comes only after batches whose number is a multiple of this.
        self._draw_every: int = 1
        self._clock: DrawClock = DrawClock(DRAW_INTERVAL_S)
        self._train: ShownLoop | None = None
        self._eval: ShownLoop | None = None
        # When training began, and at which part of an epoch and step.
        self._began_s: float = 0.0
        self._began_at: tuple[float, int] = (0.0, 0)

    refresh_rate: int = reads("_refresh_rate", "The upper bound on how often the bar is drawn.")

    @override
    def disable(self) -> None:
        self._enabled = False
        self._clock.stop()
        self._renderer.stop()

    @override
    def enable(self) -> None:
        self._enabled = True
        if self._train is not None or self._eval is not None:
            self._clock.start()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._is_terminal = self._draws_in_place()
        if self._is_terminal:
            self._clock = DrawClock(self._min_interval_s())
        else:
            self._clock = DrawClock(LINE_INTERVAL_S, LINE_END_INTERVAL_S, burst=0)

    # ---- what a subclass says

    def _draws_in_place(self) -> bool:
        return draws_in_place(sys.stdout)

    def _min_interval_s(self) -> float:
        return DRAW_INTERVAL_S

    def _print_line(self, line: str) -> None:
        builtins.print(line, flush=True)

    def _get_train_description(self, current_epoch: int) -> str:
        return f"Epoch {current_epoch}"

    def _get_eval_description(self, label: str, dataloader_idx: int, num_dataloaders: int) -> str:
        return f"{label} DataLoader {dataloader_idx}"

    # ---- drawing

    def _draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        """Draw, and set the clock for the next time."""
        start = monotonic()
        loop.drawn = loop.done
        if not self._is_terminal:
            self._print_line(describe(loop, metrics or {}))
        self._renderer.draw(loop, metrics)
        self._clock.set_next(start)

    def _draw_train(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._train is not None:
            self._draw(self._train, {**self.get_metrics(trainer, pl_module), **self._notes(trainer, self._train)})

    def _notes(self, trainer: Trainer, loop: ShownLoop) -> Metrics:
        """Return what is shown behind the values: the time left of the whole run, the time that waits for data."""
        notes: Metrics = {}
        seconds, done = monotonic() - self._began_s, self._part_done(trainer, loop)
        if seconds >= NOTE_AFTER_S and 0 < done < 1:
            notes["run_left"] = format_seconds(seconds / done * (1 - done))
        shares = getattr(trainer.run, "time_shares", None)
        if shares is not None and shares.num_samples >= MIN_SAMPLES and shares.share("data") >= MIN_NOTED_SHARE:
            notes["data_wait"] = f"{shares.share('data'):.0%}"
        return notes

    def _part_done(self, trainer: Trainer, loop: ShownLoop) -> float:
        """Return which part of the run is done, by the limit that will end it first; 0 where it is one epoch, or endless."""
        first_epoch, first_step = self._began_at
        parts = [0.0]
        if trainer.max_epochs is not None and trainer.max_epochs > first_epoch + 1:
            in_epoch = loop.done / loop.total if loop.total else 0.0
            parts.append((trainer.current_epoch + in_epoch - first_epoch) / (trainer.max_epochs - first_epoch))
        if trainer.max_steps > first_step:
            parts.append((trainer.global_step - first_step) / (trainer.max_steps - first_step))
        return max(parts)

    def _draw_eval(self, loop: ShownLoop) -> None:
        if self._train is not None and self._train.drawn != self._train.done:
            # The last batch before the validation may have come too soon after another to be drawn.
            self._draw(self._train, None)
        self._draw(loop, None)

    def _is_batch_due(self, loop: ShownLoop) -> bool:
        return not self._is_terminal or loop.done % self._draw_every == 0 or loop.done == loop.total

    def _stop(self) -> None:
        self._clock.stop()
        self._train = self._eval = None
        self._renderer.stop()

    # ---- training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._train = None
        if self.is_disabled:
            return
        self._began_s, self._began_at = monotonic(), (trainer.current_epoch, trainer.global_step)
        if trainer.fit_loop.restarted_mid_epoch:
            self._begin_epoch(trainer, first=int(trainer.fit_loop.epoch_loop.batch_progress.current.ready))
        else:
            self._train = ShownLoop(TRAIN, self.train_description, self.total_train_batches)
            self._clock.start()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_disabled:
            return
        # The epoch before is closed only here, when the values of the whole epoch are there.
        leaves = self._leave or not self._is_terminal
        if self._train is not None and self._train.done > 0 and leaves and self._clock.may_draw_end():
            self._draw_train(trainer, pl_module)
            self._renderer.close(TRAIN, keep=True)
        self._begin_epoch(trainer)

    def _begin_epoch(self, trainer: Trainer, first: int = 0) -> None:
        description = self._get_train_description(trainer.current_epoch)
        self._train = ShownLoop(TRAIN, description, self.total_train_batches, first, done=first, drawn=first)
        self._clock.start()
        if self._clock.may_draw_change():
            self._draw(self._train, None)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        loop = self._train
        if loop is None:
            return
        loop.done = batch_idx + 1
        if monotonic() >= self._clock.next and self._is_batch_due(loop):
            self._draw_train(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled and self._clock.may_draw_change():
            self._draw_train(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_enabled and self._train is not None and self._train.done > 0:
            self._draw_train(trainer, pl_module)
            self._renderer.close(TRAIN, keep=True)
        self._stop()

    # ---- evaluation

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reset_dataloader_idx_tracker()
        if self.is_enabled:
            stage = str(trainer.state.stage)
            self._eval = ShownLoop(stage, getattr(self, _OF_STAGE[stage][0]))
            self._clock.start()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_dataloader()
        is_fit = trainer.sanity_checking or self._train is not None
        if self._eval is not None:
            self._renderer.close(self._eval.stage, keep=not is_fit)
        self._eval = None
        self.reset_dataloader_idx_tracker()
        if not is_fit:
            self._stop()
        elif self.is_enabled and self._clock.may_draw_change():
            self._draw_train(trainer, pl_module)  # with the values of the validation

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if dataloader_idx != self._current_eval_dataloader_idx:
            self._begin_dataloader(dataloader_idx)

    @override
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        loop = self._eval
        if loop is None:
            return
        loop.done = batch_idx + 1
        if monotonic() >= self._clock.next and self._is_batch_due(loop):
            self._draw_eval(loop)

    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_predict_batch_start = on_validation_batch_start
    on_predict_batch_end = on_validation_batch_end

    def _begin_dataloader(self, dataloader_idx: int) -> None:
        self._finish_dataloader()
        self.has_dataloader_changed(dataloader_idx)
        if self._eval is not None and self.is_enabled:
            stage = self._eval.stage
            label, loop, num_batches = _OF_STAGE[stage]
            totals = getattr(self.trainer, num_batches)
            description = self._get_eval_description(getattr(self, label), dataloader_idx, len(totals))
            loader = getattr(self.trainer, loop)._combined_loader
            is_joint = loader is not None and loader.mode != "sequential"
            total = combined_length(totals, loader.mode) if is_joint else totals[dataloader_idx]
            self._eval = ShownLoop(stage, description, total)
            if self._clock.may_draw_change():
                self._draw_eval(self._eval)

    def _finish_dataloader(self) -> None:
        """Show the end of a loader; where it is a part of fit, only if there is time, and never in a log."""
        loop = self._eval
        if loop is None or loop.done == loop.drawn or self.is_disabled:
            return
        is_fit = loop.stage == SANITY or self._train is not None
        if not is_fit or self._clock.may_draw_change():
            self._draw_eval(loop)

    # ---- the end

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The bars stay where they were, so that the traceback begins on a line of its own.
        begun = [loop for loop in (self._train, self._eval) if loop is not None and loop.done > 0 and self.is_enabled]
        for loop in begun:
            self._draw(loop, None)  # no values: the device they are on may be what failed
        for loop in begun:  # a bar below one that was closed would be drawn a line too low
            self._renderer.close(loop.stage, keep=True)
        self._stop()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()


_OF_STAGE = {
    SANITY: ("sanity_check_description", "validate_loop", "num_sanity_val_batches"),
    VALIDATE: ("validation_description", "validate_loop", "num_val_batches"),
    TEST: ("test_description", "test_loop", "num_test_batches"),
    PREDICT: ("predict_description", "predict_loop", "num_predict_batches"),
}
"""Stage -> the bar's label for it, and the Trainer's loop and numbers of batches."""
