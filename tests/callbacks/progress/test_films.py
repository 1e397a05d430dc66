"""What each bar shows of a whole run, change by change, by a clock that goes on 2.5 seconds with each batch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from levin.callbacks import Callback, RichProgressBar, TQDMProgressBar
from levin.callbacks.progress import drawn, lines, renderer, tqdm_progress
from tests.callbacks.progress.models import Logging, loader, trainer
from tests.callbacks.progress.screen import Terminal


class Net(Logging):
    """Takes several loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that all clocks show."""
    now = [1000.0]

    def clock() -> float:
        return now[0]

    for module in (drawn, lines, tqdm_progress):
        monkeypatch.setattr(module, "monotonic", clock)
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setattr("rich.console.monotonic", clock)
    shown = renderer.ShownLoop
    monkeypatch.setattr(drawn, "ShownLoop", lambda *args, **kwargs: shown(*args, **kwargs, start=now[0]))
    return now


class Camera(Callback):
    """Writes down at each hook which lines of the screen are others than before."""

    def __init__(self, terminal: Terminal, now: list[float]) -> None:
        self.terminal, self.now = terminal, now
        self.before: list[str] = []
        self.film: list[str] = []
        for name in dir(Callback):
            if name.startswith("on_") and not name.endswith("checkpoint"):
                setattr(self, name, lambda *args, name=name: self.look(name))

    def look(self, name: str) -> None:
        if name.endswith("batch_start"):
            self.now[0] += 2.5
        seen = [re.sub(r"\|[#\d ]+\|", "||", line) for line in self.terminal.screen]
        changed = [f"{row}: {line}" for row, line in enumerate(seen) if self.before[row : row + 1] != [line]]
        if seen != self.before:
            gone = [f"{len(seen)} lines"] if len(seen) < len(self.before) else []
            self.film += [name, *(f"  {text}" for text in changed + gone)]
        self.before = seen


@pytest.mark.parametrize("film", ["terminal", "terminal-leave", "log"])
@pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])
def test_what_is_shown_of_a_run(
    bar_class: Any, film: str, terminal: Terminal, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    if bar_class is TQDMProgressBar:
        monkeypatch.setenv("COLUMNS", "100")  # so that tqdm 4.60, whose bars are wider, has room for the values
    if film == "log":
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(drawn, "LINE_INTERVAL_S", 4.0)

    class Bar(bar_class):
        def get_metrics(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
            return {"step": trainer.global_step, "x": 0.25}

    camera = Camera(terminal, now)
    run = trainer(Bar(leave=film == "terminal-leave"), max_epochs=2, num_sanity_val_steps=2)
    run.callbacks.append(camera)
    run.fit(Net(), loader(3), [loader(2), loader(1)])
    run.validate(Net(), loader(2), verbose=False)
    run.test(Net(), [loader(1), loader(2)], verbose=False)
    run.predict(Net(), loader(2))
    camera.look("end")
    kind = "tqdm" if bar_class is TQDMProgressBar else "rich"
    path = Path(__file__).parent / "films" / f"{kind}-{film}.txt"
    assert camera.film == path.read_text().splitlines()


def test_a_log_says_nothing_twice(terminal: Terminal, now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(drawn, "LINE_INTERVAL_S", 4.0)
    run = trainer(TQDMProgressBar())
    run.callbacks.append(Camera(terminal, now))
    run.test(Net(), loader(2), verbose=False)
    assert terminal.screen == ["Testing DataLoader 0: 100% 2/2 [00:05<00:00, 0.40it/s]"]


def test_changes_may_come_in_a_burst_that_fills_again(now: list[float]) -> None:
    clock = drawn.DrawClock(interval_s=1.0)

    def number() -> int:
        return next(count for count in range(100) if not clock.may_draw_change())

    numbers = [number()]
    for pause_s in (0.05, 0.3, 60.0):
        now[0] += pause_s
        numbers.append(number())
    assert numbers == [8, 0, 3, 8]


def test_a_slow_drawing_makes_drawings_rarer(now: list[float]) -> None:
    clock = drawn.DrawClock(interval_s=0.1)
    assert clock.next == math.inf
    clock.start()
    waits = []
    for cost_s in (0.5, 0.001, 0.01, 0.01, 0.5, 0.5, 0.0):
        start = now[0]
        now[0] += cost_s
        clock.set_next(start)
        waits.append(clock.next - now[0])
        clock.start()
    # The first is let pass: it may have imported and set up.
    assert waits == pytest.approx([0.1, 0.1, 0.1, 0.5, 0.5, 1.0, 0.1])
    clock.stop()
    assert clock.next == math.inf


def test_a_log_waits_for_its_interval_and_between_two_epochs(now: list[float]) -> None:
    clock = drawn.DrawClock(60.0, 10.0, burst=0)
    clock.start()
    assert clock.next == now[0] + 60.0 and not clock.may_draw_change()
    seen = []
    for pause_s in (0.0, 9.0, 1.0, 9.0):
        now[0] += pause_s
        seen.append(clock.may_draw_end())
    assert seen == [True, False, True, False]
