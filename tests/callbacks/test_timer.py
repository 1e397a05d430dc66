from __future__ import annotations

import time
from datetime import timedelta

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


def test_training_stops_within_an_epoch(tmp_path):
    run = fit(tmp_path, Timer(timedelta(milliseconds=30)))
    assert run.global_step <= 2  # one batch takes 20 ms, or longer on a busy machine


def test_training_stops_at_the_end_of_an_epoch(tmp_path):
    run = fit(tmp_path, Timer(timedelta(milliseconds=30), interval="epoch"))
    assert (run.global_step, run.current_epoch) == (4, 1)


def test_without_time_nothing_is_trained(tmp_path):
    assert fit(tmp_path, Timer(timedelta(0))).global_step == 0


def test_the_least_number_of_steps_is_done_all_the_same(tmp_path):
    assert fit(tmp_path, Timer(timedelta(milliseconds=1)), min_steps=6).global_step == 6


def test_stages_are_measured(tmp_path):
    callback = Timer()
    run = fit(tmp_path, callback, max_epochs=1)
    elapsed = callback.time_elapsed()
    assert elapsed == callback.end_time() - callback.start_time() >= 0.08
    assert 0 < callback.time_elapsed("validate") < elapsed
    assert callback.time_elapsed("sanity_check") == 0
    run.validate(Slow(), loader(2), verbose=False)
    assert callback.time_elapsed() == elapsed


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


def test_max_time_makes_a_timer(tmp_path):
    run = trainer(tmp_path, [], max_time={"hours": 1})
    assert [callback.time_remaining() for callback in run.callbacks if isinstance(callback, Timer)] == [3600.0]
