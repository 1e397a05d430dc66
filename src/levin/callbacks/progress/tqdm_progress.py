"""A progress bar drawn by tqdm."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, TextIO

from levin.callbacks.progress.clocked import PREDICT, SANITY, TEST, TRAIN, VALIDATE, ClockedProgressBar, ShownLoop
from levin.callbacks.progress.lines import format_value
from levin.callbacks.progress.progress_bar import Metrics, convert_inf
from levin.callbacks.progress.terminal import NoStream, Redirection, bypassed, draws_in_place, is_notebook
from levin.utilities.rank_zero import rank_zero_debug

if is_notebook() and importlib.util.find_spec("ipywidgets") is not None:
    from tqdm.notebook import tqdm as _tqdm
else:
    from tqdm import tqdm as _tqdm  # type: ignore[assignment]  # the notebook bar has the same interface

COLAB_REFRESH_RATE = 20
_UNTIL_OPENED_S = 1e9
"""tqdm draws a new bar at once, still without the label and the length of the loop, unless it is told to wait."""


class Tqdm(_tqdm):  # type: ignore[type-arg]  # tqdm is generic in its stubs alone
    """tqdm with numbers of an even width. It writes nothing where a line cannot be drawn over, as in a log file."""

    monitor_interval = 0  # no thread of tqdm's own: the callback says when to draw

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        file = bypassed(kwargs.get("file") or sys.stderr)
        kwargs["file"] = file if draws_in_place(file) else NoStream()
        super().__init__(*args, **kwargs)
        measure = getattr(self, "dynamic_ncols", None)
        if callable(measure):
            self.dynamic_ncols = functools.partial(with_margin, measure)  # type: ignore[assignment]  # a function, in spite of the stubs

    @staticmethod
    def format_num(n: int | float | str) -> str:
        """Return a number of the postfix in five characters where that is enough."""
        return format_value(n)


def with_margin(measure: Callable[[Any], tuple[int | None, int | None]], file: Any) -> tuple[int | None, int | None]:
    """Leave two cells free at the right: there the terminal writes ``^C``, which would break a full line."""
    columns, rows = measure(file)
    return columns and columns - 2, rows


class TQDMProgressBar(ClockedProgressBar):
    """Show the progress with tqdm: one bar for training, and one below it for the validation.

    The bar is drawn at most ten times a second, and where the output is no terminal, it is a few lines of text.

    Args:
        refresh_rate: Draw only after batches whose number is a multiple of this, and at the end; 0 turns the bar
            off. The environment variable ``TQDM_MINITERS`` raises it.
        process_position: How many pairs of lines to leave free above, when several processes share a terminal.
        leave: Whether the finished bar of each epoch stays on the screen.

    Raises:
        ValueError: ``refresh_rate`` is negative.

    Example:
        >>> class Bar(TQDMProgressBar):
        ...     def init_validation_tqdm(self):
        ...         bar = super().init_validation_tqdm()
        ...         bar.colour = "green"
        ...         return bar
        >>> bar = Bar(refresh_rate=10)
    """

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave)
        self._refresh_rate = self._resolve_refresh_rate(refresh_rate)
        self._process_position: int = process_position
        self._train_progress_bar: Tqdm | None = None
        self._val_progress_bar: Tqdm | None = None
        self._test_progress_bar: Tqdm | None = None
        self._predict_progress_bar: Tqdm | None = None
        # The loop that each bar shows at the moment, by stage.
        self._shown: dict[str, ShownLoop] = {}
        self._are_bars_clear: bool = False
        self._redirection: Redirection = Redirection(self._write_above)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_train_progress_bar", "_val_progress_bar", "_test_progress_bar", "_predict_progress_bar"):
            state[name] = None
        state["_shown"] = {}
        del state["_redirection"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._redirection = Redirection(self._write_above)

    @property
    def process_position(self) -> int:
        """How many pairs of lines are left free above."""
        return self._process_position

    @property
    def train_progress_bar(self) -> Tqdm:
        """The bar of the training.

        Raises:
            TypeError: There is none yet.
        """
        return self._shown_bar(TRAIN)

    @train_progress_bar.setter
    def train_progress_bar(self, bar: Tqdm) -> None:
        self._train_progress_bar = bar

    @property
    def val_progress_bar(self) -> Tqdm:
        """The bar of the validation and the sanity check.

        Raises:
            TypeError: There is none yet.
        """
        return self._shown_bar(VALIDATE)

    @val_progress_bar.setter
    def val_progress_bar(self, bar: Tqdm) -> None:
        self._val_progress_bar = bar

    @property
    def test_progress_bar(self) -> Tqdm:
        """The bar of the test.

        Raises:
            TypeError: There is none yet.
        """
        return self._shown_bar(TEST)

    @test_progress_bar.setter
    def test_progress_bar(self, bar: Tqdm) -> None:
        self._test_progress_bar = bar

    @property
    def predict_progress_bar(self) -> Tqdm:
        """The bar of the prediction.

        Raises:
            TypeError: There is none yet.
        """
        return self._shown_bar(PREDICT)

    @predict_progress_bar.setter
    def predict_progress_bar(self, bar: Tqdm) -> None:
        self._predict_progress_bar = bar

    def init_sanity_tqdm(self) -> Tqdm:
        """Return the bar for the sanity check; override it to change the bar."""
        return self._init_tqdm(self.sanity_check_description, 2 * self.process_position, leave=False)

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar for training; override it to change the bar."""
        return self._init_tqdm(self.train_description, 2 * self.process_position, leave=True)

    def init_validation_tqdm(self) -> Tqdm:
        """Return the bar for validation; override it to change the bar."""
        is_below = self.trainer.state.fn != "validate"  # in fit the bar of the training is above
        return self._init_tqdm(self.validation_description, 2 * self.process_position + is_below, leave=not is_below)

    def init_test_tqdm(self) -> Tqdm:
        """Return the bar for the test; override it to change the bar."""
        return self._init_tqdm(self.test_description, 2 * self.process_position, leave=True)

    def init_predict_tqdm(self) -> Tqdm:
        """Return the bar for prediction; override it to change the bar."""
        return self._init_tqdm(self.predict_description, 2 * self.process_position, leave=True)

    def _init_tqdm(self, description: str, position: int, leave: bool) -> Tqdm:
        return Tqdm(
            desc=description,
            position=position,
            disable=self.is_disabled,
            leave=leave,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
            delay=0 if is_notebook() else _UNTIL_OPENED_S,
        )

    # ---------------------------------------------------------------- drawing

    def _draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        bar = self._open_bar(loop)
        if metrics is not None:
            bar.set_postfix(metrics, refresh=False)
        bar.n = loop.done
        bar.refresh()
        self._are_bars_clear = False

    def _open_bar(self, loop: ShownLoop) -> Tqdm:
        """Return the bar of the loop's stage, made if need be, and started again for a new loop."""
        name, init = _ATTRIBUTES[loop.stage]
        bar: Tqdm | None = getattr(self, name)
        if bar is None or loop.stage not in self._shown:
            bar = getattr(self, init)()
            setattr(self, name, bar)
            bar.delay = 0
            if self._is_terminal:
                self._redirection.start()
        if self._shown.get(loop.stage) is not loop:
            self._shown[loop.stage] = loop
            bar.n = bar.initial = loop.first
            bar.total = convert_inf(loop.total)
            bar.start_t = bar.last_print_t = bar._time() - (monotonic() - loop.start)  # type: ignore[union-attr]  # set by tqdm itself
            bar.set_description(loop.description, refresh=False)
        return bar

    def _shown_bar(self, stage: str) -> Tqdm:
        """Return the bar of ``stage``, even one whose turn on the screen has not come yet."""
        current = self._train_loop if stage == TRAIN else self._eval_loop
        if current is not None and _ATTRIBUTES[current.stage][0] == _ATTRIBUTES[stage][0]:
            return self._open_bar(current)
        name, _ = _ATTRIBUTES[stage]
        bar: Tqdm | None = getattr(self, name)
        if bar is None:
            raise TypeError(
                f"The `{self.__class__.__name__}.{name}` reference has not been set yet. Read it while the bar is shown."
            )
        return bar

    def _close(self, stage: str, keep: bool) -> None:
        if self._shown.pop(stage, None) is not None:
            bar: Tqdm = getattr(self, _ATTRIBUTES[stage][0])
            bar.leave = keep
            bar.close()

    def _close_all(self) -> None:
        for stage in tuple(self._shown):
            self._close(stage, keep=stage != SANITY)
        self._redirection.stop()

    def _is_batch_due(self, done: int, total: int | float) -> bool:
        return done % self._refresh_rate == 0 or done == total

    def _write_above(self, stream: TextIO, text: str) -> None:
        """Write ``text`` where the bars are, and draw them again below it."""
        bars = [getattr(self, _ATTRIBUTES[stage][0]) for stage in self._shown]
        with Tqdm.get_lock():  # type: ignore[no-untyped-call]  # tqdm is untyped here
            for bar in bars:
                bar.clear(nolock=True)
            stream.write(text)
            stream.flush()
            # After a prompt, or in a flood of lines, the clock brings the bars back.
            self._are_bars_clear = not (text.endswith("\n") and self._may_draw_change())
            if not self._are_bars_clear:
                for bar in bars:
                    bar.refresh(nolock=True)
            self._is_train_stale = self._are_bars_clear and self._train_loop is not None

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print above the bar, as the builtin does."""
        super().print(*args, sep=sep, **kwargs)

    @staticmethod
    def _resolve_refresh_rate(refresh_rate: int) -> int:
        if refresh_rate == 0:
            return 0
        if os.environ.get("COLAB_GPU") and refresh_rate == 1:
            rank_zero_debug(f"Drawing every {COLAB_REFRESH_RATE} batches, as Colab is slow to draw.")
            refresh_rate = COLAB_REFRESH_RATE
        return max(refresh_rate, int(os.environ.get("TQDM_MINITERS", 0)))


# The field with the bar of a stage, and the method that makes it.
_ATTRIBUTES = {
    TRAIN: ("_train_progress_bar", "init_train_tqdm"),
    SANITY: ("_val_progress_bar", "init_sanity_tqdm"),
    VALIDATE: ("_val_progress_bar", "init_validation_tqdm"),
    TEST: ("_test_progress_bar", "init_test_tqdm"),
    PREDICT: ("_predict_progress_bar", "init_predict_tqdm"),
}
