from __future__ import annotations

import functools
import io
import subprocess
import sys
from typing import Any

import pytest

from levin.callbacks import TQDMProgressBar
from levin.callbacks.progress import drawn
from levin.callbacks.progress.tqdm_progress import Tqdm, with_margin
from tests.callbacks.progress.models import Logging, loader, trainer
from tests.callbacks.progress.screen import Terminal

# Most runs here have no validation data.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clock allow every drawing."""
    monkeypatch.setattr(drawn.DrawClock, "set_next", lambda self, start: None)
    monkeypatch.setattr(drawn.DrawClock, "may_draw_change", lambda self: False)


class Positions(TQDMProgressBar):
    """Writes down where the bar is drawn."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.positions: list[tuple[str, int]] = []

    def _draw(self, loop: Any, metrics: Any) -> None:
        super()._draw(loop, metrics)
        self.positions.append((loop.stage, loop.done))


@pytest.mark.parametrize(
    ("rate", "train", "val"),
    [
        (1, [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]),
        (3, [3, 6, 7], [3, 4]),
        (7, [7], [4]),
        (100, [7], [4]),
    ],
)
def test_refresh_rate_is_a_number_of_batches(
    rate: int, train: list[int], val: list[int], no_clock: None, terminal: Terminal
) -> None:
    bar = Positions(refresh_rate=rate)
    trainer(bar, num_sanity_val_steps=0).fit(Logging(), loader(7), loader(4))
    # The end is drawn again, with the values of validation and epoch.
    assert list(dict.fromkeys(done for stage, done in bar.positions if stage == "train")) == train
    assert list(dict.fromkeys(done for stage, done in bar.positions if stage == "validate")) == val


def test_state_of_the_bars_after_a_run(terminal: Terminal) -> None:
    bar = TQDMProgressBar()
    run = trainer(bar)
    run.fit(Logging(), loader(7), loader(4))
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (7, 7)
    run.test(Logging(), loader(5), verbose=False)
    assert (bar.test_progress_bar.n, bar.test_progress_bar.total) == (5, 5)
    run.predict(Logging(), loader(6))
    assert (bar.predict_progress_bar.n, bar.predict_progress_bar.total) == (6, 6)


def test_bars_are_missing_before_a_run() -> None:
    for name in ("train", "val", "test", "predict"):
        with pytest.raises(TypeError, match=f"_{name}_progress_bar` reference has not been set yet"):
            getattr(TQDMProgressBar(), f"{name}_progress_bar")


def test_bars_are_there_in_the_hooks_of_a_subclass(terminal: Terminal) -> None:
    seen = []

    class Custom(TQDMProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_start(trainer, pl_module)
            self.train_progress_bar.set_description(f"My epoch {trainer.current_epoch}")

        def on_validation_batch_start(self, *args: Any) -> None:
            super().on_validation_batch_start(*args)
            seen.append((self.val_progress_bar.n, self.val_progress_bar.total))

        def init_train_tqdm(self) -> Tqdm:
            bar = super().init_train_tqdm()
            bar.bar_format = "{desc} [{n_fmt}/{total_fmt}] {postfix}"
            return bar

        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"text": "hello", "number": 0.5}

    trainer(Custom(), max_epochs=2, num_sanity_val_steps=1).fit(Logging(), loader(3), loader(2))
    assert terminal.screen == ["My epoch 1:  [3/3] , text=hello, number=0.500"]
    assert seen == [(0, 1), (0, 2), (1, 2), (0, 2), (1, 2)]


def test_process_position_leaves_lines_free(terminal: Terminal) -> None:
    trainer(TQDMProgressBar(process_position=1), num_sanity_val_steps=0).fit(Logging(), loader(3), loader(1))
    assert terminal.getvalue().startswith("\n\n\rEpoch 0")
    assert "\n\n\n\rValidation" in terminal.getvalue()


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({"TQDM_MINITERS": "5"}, 1, 5),
        ({"TQDM_MINITERS": "5"}, 10, 10),
        ({"TQDM_MINITERS": "5"}, 0, 0),
        ({"COLAB_GPU": "1"}, 1, 20),
        ({"COLAB_GPU": "1"}, 2, 2),
    ],
)
def test_environment_raises_the_refresh_rate(
    environment: dict[str, str], given: int, expected: int, monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert TQDMProgressBar(refresh_rate=given).refresh_rate == expected


def test_tqdm_formats_numbers_in_an_even_width() -> None:
    assert [Tqdm.format_num(number) for number in (0.5, 3, 1e-5, "text")] == ["0.500", "3", "1e-5", "text"]


def test_a_full_line_leaves_room_for_an_interrupt(terminal: Terminal) -> None:
    """The terminal echoes ``^C`` behind the bar, which must not make the line longer than the screen."""
    bar = Tqdm(total=3, file=terminal, dynamic_ncols=True)
    bar.dynamic_ncols = functools.partial(with_margin, lambda file: (80, 24))
    bar.update(3)
    bar.close()
    assert max(map(len, terminal.screen)) == 78
    assert with_margin(lambda file: (None, None), terminal) == (None, None)


def test_tqdm_writes_nothing_into_a_file() -> None:
    file = io.StringIO()
    bar = Tqdm(total=3, file=file)
    bar.update(3)
    bar.close()
    assert file.getvalue() == ""
    assert bar.n == 3


def test_the_base_is_imported_without_the_bars() -> None:
    code = (
        "import sys, levin.callbacks.progress.progress_bar, levin.callbacks.progress\n"
        "print([name for name in sys.modules if name == 'rich' or name.endswith(('tqdm_progress', 'rich_progress'))])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
