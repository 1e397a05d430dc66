"""What the two bars have in common."""

from __future__ import annotations

import logging
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from levin.callbacks import Callback, RichProgressBar, TQDMProgressBar
from levin.callbacks.progress.tqdm_progress import Tqdm
from levin.data import CombinedLoader
from tests.callbacks.progress.models import Logging, loader, trainer
from tests.callbacks.progress.screen import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
bars = pytest.mark.parametrize("bar_class", [TQDMProgressBar, RichProgressBar])


class Unsized(IterableDataset):
    """Ten batches, without saying so."""

    def __iter__(self) -> Iterator[Any]:
        yield from ((torch.zeros(4),) for _ in range(10))


def place(bar: Any) -> tuple[Any, Any]:
    """Where the bar of the training stands: batches done, and their number."""
    shown = bar.train_progress_bar
    return (shown.n if isinstance(bar, TQDMProgressBar) else shown.completed), shown.total


@bars
@pytest.mark.parametrize(
    ("data", "settings", "expected"),
    [
        (DataLoader(Unsized(), batch_size=1), {"max_steps": 25, "max_epochs": -1}, [(10, 25), (10, 15), (5, 5)]),
        (loader(10), {"max_steps": 25, "max_epochs": -1}, [(10, 10), (10, 10), (5, 5)]),
        (
            DataLoader(Unsized(), batch_size=1),
            {"max_steps": 7, "max_epochs": -1, "accumulate_grad_batches": 2},
            [(10, 14), (4, 4)],
        ),
        (DataLoader(Unsized(), batch_size=1), {"max_epochs": 20}, [(10, None)] * 20),
        (loader(10), {"max_epochs": 20}, [(10, 10)] * 20),
    ],
)
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_full_at_the_end_of_each_epoch(
    bar_class: Any, data: Any, settings: Any, expected: Any, is_terminal: bool, terminal: Terminal, monkeypatch: Any
) -> None:
    if not is_terminal:
        monkeypatch.setenv("TERM", "dumb")
    seen = []

    class Looks(bar_class):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_epoch_end(trainer, pl_module)
            seen.append(place(self))

    trainer(Looks(), **settings).fit(Logging(), data)
    assert seen == expected


@bars
@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_last_bar_can_be_read_after_the_run(
    bar_class: Any, is_terminal: bool, terminal: Terminal, monkeypatch: Any
) -> None:
    if not is_terminal:
        monkeypatch.setenv("TERM", "dumb")
    bar = bar_class()
    run = trainer(bar)
    run.fit(Logging(), loader(7), loader(4))
    assert place(bar) == (7, 7)
    run.test(Logging(), loader(5), verbose=False)
    assert bar.test_progress_bar.total == 5
    if bar_class is RichProgressBar:
        assert [(task.description, task.completed, task.total) for task in bar.progress.tasks] == [
            ("Testing", 5, 5)
        ] or not is_terminal


@bars
def test_printed_and_logged_lines_appear_above_the_bar(bar_class: Any, terminal: Terminal) -> None:
    log = logging.getLogger("tests.bars")
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)

    class Talks(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                print("begun", end=" ")
                print("and ended")
                sys.stdout.writelines(["two\n", "lines\n"])
                log.warning("a warning")
                print(f"\x1b[31m{'long ' * 30}\x1b[0m", file=sys.stderr)
            return super().training_step(batch, batch_idx)

    try:
        trainer(bar_class()).fit(Talks(), loader(3))
    finally:
        log.removeHandler(handler)
    assert terminal.screen[:4] == ["begun and ended", "two", "lines", "a warning"]
    assert terminal.screen[4] == ("long " * 30).rstrip()
    assert terminal.screen[5].startswith("Epoch 0") and "3/3" in terminal.screen[5]
    assert sys.stdout is sys.stderr is terminal and handler.stream is terminal


@bars
def test_the_begin_of_a_line_is_not_lost_at_the_end_of_a_run(bar_class: Any, terminal: Terminal) -> None:
    class Talks(Logging):
        def on_train_end(self) -> None:
            print("begun", end="")

    trainer(bar_class()).fit(Talks(), loader(3))
    print(" and ended")
    assert terminal.screen[-1] == "begun and ended"


@bars
def test_a_prompt_has_a_line_of_its_own(bar_class: Any, terminal: Terminal) -> None:
    class Asks(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1:
                # `input` flushes both streams and writes past them.
                sys.stderr.flush()
                sys.stdout.flush()
                terminal.write("Name? ")
                assert terminal.screen == ["Name?"]
                terminal.write("Bob\n")
                print("Age? ", end="", flush=True)
                assert terminal.screen == ["Name? Bob", "Age?"]
                terminal.write("9\n")
                print("thanks")
            return super().training_step(batch, batch_idx)

    trainer(bar_class()).fit(Asks(), loader(3))
    assert terminal.screen[:3] == ["Name? Bob", "Age? 9", "thanks"]
    assert "3/3" in terminal.screen[3]


@bars
def test_a_bar_of_an_earlier_run_is_pickled_without_its_screen(bar_class: Any, terminal: Terminal) -> None:
    bar = bar_class(refresh_rate=3, leave=True)
    run = trainer(bar)
    run.fit(Logging(), loader(2))
    bar._trainer = None
    copy = pickle.loads(pickle.dumps(bar))
    assert copy.refresh_rate == 3 and copy._leave
    trainer(copy).fit(Logging(), loader(4))
    assert place(copy) == (4, 4)
    assert place(bar) == (2, 2)


@bars
def test_an_error_leaves_the_bar_where_it_was(bar_class: Any, terminal: Terminal) -> None:
    class Fails(Logging):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    with pytest.raises(ZeroDivisionError):
        trainer(bar_class()).fit(Fails(), loader(5))
    print("the traceback")
    assert "2/5" in terminal.screen[0]
    assert terminal.screen[-1] == "the traceback"


@bars
def test_an_error_in_the_validation_leaves_each_bar_once(bar_class: Any, terminal: Terminal) -> None:
    class Fails(Logging):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(bar_class(), num_sanity_val_steps=0).fit(Fails(), loader(5), loader(3))
    print("the traceback")
    train, validation, after = terminal.screen
    assert "5/5" in train and "Validation" in validation and "1/3" in validation
    assert after == "the traceback"


def test_smoothing_of_a_bar_of_the_user_counts(terminal: Terminal) -> None:
    now, rates = [0.0], []

    class Smooth(TQDMProgressBar):
        def init_train_tqdm(self) -> Tqdm:
            bar = Tqdm(total=1, smoothing=1.0, file=sys.stdout)
            bar._time = lambda: now[0]
            return bar

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            now[0] += 1.0 if batch_idx < 3 else 0.1
            self._clock.next = 0.0
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            rates.append(self.train_progress_bar.format_dict["rate"])

    trainer(Smooth()).fit(Logging(), loader(4))
    # The speed of the last batch alone, not that of all.
    assert rates[-1] == pytest.approx(10.0)


def test_a_bar_that_a_subclass_sets_is_the_one_that_is_shown(terminal: Terminal) -> None:
    class Own(TQDMProgressBar):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            self.train_progress_bar = Tqdm(desc="x", file=sys.stdout, bar_format="own {n}/{total}", delay=1e9)

    trainer(Own()).fit(Logging(), loader(3))
    assert terminal.screen == ["own 3/3"]


def test_a_subclass_may_count_by_itself(terminal: Terminal) -> None:
    class Counts(TQDMProgressBar):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.train_progress_bar.reset(6)

        def on_train_batch_end(self, *args: Any) -> None:
            self.train_progress_bar.update(2)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.train_progress_bar.n == 6

    trainer(Counts()).fit(Logging(), loader(3))
    assert "6/6" in terminal.screen[0]


def test_an_empty_value_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_MINITERS", "")
    assert TQDMProgressBar(refresh_rate=2).refresh_rate == 2


@pytest.mark.parametrize(
    ("num_batches", "first", "second", "left"),
    [
        (4, {"max_epochs": 2}, {"max_epochs": 4}, ["01:10", "01:00", "00:50", "00:40", "00:30", "00:20", "00:10", None]),
        (9, {"max_steps": 4, "max_epochs": -1}, {"max_steps": 8}, ["00:30", "00:20", "00:10", None]),
        (9, {"max_steps": 4, "max_epochs": 8}, {"max_steps": 8}, ["00:30", "00:20", "00:10", None]),
        (2, {"max_epochs": 1}, {"max_epochs": 2}, [None, None]),
    ],
)  # fmt: skip
def test_the_time_left_is_that_of_what_this_call_trains(
    num_batches: int,
    first: dict[str, int],
    second: dict[str, int],
    left: list[str | None],
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a second call too, each of whose batches takes ten seconds as well."""
    clock_s, shown = [0.0], []
    monkeypatch.setattr("levin.callbacks.progress.drawn.monotonic", lambda: clock_s[0])

    class Slow(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            clock_s[0] += 10

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            shown.append(bar._notes(trainer, bar._train).get("run_left"))

    bar = TQDMProgressBar()
    run = trainer(bar, limit_val_batches=0, **first)
    run.callbacks.append(Slow())
    run.fit(Logging(), loader(num_batches))
    for name, value in second.items():
        setattr(run.fit_loop if name == "max_epochs" else run.fit_loop.epoch_loop, name, value)
    run.fit(run.lightning_module, loader(num_batches))
    assert shown == [*left, *left]


class Joint(Logging):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


@bars
@pytest.mark.parametrize(("mode", "total"), [("max_size_cycle", 3), ("min_size", 2), ("max_size", 3)])
def test_loaders_that_are_read_together_have_one_length(
    bar_class: Any, mode: str, total: int, terminal: Terminal
) -> None:
    seen = []

    class Looks(bar_class):
        def on_validation_batch_end(self, *args: Any) -> None:
            super().on_validation_batch_end(*args)
            seen.append(self.val_progress_bar.total)

    loaders = CombinedLoader({"a": loader(2), "b": loader(3)}, mode)
    trainer(Looks()).validate(Joint(), loaders, verbose=False)
    assert seen == [total] * total


@bars
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_that_is_off_writes_nothing(
    bar_class: Any, is_terminal: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_terminal:
        monkeypatch.setenv("TERM", "dumb")
    bar = bar_class(refresh_rate=0)
    run = trainer(bar)
    run.fit(Logging(), loader(3), loader(2))
    run.test(Logging(), loader(2), verbose=False)
    assert terminal.getvalue() == "" and bar.is_disabled and not bar.is_enabled
    with pytest.raises(TypeError, match="is not there|not been set"):
        _ = bar.train_progress_bar


@bars
def test_a_bar_can_be_switched_off_and_on_while_training(bar_class: Any, terminal: Terminal) -> None:
    seen = []

    class Switches(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            bar._clock.next = min(bar._clock.next, 0.0) if bar.is_enabled else bar._clock.next
            if (trainer.current_epoch, batch_idx) == (0, 1):
                bar.disable()
                seen.append(len(terminal.getvalue()))
            if (trainer.current_epoch, batch_idx) == (1, 1):
                seen.append(len(terminal.getvalue()))
                bar.enable()

    bar = bar_class()
    run = trainer(bar, max_epochs=2)
    run.callbacks.append(Switches())
    run.fit(Logging(), loader(3))
    assert seen[0] == seen[1] and len(terminal.getvalue()) > seen[1]
    assert "3/3" in terminal.screen[-1] or "3/3" in terminal.screen[-2]


@bars
@pytest.mark.parametrize("rate", [-1, "often", None])
def test_a_wrong_refresh_rate_is_refused(bar_class: Any, rate: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        bar_class(refresh_rate=rate)
    with pytest.raises(ValueError, match="refresh_rate must be >= 0, received -1. Use 0 to turn the bar off"):
        bar_class(refresh_rate=-1)


@pytest.mark.parametrize(
    ("num_samples", "share", "shown"), [(20, 0.05, "5%"), (19, 0.5, None), (20, 0.04, None), (500, 0.5, "50%")]
)
def test_a_wait_for_data_is_shown_where_it_counts(num_samples: int, share: float, shown: str | None) -> None:
    from types import SimpleNamespace

    from levin.callbacks.progress.renderer import TRAIN, ShownLoop

    shares = SimpleNamespace(num_samples=num_samples, share=lambda name: {"data": share}[name])
    for each, expected in ((shares, shown), (None, None)):
        run = SimpleNamespace(run=SimpleNamespace(time_shares=each), max_epochs=None, max_steps=-1)
        assert TQDMProgressBar()._notes(run, ShownLoop(TRAIN, "x")).get("data_wait") == expected
