from __future__ import annotations

import time
from datetime import timedelta
from types import SimpleNamespace

import pytest

from levin.callbacks import Timer
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import Small, loader, trainer


class Slow(Small):
    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)


def fit(folder, callback, **kwargs):
    run = trainer(folder, [callback], **{"max_epochs": 100, **kwargs})
    run.fit(Slow(), loader(), loader(2))
    return run


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [("01:02:03:04", 93784.0), (timedelta(seconds=2), 2.0), ({"minutes": 1}, 60.0), (None, None)],
)
def test_durations(duration, seconds):
    assert Timer(duration).time_remaining() == seconds


def test_wrong_arguments_are_refused():
    with pytest.raises(MisconfigurationException, match="DD:HH:MM:SS"):
        Timer("1:2")
    with pytest.raises(TypeError, match="received 5"):
        Timer(5)
    with pytest.raises(MisconfigurationException, match="interval"):
        Timer(interval="batch")


def test_without_time_nothing_is_trained(tmp_path):
    assert fit(tmp_path, Timer(timedelta(0))).global_step == 0


def test_the_least_number_of_steps_is_done_all_the_same(tmp_path):
    assert fit(tmp_path, Timer(timedelta(milliseconds=1)), min_steps=6).global_step == 6


def test_the_time_before_a_resume_counts(tmp_path):
    callback = Timer("00:00:00:10")
    callback.load_state_dict({"time_elapsed": {"train": 4.0, "validate": 2.0}})
    assert (callback.time_elapsed(), callback.time_remaining(), callback.time_elapsed("validate")) == (4.0, 6.0, 0.0)
    run = fit(tmp_path, callback, max_epochs=1)
    assert run.current_epoch == 1
    assert callback.time_elapsed() > 4.08
    assert callback.state_dict()["time_elapsed"]["train"] == callback.time_elapsed()


def test_a_resumed_run_without_time_left_does_not_begin(tmp_path):
    callback = Timer(timedelta(seconds=1))
    callback.load_state_dict({"time_elapsed": {"train": 2.0}})
    assert fit(tmp_path, callback).global_step == 0


@pytest.fixture
def now(monkeypatch):
    """The time that all clocks show; a batch of training takes one second, one of another stage ten."""
    now = [100.0]
    for module in ("levin.ranks.clock", "levin.callbacks.timer"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("levin.loops.run.Run.now_s", property(lambda run: now[0]))
    return now


class Timed(Small):
    def __init__(self, now):
        super().__init__()
        self.now = now

    def on_train_batch_start(self, batch, batch_idx):
        self.now[0] += 1

    def validation_step(self, batch, batch_idx):
        self.now[0] += 10

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.now[0] += 10
        return batch


def test_each_stage_has_its_time(tmp_path, now):
    callback, module = Timer(), Timed(now)
    run = trainer(tmp_path, [callback], max_epochs=2)
    run.fit(module, loader(), loader(2))
    assert (callback.start_time(), callback.end_time(), callback.time_elapsed()) == (100.0, 148.0, 48.0)
    assert callback.time_elapsed("validate") == 20.0  # the last one
    run.validate(module, loader(3), verbose=False)
    run.test(module, loader(4), verbose=False)
    run.predict(module, loader(5))
    now[0] += 1000
    times = {"train": 48.0, "sanity_check": 0.0, "validate": 30.0, "test": 40.0, "predict": 50.0}
    assert callback.state_dict() == {"time_elapsed": times}


@pytest.mark.parametrize(
    ("arguments", "before_s", "step", "elapsed"),
    [
        ({}, 0.0, 9, "0:00:09"),
        ({}, 7.0, 2, "0:00:09"),
        ({"interval": "epoch"}, 0.0, 12, "0:00:12"),
        ({"interval": "epoch"}, 7.0, 4, "0:00:11"),
        ({"verbose": False}, 0.0, 9, None),
        ({}, 9.0, 0, "0:00:09"),
    ],
)
def test_training_ends_when_its_time_is_up_and_says_so(tmp_path, now, caplog, arguments, before_s, step, elapsed):
    callback = Timer(timedelta(seconds=9), **arguments)
    callback.load_state_dict({"time_elapsed": {"train": before_s}})
    with caplog.at_level("INFO", "levin"):
        run = trainer(tmp_path, [callback], max_epochs=9)
        run.fit(Timed(now), loader(), [])
    assert run.global_step == step
    told = [text for text in caplog.messages if "limit" in text]
    expected = f"Time limit reached. Elapsed time is {elapsed}. Signaling Trainer to stop."
    assert told == ([] if elapsed is None else [expected])


def test_max_time_makes_a_timer(tmp_path):
    run = trainer(tmp_path, [], max_time={"hours": 1})
    assert [callback.time_remaining() for callback in run.callbacks if isinstance(callback, Timer)] == [3600.0]
