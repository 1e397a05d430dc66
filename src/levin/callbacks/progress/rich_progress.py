"""A progress bar drawn by Rich."""

from __future__ import annotations

import builtins
import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from typing_extensions import override

from levin.callbacks.progress.drawn import DRAW_INTERVAL_S, DrawnProgressBar
from levin.callbacks.progress.progress_bar import Metrics, convert_inf
from levin.callbacks.progress.renderer import PREDICT, SANITY, TEST, TRAIN, VALIDATE, Renderer, ShownLoop
from levin.callbacks.progress.terminal import NoStream, draws_in_place, is_notebook, real_stream
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.properties import reads
from levin.utilities.types import Kwargs, StateDict

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn, Task
    from rich.style import Style

    from levin.callbacks.progress.rich_columns import MetricsProgress


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


class RichRenderer(Renderer):
    """Draws each stage as a task of one Rich progress.

    Args:
        callback: Says where to draw and with which columns and styles.
    """

    _callback: RichProgressBar

    def __init__(self, callback: RichProgressBar) -> None:
        super().__init__(callback)
        self.progress: MetricsProgress | None = None
        self.tasks: dict[str, Task] = {}
        # The loop that the task of each stage shows at the moment.
        self._shown: dict[str, ShownLoop] = {}
        self._is_over: bool = True

    @override
    def draw(self, loop: ShownLoop, metrics: Metrics | None) -> None:
        task = self.open(loop)
        assert self.progress is not None
        fields: Kwargs = {} if metrics is None else {"metrics": self._format_metrics(metrics)}
        self.progress.update(task.id, completed=loop.done, **fields)
        self.progress.refresh()

    def open(self, loop: ShownLoop) -> Task:
        """Return the task of the loop's stage, made if need be, and started again for a new loop."""
        progress = self._start_progress()
        if self._shown.get(loop.stage) is not loop:
            self._shown[loop.stage] = loop
            self._start_task(progress, loop)
        return self.tasks[loop.stage]

    def _start_progress(self) -> MetricsProgress:
        if self.progress is None or self._is_over:
            self.progress, self.tasks, self._is_over = self._callback._make_progress(), {}, False
        if not self.progress.live.is_started:
            self.progress.is_hidden = self.progress.live.transient = False
            self.progress.start()
            if self._callback._is_terminal:
                self._redirection.start()
        return self.progress

    def _start_task(self, progress: MetricsProgress, loop: ShownLoop) -> None:
        task = self.tasks.get(loop.stage)
        if task is None:
            task_id = progress.add_task(loop.description, total=None, completed=loop.first)
            self.tasks[loop.stage] = task = next(task for task in progress.tasks if task.id == task_id)
        else:
            fields = {"metrics": task.fields.get("metrics", ())}
            progress.reset(task.id, completed=loop.first, visible=True, description=loop.description, **fields)
        task.fields["first"] = loop.first
        task.total = convert_inf(loop.total)
        task.start_time = loop.start

    def _format_metrics(self, metrics: Metrics) -> tuple[str, ...]:
        number_format = self._callback.theme.metrics_format
        return tuple(f"{name}: {format_metric(value, number_format)}" for name, value in metrics.items())

    @override
    def close(self, stage: str, keep: bool) -> None:
        if self._shown.pop(stage, None) is None or self.progress is None:
            return
        if not keep:
            self.progress.update(self.tasks[stage].id, visible=False)
        elif stage == TRAIN and not self._shown:
            self._stop_progress()

    @override
    def stop(self) -> None:
        self._stop_progress()
        self._redirection.stop()

    def _stop_progress(self) -> None:
        """Leave the bars on the screen; the next drawing makes new ones below."""
        if self.progress is not None:
            self.progress.stop()
        self._shown, self._is_over = {}, True

    @override
    def _write_above(self, stream: TextIO, text: str) -> None:
        if self.progress is not None and self.progress.live.is_started:
            from rich.text import Text

            self.progress.console.print(Text.from_ansi(text.removesuffix("\n")), soft_wrap=True)
        else:
            stream.write(text)
            stream.flush()

    @override
    def _clear(self) -> None:
        if self.progress is not None and self.progress.live.is_started:
            # Rich would move the cursor over the height of the bars once more when it starts again.
            self.progress.is_hidden = self.progress.live.transient = True
            self.progress.stop()


def _task_property(stage: str, doc: str) -> property:
    def get(callback: RichProgressBar) -> Task:
        renderer = callback._renderer
        for loop in (callback._train, callback._eval):
            if loop is not None and loop.stage == stage:
                task = renderer.open(loop)
                task.completed = max(task.completed, loop.done)
        if stage not in renderer.tasks:
            name = type(callback).__name__
            raise TypeError(f"The {stage} bar of `{name}` is not there. Read it while the bar is shown.")
        return renderer.tasks[stage]

    return property(get, doc=f"{doc}\n\n        Raises:\n            TypeError: There is none yet.")


def format_metric(value: object, number_format: str) -> str:
    """Return a value of the bar as text.

    Example:
        >>> [format_metric(value, ".3f") for value in (0.5, 1e-5, 3)]
        ['0.500', '1.0e-05', '3']
    """
    if not isinstance(value, float):
        return str(value)
    text = format(value, number_format)
    # A learning rate of 1e-5 is not 0.000.
    return f"{value:.1e}" if value != 0 and text.strip("-0.") == "" else text


class RichProgressBar(DrawnProgressBar):
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

    _renderer: RichRenderer

    def __init__(
        self,
        refresh_rate: int = 100,
        leave: bool = False,
        theme: RichProgressBarTheme | None = None,
        console_kwargs: dict[str, object] | None = None,
    ) -> None:
        if importlib.util.find_spec("rich") is None:
            raise ModuleNotFoundError(
                "`RichProgressBar` requires `rich`, which is not installed. Install it, or use `TQDMProgressBar`."
            )
        super().__init__(refresh_rate, leave, RichRenderer(self))
        self.theme: RichProgressBarTheme = RichProgressBarTheme() if theme is None else theme
        self._console_kwargs: dict[str, object] = console_kwargs or {}
        self._console: Console | None = None

    def __getstate__(self) -> StateDict:
        return {**self.__dict__, "_console": None}

    progress: MetricsProgress | None = reads(
        "_renderer.progress", "Rich's display of the bars, that of the last run if none is under way."
    )

    train_progress_bar = _task_property(TRAIN, "Rich's task of the training.")
    val_sanity_check_bar = _task_property(SANITY, "Rich's task of the sanity check.")
    val_progress_bar = _task_property(VALIDATE, "Rich's task of the validation.")
    test_progress_bar = _task_property(TEST, "Rich's task of the test.")
    predict_progress_bar = _task_property(PREDICT, "Rich's task of the prediction.")

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

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        from rich.console import Console

        # A console of its own: that of the process belongs to the user.
        file = {} if is_notebook() or self._console_kwargs.get("stderr") else {"file": real_stream(sys.stdout)}
        self._console = Console(**{**file, **self._console_kwargs})
        super().setup(trainer, pl_module, stage)

    @override
    def _draws_in_place(self) -> bool:
        # Rich believes FORCE_COLOR to mean a terminal, but a log stays a log.
        is_forced = bool(self._console_kwargs.get("force_terminal"))
        return is_forced or (self._console is not None and draws_in_place(self._console.file))

    @override
    def _min_interval_s(self) -> float:
        return max(DRAW_INTERVAL_S, 1 / self._refresh_rate) if self._refresh_rate > 0 else DRAW_INTERVAL_S

    def _make_progress(self) -> MetricsProgress:
        from rich.console import Console

        from levin.callbacks.progress.rich_columns import MetricsProgress, MetricsTextColumn

        return MetricsProgress(
            *self.configure_columns(self.trainer),
            metrics=MetricsTextColumn(style=self.theme.metrics, delimiter=self.theme.metrics_text_delimiter),
            console=self._console if self._is_terminal else Console(file=NoStream()),
        )

    def _get_train_description(self, current_epoch: int) -> str:
        last = self.trainer.max_epochs
        of = f"/{last - 1}" if last is not None and last > 0 else ""
        return f"Epoch {current_epoch}{of}".ljust(len(self.validation_description))

    def _get_eval_description(self, label: str, dataloader_idx: int, num_dataloaders: int) -> str:
        # A longer label would push the bar of the training to the side.
        return label if num_dataloaders == 1 else super()._get_eval_description(label, dataloader_idx, num_dataloaders)

    def _print_line(self, line: str) -> None:
        if self._console is None:
            super()._print_line(line)
        else:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @override
    def print(self, *args: object, **kwargs: Any) -> None:
        is_renderable = any(hasattr(arg, "__rich__") or hasattr(arg, "__rich_console__") for arg in args)
        if is_renderable and self._console is not None:
            self._console.print(*args, **kwargs)
        else:
            builtins.print(*args, **kwargs)
