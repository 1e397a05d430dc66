"""A progress bar drawn by tqdm."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from time import monotonic
from typing import Any, TextIO

from typing_extensions import override

from levin.callbacks.progress.drawn import DrawnProgressBar
from levin.callbacks.progress.lines import format_value
from levin.callbacks.progress.progress_bar import Metrics, convert_inf
from levin.callbacks.progress.renderer import PREDICT, SANITY, TEST, TRAIN, VALIDATE, Renderer, ShownLoop
from levin.callbacks.progress.terminal import NoStream, draws_in_place, is_notebook, real_stream
from levin.utilities.properties import reads
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
        file = real_stream(kwargs.get("file") or sys.stderr)
        kwargs["file"] = file if draws_in_place(file) else NoStream()
        super().__init__(*args, **kwargs)
        measure = getattr(self, "dynamic_ncols", None)
        if callable(measure):
            self.dynamic_ncols = functools.partial(with_margin, measure)  # type: ignore[assignment]  # a function, in spite of the stubs

    @staticmethod
    def format_num(n: int | float | str) -> str:
        """Return a number of the postfix in five characters where that is enough."""
        return format_value(n)


def with_margin(
    measure: Callable[[object], tuple[int | None, int | None]], file: object
) -> tuple[int | None, int | None]:
    """Leave two cells free at the right: there the terminal writes ``^C``, which would break a full line."""
    columns, rows = measure(file)
    return columns and columns - 2, rows


class TqdmRenderer(Renderer):
    """Draws each stage with a tqdm bar; the sanity check and the validation share theirs.

    Args:
        callback: Makes the bars, in its methods ``init_*_tqdm``.
    """

    _callback: TQDMProgressBar

    def __init__(self, callback: TQDMProgressBar) -> None:
        super().__init__(callback)
        self.bars: dict[str, Tqdm] = {}
        # The loop that each bar shows at the moment, none for a bar that waits for its first.
        self._shown: dict[str, ShownLoop | None] = {}

    @override
    def _write_above(self, stream: TextIO, text: str) -> None:
        bars = [self.bars[slot] for slot in self._shown]
        with Tqdm.get_lock():  # type: ignore[no-untyped-call]  # tqdm is untyped here
            for bar in bars:
                bar.clear(nolock=True)
            stream.write(text)
            stream.flush()
            for bar in bars:
                bar.refresh(nolock=True)

    @override
    def _clear(self) -> None:
        for slot in self._shown:
            self.bars[slot].clear()

    @override
    def draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        bar = self.open(loop)
        if metrics is not None:
            bar.set_postfix(metrics, refresh=False)
        bar.update(int(loop.done - bar.n))

    def open(self, loop: ShownLoop) -> Tqdm:
        """Return the bar of the loop's stage, made if need be, and started again for a new loop."""
        slot = _STAGES[loop.stage][0]
        if slot not in self._shown:
            self.bars[slot] = _undelayed(getattr(self._callback, f"init_{_STAGES[loop.stage][1]}_tqdm")())
            if draws_in_place(sys.stdout):
                self._redirection.start()
        bar = self.bars[slot]
        if self._shown.get(slot) is not loop:
            self._shown[slot] = loop
            bar.set_description(loop.description, refresh=False)
            bar.total = convert_inf(loop.total)
            bar.reset(bar.total)
            bar.initial = bar.n = bar.last_print_n = loop.first
            bar.start_t = bar.last_print_t = bar._time() - (monotonic() - loop.start)  # type: ignore[attr-defined]  # set by tqdm itself
        return bar

    def use(self, slot: str, bar: Tqdm) -> None:
        """Show the next loop in ``bar``, which the user made."""
        self.bars[slot] = _undelayed(bar)
        self._shown[slot] = None

    @override
    def close(self, stage: str, keep: bool) -> None:
        slot = _STAGES[stage][0]
        if slot in self._shown:
            del self._shown[slot]
            self.bars[slot].leave = keep
            self.bars[slot].close()

    @override
    def stop(self) -> None:
        for loop in tuple(self._shown.values()):
            if loop is not None:
                self.close(loop.stage, keep=loop.stage != SANITY)
        self._redirection.stop()


def _undelayed(bar: Tqdm) -> Tqdm:
    """Let each ``update`` draw, since the callback decides when to call it."""
    bar.delay = bar.miniters = bar.mininterval = 0
    bar.dynamic_miniters = False
    return bar


def _bar_property(slot: str, doc: str) -> property:
    """Return the property that is the bar of a slot, even one whose turn on the screen has not come yet."""

    def get(callback: TQDMProgressBar) -> Tqdm:
        renderer = callback._renderer
        for loop in (callback._train, callback._eval):
            if loop is not None and _STAGES[loop.stage][0] == slot:
                bar = renderer.open(loop)
                bar.n = max(bar.n, loop.done)  # a subclass may count by itself
        if slot not in renderer.bars:
            raise TypeError(
                f"The `{type(callback).__name__}._{slot}_progress_bar` reference has not been set yet."
                " Read it while the bar is shown."
            )
        return renderer.bars[slot]

    def use(callback: TQDMProgressBar, bar: Tqdm) -> None:
        callback._renderer.use(slot, bar)

    return property(get, use, doc=f"{doc}\n\n        Raises:\n            TypeError: There is none yet.")


_STAGES = {
    TRAIN: ("train", "train"),
    SANITY: ("val", "sanity"),
    VALIDATE: ("val", "validation"),
    TEST: ("test", "test"),
    PREDICT: ("predict", "predict"),
}
"""Stage -> the bar that it shares, and which ``init_*_tqdm`` makes it."""


class TQDMProgressBar(DrawnProgressBar):
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

    _renderer: TqdmRenderer
    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"

    def __init__(self, refresh_rate: int = 1, process_position: int = 0, leave: bool = False) -> None:
        super().__init__(refresh_rate, leave, TqdmRenderer(self))
        self._refresh_rate = self._draw_every = _resolve_refresh_rate(refresh_rate)
        self._process_position: int = process_position

    train_progress_bar = _bar_property("train", "The bar of the training.")
    val_progress_bar = _bar_property("val", "The bar of the validation and the sanity check.")
    test_progress_bar = _bar_property("test", "The bar of the test.")
    predict_progress_bar = _bar_property("predict", "The bar of the prediction.")

    process_position: int = reads("_process_position", "How many pairs of lines are left free above.")

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


def _resolve_refresh_rate(refresh_rate: int) -> int:
    if refresh_rate == 0:
        return 0
    if os.environ.get("COLAB_GPU") and refresh_rate == 1:
        rank_zero_debug(f"Drawing every {COLAB_REFRESH_RATE} batches, as Colab is slow to draw.")
        refresh_rate = COLAB_REFRESH_RATE
    return max(refresh_rate, int(os.environ.get("TQDM_MINITERS") or 0))
