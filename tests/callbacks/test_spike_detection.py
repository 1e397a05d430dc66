"""SpikeDetection: where the batches are written down, and how it goes on; what a spike is stands beside Lightning's in tests/parity."""

from __future__ import annotations

import json

import pytest
import torch

from levin.callbacks import SpikeDetection, TrainingSpikeException
from levin.strategies import SingleDeviceStrategy
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import TrainOnly, loader, trainer


class Jumps(TrainOnly):
    def __init__(self, *losses):
        super().__init__()
        self.losses = losses

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum() * 0 + self.losses[batch_idx]


@pytest.mark.parametrize(
    ("path", "file"),
    [
        (None, "skip_batches.json"),
        ("new/folder", "new/folder/skip_batches.json"),
        ("new/own.json", "new/own.json"),
    ],
)
def test_the_batches_are_written_where_the_user_says(tmp_path, path, file):
    detection = SpikeDetection(exclude_batches_path=None if path is None else tmp_path / path)
    with pytest.raises(TrainingSpikeException, match="^Training spike detected in batch 2$") as error:
        trainer(tmp_path, [detection]).fit(Jumps(1.0, 1.0, 9.0, 1.0), loader())
    assert error.value.batch_idx == 2
    assert json.loads((tmp_path / file).read_text()) == [1, 2]


def test_batches_without_a_loss_are_passed_by(tmp_path):
    class Skips(Jumps):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match="returned None"):
        trainer(tmp_path, [SpikeDetection()], max_epochs=1).fit(Skips(1.0, 1.0, 1.0, 1.0), loader())


def strategy():
    return SingleDeviceStrategy(torch.device("cpu"))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_detection_that_is_loaded_goes_on(tmp_path, mode):
    first, second = (SpikeDetection(mode, window=2, exclude_batches_path=tmp_path / "a.json") for _ in range(2))
    for index, loss in enumerate((8.0, 1.0, 1.0) if mode == "min" else (-8.0, -1.0, -1.0)):
        first.look_at(loss, index, strategy())
    state = first.state_dict()
    assert state == {
        "last_val": 1.0 if mode == "min" else -1.0, "mode": mode, "warmup": 1, "atol": None, "rtol": 2.0, "bad_batches": [],
        "bad_batches_path": str(tmp_path / "a.json"), "window": [1.0, 1.0] if mode == "min" else [-1.0, -1.0],
    }  # fmt: skip
    second.load_state_dict(state)
    assert second.state_dict() == state
    with pytest.raises(TrainingSpikeException):
        second.look_at(4.0 if mode == "min" else -4.0, 3, strategy())
    assert second.bad_batches == [2, 3] and first.bad_batches == []


@pytest.mark.parametrize(
    ("arguments", "losses", "is_spike"),
    [
        ({"rtol": 1.0}, (2.0, 4.0), True),  # as far as rtol says
        ({"rtol": 1.0}, (2.0, 3.9), False),
        ({"rtol": None, "atol": 1.5}, (2.0, 3.5), True),
        ({"rtol": None, "atol": -1.5}, (2.0, 3.4), False),
        ({"rtol": 1.0, "atol": 5.0}, (2.0, 6.0), False),
        ({"rtol": 1.0, "atol": 1.0}, (-2.0, 0.5), True),
        ({"rtol": 1.0, "window": 1}, (9.0, 2.0, 4.0), True),
        ({"rtol": 1.0, "window": 2}, (9.0, 2.0, 4.0), False),
        ({"warmup": 2}, (2.0, 99.0), False),
        ({"warmup": 0}, (99.0,), False),
        ({"warmup": 0}, (float("nan"),), True),
        ({"finite_only": False}, (2.0, float("inf")), False),
        ({"rtol": 1.0}, (2.0, -99.0), False),
        ({"rtol": 1.0, "mode": "max"}, (2.0, -99.0), True),
        ({"rtol": 1.0, "mode": "max"}, (2.0, 99.0), False),
    ],
)
def test_what_a_spike_is(tmp_path, arguments, losses, is_spike):
    detection = SpikeDetection(**arguments, exclude_batches_path=tmp_path / "a.json")
    *before, last = enumerate(losses)
    for index, loss in before:
        detection.look_at(loss, index, strategy())
    if is_spike:
        with pytest.raises(TrainingSpikeException):
            detection.look_at(torch.tensor([last[1]], requires_grad=True), last[0], strategy())
        assert detection.bad_batches == [index for index in (last[0] - 1, last[0]) if index >= 0]
    else:
        detection.look_at(torch.tensor([last[1]], requires_grad=True), last[0], strategy())


def test_arguments_are_checked():
    with pytest.raises(MisconfigurationException, match="window must be >= 1, received 0"):
        SpikeDetection(window=0)
    with pytest.raises(MisconfigurationException, match="mode must be 'min' or 'max'"):
        SpikeDetection("best")
