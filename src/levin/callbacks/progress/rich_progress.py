"""A progress bar drawn by Rich."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from levin.callbacks.progress.clocked import (
    DRAW_INTERVAL_S,
    PREDICT,
    SANITY,
    TEST,
    TRAIN,
    VALIDATE,
    ClockedProgressBar,
    ShownLoop,
)
from levin.callbacks.progress.progress_bar import Metrics, convert_inf
from levin.callbacks.progress.terminal import Redirection, bypassed, draws_in_place, is_notebook

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task
    from rich.style import Style

    from levin.module import LightningModule
    from levin.trainer import Trainer

_COLUMNS = "levin.callbacks.progress.rich_columns"


def __getattr__(name: str) -> Any:
    # The columns derive from Rich's, so their file is imported only when one of them is asked for.
    if name.endswith("Column"):
        return getattr(importlib.import_module(_COLUMNS), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class RichProgressBarTheme:
    """Styles of the parts of :class:`RichProgressBar`, in Rich's notation.

    Args:
        description: Style of the label.
        progress_bar: Style of the bar.
        progress_bar_finished: Style of the bar when it is full.
        progress_bar_pulse: Style of the bar while the number of batches is unknown.
        batch_progress: Style of the number of batches.
        time: Style of the times.
        processing_speed: Style of the speed.
        metrics: Style of the values.
        metrics_text_delimiter: Text between two values.
        metrics_format: How a value is formatted, as in ``format(value, ".3f")``.

    Example:
        >>> theme = RichProgressBarTheme(progress_bar="green", metrics_text_delimiter=" | ", metrics_format=".2e")
    """

    description: str | Style = ""
    progress_bar: str | Style = "#6206E0"
    progress_bar_finished: str | Style = "#6206E0"
    progress_bar_pulse: str | Style = "#6206E0"
    batch_progress: str | Style = ""
    time: str | Style = "dim"
    processing_speed: str | Style = "dim underline"
    metrics: str | Style = "italic"
    metrics_text_delimiter: str = " "
    metrics_format: str = ".3f"


class RichProgressBar(ClockedProgressBar):
    """Show the progress with Rich: one bar for training, and one below it for the validation.

    The bar is drawn at most ten times a second, and where the output is no terminal, it is a few lines of text.

    Args:
        refresh_rate: Draw at most so many times a second; 0 turns the bar off.
        leave: Whether the finished bar of each epoch stays on the screen.
        theme: Styles.
        console_kwargs: Keyword arguments of ``rich.console.Console``.

    Raises:
        ModuleNotFoundError: Rich is not installed.
        ValueError: ``refresh_rate`` is negative.

    Example:
        >>> bar = RichProgressBar(leave=True, theme=RichProgressBarTheme(progress_bar="green"))
    """

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ModuleNotFoundError(
                "`RichProgressBar` requires `rich`, which is not installed. Install it, or use `TQDMProgressBar`."
            )
        super().__init__(refresh_rate, leave)
        self._interval_s = max(DRAW_INTERVAL_S, 1 / refresh_rate) if refresh_rate > 0 else DRAW_INTERVAL_S
        self.theme: RichProgressBarTheme = RichProgressBarTheme() if theme is None else theme
        self._console_kwargs: dict[str, Any] = console_kwargs or {}
        self._console: Console | None = None
        self.progress: Progress | None = None
        self._tasks: dict[str, Task] = {}
        # The loop that the task of each stage shows at the moment.
        self._shown: dict[str, ShownLoop] = {}
        self._redirection: Redirection = Redirection(self._write_above)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.update(_console=None, progress=None, _tasks={}, _shown={})
        del state["_redirection"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._redirection = Redirection(self._write_above)

    @property
    def train_progress_bar(self) -> Task:
        """Rich's task of the training.

        Raises:
            TypeError: It is not on the screen.
        """
        return self._task(TRAIN)

    @property
    def val_sanity_check_bar(self) -> Task:
        """Rich's task of the sanity check.

        Raises:
            TypeError: It is not on the screen.
        """
        return self._task(SANITY)

    @property
    def val_progress_bar(self) -> Task:
        """Rich's task of the validation.

        Raises:
            TypeError: It is not on the screen.
        """
        return self._task(VALIDATE)

    @property
    def test_progress_bar(self) -> Task:
        """Rich's task of the test.

        Raises:
            TypeError: It is not on the screen.
        """
        return self._task(TEST)

    @property
    def predict_progress_bar(self) -> Task:
        """Rich's task of the prediction.

        Raises:
            TypeError: It is not on the screen.
        """
        return self._task(PREDICT)

    def _task(self, stage: str) -> Task:
        if stage not in self._tasks:
            raise TypeError(f"The {stage} bar of `{type(self).__name__}` is not there. Read it while the bar is shown.")
        return self._tasks[stage]

    def configure_columns(self, trainer: Trainer) -> list[ProgressColumn | str]:
        """Return the columns before that of the values; override it to show others.

        Args:
            trainer: The trainer.
        """
        from rich.progress import TextColumn
        from rich.table import Column

        from levin.callbacks.progress import rich_columns

        theme = self.theme
        return [
            TextColumn("{task.description}", style=theme.description, markup=False, table_column=Column(no_wrap=True)),
            rich_columns.CustomBarColumn(
                bar_width=rich_columns.BAR_WIDTH,
                complete_style=theme.progress_bar,
                finished_style=theme.progress_bar_finished,
                pulse_style=theme.progress_bar_pulse,
            ),
            rich_columns.BatchesProcessedColumn(style=theme.batch_progress),
            rich_columns.CustomTimeColumn(style=theme.time),
            rich_columns.ProcessingSpeedColumn(style=theme.processing_speed),
        ]

    def refresh(self, hard: bool = False) -> None:
        """Draw what there is, whatever the clock says.

        Args:
            hard: Without effect, since no other thread draws.
        """
        if self.progress is not None:
            self.progress.refresh()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the trainer, be silent on every rank but 0, and look at where the output goes."""
        super().setup(trainer, pl_module, stage)
        if self.is_enabled:
            from rich.console import Console

            # A console of its own, on the real stream: the redirected one leads back here.
            file = {} if is_notebook() or self._console_kwargs.get("stderr") else {"file": bypassed(sys.stdout)}
            self._console = Console(**{**file, **self._console_kwargs})
            # Rich believes FORCE_COLOR to mean a terminal, but a log stays a log.
            is_forced = bool(self._console_kwargs.get("force_terminal"))
            self._is_terminal = is_forced or draws_in_place(bypassed(self._console.file))

    # ---------------------------------------------------------------- drawing

    def _draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        if not self._is_terminal:
            return
        progress = self._start_progress()
        if self._shown.get(loop.stage) is not loop:
            self._shown[loop.stage] = loop
            self._start_task(progress, loop)
        task = self._tasks[loop.stage]
        fields: dict[str, Any] = {} if metrics is None else {"metrics": self._format_metrics(metrics)}
        progress.update(task.id, completed=loop.done, **fields)
        progress.refresh()

    def _start_progress(self) -> Progress:
        if self.progress is None:
            from levin.callbacks.progress.rich_columns import MetricsProgress, MetricsTextColumn

            self.progress = MetricsProgress(
                *self.configure_columns(self.trainer),
                metrics=MetricsTextColumn(style=self.theme.metrics, delimiter=self.theme.metrics_text_delimiter),
                console=self._console,
            )
        if not self.progress.live.is_started:
            self.progress.live.transient = False
            self.progress.start()
            self._redirection.start()
        return self.progress

    def _start_task(self, progress: Progress, loop: ShownLoop) -> None:
        task = self._tasks.get(loop.stage)
        if task is None:
            task_id = progress.add_task(loop.description, total=None, completed=loop.first)
            self._tasks[loop.stage] = task = next(task for task in progress.tasks if task.id == task_id)
        else:
            fields = {"metrics": task.fields.get("metrics", ())}
            progress.reset(task.id, completed=loop.first, visible=True, description=loop.description, **fields)
        task.fields["first"] = loop.first
        task.total = convert_inf(loop.total)
        task.start_time = loop.start

    def _format_metrics(self, metrics: Metrics) -> tuple[str, ...]:
        return tuple(f"{name}: {self._format(value)}" for name, value in metrics.items())

    def _format(self, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        text = format(value, self.theme.metrics_format)
        # A learning rate of 1e-5 is not 0.000.
        return f"{value:.1e}" if value != 0 and text.strip("-0.") == "" else text

    def _close(self, stage: str, keep: bool) -> None:
        if self._shown.pop(stage, None) is None or self.progress is None:
            return
        if not keep:
            self.progress.update(self._tasks[stage].id, visible=False)
        elif stage == TRAIN and self._train_loop is not None and not self._shown:
            self._stop_progress()

    def _close_all(self) -> None:
        self._stop_progress()
        self._redirection.stop()

    def _stop_progress(self) -> None:
        """Leave the bars on the screen; the next drawing makes new ones below."""
        if self.progress is not None:
            self.progress.stop()
        self.progress, self._tasks, self._shown = None, {}, {}

    def _is_batch_due(self, done: int, total: int | float) -> bool:
        return True

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        of = f"/{last - 1}" if last is not None and last > 0 else ""
        return f"Epoch {current_epoch}{of}".ljust(len(self.validation_description))

    def _get_eval_description(self, label: str, dataloader_idx: int, num_dataloaders: int) -> str:
        # A longer label would push the bar of the training to the side.
        return label if num_dataloaders == 1 else super()._get_eval_description(label, dataloader_idx, num_dataloaders)

    def _write_above(self, stream: TextIO, text: str) -> None:
        """Write ``text`` above the bars; a prompt, or a flood of lines, without them until they are next drawn."""
        progress = self.progress
        if progress is not None and progress.live.is_started:
            if text.endswith("\n") and self._may_draw_change():
                from rich.text import Text

                progress.console.print(Text.from_ansi(text), soft_wrap=True)
                return
            progress.live.transient = True
            progress.stop()
        stream.write(text)
        stream.flush()

    def _print_line(self, line: str) -> None:
        if self._console is None:
            super()._print_line(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar: text as the builtin does, tables and other renderables as Rich does."""
        is_renderable = any(hasattr(arg, "__rich__") or hasattr(arg, "__rich_console__") for arg in args)
        if is_renderable and self._console is not None:
            self._console.print(*args, **kwargs)
        else:
            builtins.print(*args, **kwargs)
