from __future__ import annotations

import io
import sys
from importlib.metadata import version
from typing import Any

import pytest
from packaging.version import Version

from levin.callbacks import RichProgressBar, RichProgressBarTheme
from levin.callbacks.progress import drawn
from tests.callbacks.progress.models import Logging, loader, trainer
from tests.callbacks.progress.screen import Terminal

# Most runs here have no validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


def test_rich_missing_is_an_error_that_names_the_other_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ModuleNotFoundError, match="requires `rich`.*TQDMProgressBar"):
        RichProgressBar()


def test_refresh_rate_is_a_number_of_drawings_per_second() -> None:
    assert RichProgressBar(refresh_rate=1)._min_interval_s() == 1.0
    assert RichProgressBar(refresh_rate=100)._min_interval_s() == drawn.DRAW_INTERVAL_S


@pytest.mark.parametrize(
    ("max_epochs", "epoch", "label"), [(10, 3, "Epoch 3/9 "), (-1, 3, "Epoch 3   "), (None, 0, "Epoch 0   ")]
)
def test_label_of_an_epoch(max_epochs: Any, epoch: int, label: str) -> None:
    from types import SimpleNamespace

    bar = RichProgressBar()
    bar.setup(SimpleNamespace(is_global_zero=True, max_epochs=max_epochs), None, "fit")
    assert bar._get_train_description(epoch) == label


def test_theme_formats_the_values(terminal: Terminal) -> None:
    class Fixed(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"a": 0.5, "small": 1e-5, "n": 3, "v_num": "[x]"}

    theme = RichProgressBarTheme(metrics_text_delimiter=" | ", metrics_format=".2f")
    trainer(Fixed(theme=theme)).fit(Logging(), loader(3))
    assert terminal.screen[1] == "a: 0.50 | small: 1.0e-05 | n: 3 | v_num: [x]"


def test_values_that_do_not_fit_get_lines_of_their_own(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    class Many(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {f"metric_{index}": float(index) for index in range(12)}

    monkeypatch.setenv("COLUMNS", "80")
    trainer(Many()).fit(Logging(), loader(3))
    first, *rest = terminal.screen
    assert "3/3" in first and "metric" not in first
    assert len(rest) == 3
    assert all(len(line) <= 80 for line in terminal.screen)
    assert " ".join(rest).split()[-2:] == ["metric_11:", "11.000"]
    assert not any(line.endswith(":") for line in rest), "a name is parted from its value"


def test_a_value_longer_than_the_line_is_broken(terminal: Terminal) -> None:
    class Long(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"text": "x" * 100}

    trainer(Long()).fit(Logging(), loader(3))
    space = " " if Version(version("rich")) < Version("12.5") else ""  # which breaks the value, not the line before it
    assert "".join(terminal.screen[1:]) == f"text:{space}" + "x" * 100


def test_a_full_line_leaves_room_for_an_interrupt(terminal: Terminal) -> None:
    """The terminal echoes ``^C`` behind the bar, which must not make the line longer than the screen."""
    trainer(RichProgressBar()).fit(Logging(), loader(3))
    assert 70 <= max(map(len, terminal.screen)) <= 78


def test_columns_can_be_configured(terminal: Terminal) -> None:
    from rich.progress import TextColumn

    from levin.callbacks.progress.rich_columns import BatchesProcessedColumn

    class Custom(RichProgressBar):
        def configure_columns(self, trainer: Any) -> list[Any]:
            return [TextColumn("max {task.total}"), BatchesProcessedColumn(style="red")]

        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {}

    trainer(Custom()).fit(Logging(), loader(3))
    assert terminal.screen == ["max 3 3/3"]


def test_console_arguments_reach_the_console(terminal: Terminal) -> None:
    file = Terminal()
    trainer(RichProgressBar(console_kwargs={"file": file, "width": 60})).fit(Logging(), loader(3))
    assert terminal.getvalue() == ""
    assert "3/3" in file.screen[0]
    assert all(len(line) <= 60 for line in file.screen)


@pytest.mark.parametrize(
    ("width", "gone"), [(24, ["it/s", "0:00:0", "━"]), (40, ["0:00:0", "━"]), (48, ["━"]), (60, [])]
)
@pytest.mark.parametrize("has_values", [True, False])
def test_a_narrow_terminal_has_fewer_columns_and_cuts_none(
    terminal: Terminal, width: int, gone: list[str], has_values: bool
) -> None:
    class Bar(RichProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return super().get_metrics(trainer, pl_module) if has_values else {}

    file = Terminal()
    trainer(Bar(console_kwargs={"file": file, "width": width})).fit(Logging(), loader(3))
    line = next(line for line in file.screen if "Epoch 0/0" in line)
    assert "3/3" in line and "…" not in line and len(line) <= width
    assert [part for part in ("it/s", "0:00:0", "━") if part not in line] == gone


def test_a_log_stays_a_log_even_with_forced_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    trainer(RichProgressBar(console_kwargs={"file": file})).fit(Logging(), loader(3))
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()
    assert file.getvalue().startswith("Epoch 0/0: 100% 3/3 [")


def test_renderables_and_text_are_printed_above_the_bar(terminal: Terminal) -> None:
    from rich.table import Table

    class Prints(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                self.print("[not] markup", [1, 2])
                table = Table("Column")
                table.add_row("cell")
                self.print(table)
            return super().training_step(batch, batch_idx)

    trainer(RichProgressBar()).fit(Prints(), loader(3))
    assert terminal.screen[0] == "[not] markup [1, 2]"
    assert "cell" in "".join(terminal.screen[1:-1])
    assert "3/3" in "".join(terminal.screen[5:])


def test_tasks_of_the_bars(terminal: Terminal) -> None:
    seen = []

    class Looks(RichProgressBar):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            seen.append((self.train_progress_bar.completed, self.train_progress_bar.total))

    bar = Looks()
    trainer(bar).fit(Logging(), loader(3))
    assert seen == [(3, 3)]
    with pytest.raises(TypeError, match="is not there"):
        _ = bar.val_progress_bar


def test_a_slow_loop_shows_seconds_per_batch() -> None:
    from rich.progress import Task

    from levin.callbacks.progress.rich_columns import ProcessingSpeedColumn

    now = [0.0]
    task = Task(0, "x", 10, 0, _get_time=lambda: now[0], fields={"first": 4})  # type: ignore[arg-type]
    task.start_time = 0.0
    column = ProcessingSpeedColumn(style="")
    task.completed = 4
    assert column.render(task).plain == "-.--it/s"
    now[0], task.completed = 40.0, 6
    assert column.render(task).plain == "20.0s/it"
    now[0] = 4.0
    assert column.render(task).plain == "0.50it/s"
