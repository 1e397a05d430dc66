from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import DataLoader

from levin import Trainer
from levin.callbacks import DeviceStatsMonitor, ThroughputMonitor, throughput_monitor
from levin.demos.boring_classes import BoringModel, RandomDataset
from levin.strategies import SingleDeviceStrategy
from tests.loggers.test_logger import ListLogger


def fit(callback, model=None, **settings):
    logger = ListLogger()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=logger, callbacks=[callback], log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **({"limit_val_batches": 0} | settings),
    )  # fmt: skip
    trainer.fit(model or BoringModel(), DataLoader(RandomDataset(32, 12), batch_size=2))
    return [(step, values) for step, values in (line for line in logger.lines if isinstance(line, tuple))]


def test_rates_are_counts_over_the_time_that_passed(monkeypatch):
    now = [0.0]

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            now[0] += 0.25
            return now[0]

    monkeypatch.setattr(throughput_monitor, "time", Clock)
    model = BoringModel()
    model.flops_per_batch = 100
    monitor = ThroughputMonitor(len, length_fn=lambda batch: batch.numel(), window_size=3, available_flops=1000.0)
    lines = [values for _, values in fit(monitor, model) if "train/time" in values]
    assert [values["train/batches"] for values in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[1].keys() == {"train/time", "train/batches", "train/samples", "train/lengths", "epoch"}
    last = lines[-1]
    assert (last["train/samples"], last["train/lengths"]) == (12, 6 * 64)
    rate = last["train/device/batches_per_sec"]
    assert rate == pytest.approx(2 / (last["train/time"] - lines[-3]["train/time"]))
    assert last["train/device/samples_per_sec"] == pytest.approx(2 * rate)
    assert last["train/device/items_per_sec"] == pytest.approx(64 * rate)
    assert last["train/device/flops_per_sec"] == pytest.approx(100 * rate)
    assert last["train/device/mfu"] == pytest.approx(100 * rate / 1000)


def test_operations_are_counted_once_and_the_bar_shows_the_rates(capsys):
    shown = {}

    class Net(BoringModel):
        def on_train_end(self):
            shown.update(self.trainer.progress_bar_metrics)

    monitor = ThroughputMonitor(
        len, lambda batch: batch.numel(), count_flops=True, prog_bar=True, window_size=3, available_flops=1e9
    )
    lines = [values for _, values in fit(monitor, Net())]
    assert not any("items_per_sec" in values or "mfu" in values for values in lines), "that is for the bar alone"
    assert capsys.readouterr().out == ""
    last = [values for values in lines if "train/time" in values][-1]
    rate = last["train/device/batches_per_sec"]
    # Of a layer of 32 x 2 weights on 2 samples: forward, and the gradients of the weights.
    assert last["train/device/flops_per_sec"] == pytest.approx(2 * (2 * 32 * 2 * 2) * rate)
    assert shown["items_per_sec"] == pytest.approx(last["train/device/items_per_sec"])
    assert shown["mfu"] == pytest.approx(last["train/device/mfu"])


def test_without_lengths_the_bar_shows_samples():
    shown = {}

    class Net(BoringModel):
        def flops_per_batch(self, batch):
            return 50 * len(batch)

        def on_train_end(self):
            shown.update(self.trainer.progress_bar_metrics)

    lines = [values for _, values in fit(ThroughputMonitor(len, prog_bar=True, window_size=3), Net())]
    last = [values for values in lines if "train/time" in values][-1]
    assert last["train/device/flops_per_sec"] == pytest.approx(50 * last["train/device/samples_per_sec"])
    assert shown.pop("samples_per_sec") == pytest.approx(last["train/device/samples_per_sec"])
    assert not {"items_per_sec", "mfu"} & shown.keys()


@pytest.mark.parametrize(
    ("arguments", "attribute", "told"), [({}, None, 1), ({"count_flops": True}, None, 0), ({}, 5, 0)]
)
def test_that_no_operations_are_known_is_said_once(caplog, arguments, attribute, told):
    class Net(BoringModel):
        def on_train_end(self):
            shown.update(self.trainer.progress_bar_metrics)

    shown, model = {}, Net()
    if attribute is not None:
        model.flops_per_batch = attribute
    monitor = ThroughputMonitor(len, window_size=2, **arguments)
    with caplog.at_level("INFO", "levin"):
        lines = [values for _, values in fit(monitor, model)]
        monitor.setup(model.trainer, model, "test")
    texts = [text for text in caplog.messages if "flops" in text]
    assert texts == ["Net has no `flops_per_batch`, so no FLOPs are logged."] * told
    assert any("train/device/flops_per_sec" in values for values in lines) == (not told)
    assert not {"samples_per_sec", "mfu"} & shown.keys()


def test_the_share_of_the_device_is_that_of_its_rate_with_the_precision(monkeypatch):
    monkeypatch.setattr(throughput_monitor, "get_available_flops", lambda device, dtype: {torch.bfloat16: 1e9}[dtype])
    model = BoringModel()
    model.flops_per_batch = 100
    data = DataLoader(RandomDataset(32, 6))
    logger = ListLogger()
    Trainer(
        accelerator="cpu", max_epochs=1, logger=logger, callbacks=[ThroughputMonitor(len, window_size=2)], precision="bf16-true",
        log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, data)  # fmt: skip
    last = [line[1] for line in logger.lines if isinstance(line, tuple) and "train/device/mfu" in line[1]][-1]
    assert last["train/device/mfu"] == pytest.approx(last["train/device/flops_per_sec"] / 1e9)


def test_a_clock_that_stands_still_ends_no_run(monkeypatch):
    monkeypatch.setattr(throughput_monitor, "time", SimpleNamespace(perf_counter=lambda: 5.0))
    times = [values["train/time"] for _, values in fit(ThroughputMonitor(len)) if "train/time" in values]
    assert times == sorted(set(times)) and 0 < times[0] < times[-1] < 1e-6


def test_counting_ends_with_a_step_that_fails():
    class Net(BoringModel):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        fit(ThroughputMonitor(len, count_flops=True), Net())
    assert _get_current_dispatch_mode() is None


def test_validation_is_no_training_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput_monitor, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Net(BoringModel):
        def training_step(self, batch, batch_idx):
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            now[0] += 1000

    monitor = ThroughputMonitor(len)
    lines = [
        values
        for _, values in fit(monitor, Net(), limit_val_batches=2, val_check_interval=3, num_sanity_val_steps=1)
        if "train/time" in values
    ]
    assert [values["train/time"] for values in lines] == [1, 2, 3, 4, 5, 6]


def test_only_the_stats_that_are_asked_for():
    pytest.importorskip("psutil")
    lines = fit(DeviceStatsMonitor(filter_keys={"cpu_percent"}))
    names = {name for _, values in lines for name in values if "cpu" in name}
    assert names == {f"DeviceStatsMonitor.on_train_batch_{moment}/cpu_percent" for moment in ("start", "end")}
    more = {name for _, values in fit(DeviceStatsMonitor()) for name in values}
    assert "DeviceStatsMonitor.on_train_batch_end/cpu_vm_percent" in more


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_clock_per_stage_counts_evaluation_batches(stage):
    logger = ListLogger()
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=logger, callbacks=[ThroughputMonitor(len, window_size=2)],
        log_every_n_steps=2, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    more = {} if stage == "predict" else {"verbose": False}
    getattr(trainer, stage)(BoringModel(), DataLoader(torch.zeros(6, 32), batch_size=1), **more)
    lines = [line for line in logger.lines if isinstance(line, tuple) and f"{stage}/samples" in line[1]]
    assert [(step, values[f"{stage}/samples"]) for step, values in lines] == [(2, 2), (4, 4), (6, 6)]
    assert all(values[f"{stage}/device/batches_per_sec"] > 0 and "epoch" not in values for _, values in lines)


def test_rates_of_all_processes_are_those_of_one_times_their_number(monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "data_parallel", SimpleNamespace(size=3, rank=0))
    last = [values for _, values in fit(ThroughputMonitor(len, window_size=3)) if "train/time" in values][-1]
    for unit in ("batches", "samples"):
        assert last[f"train/{unit}_per_sec"] == pytest.approx(3 * last[f"train/device/{unit}_per_sec"])


def test_validation_inside_of_fit_has_a_clock_of_its_own():
    logger = ListLogger()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=logger, callbacks=[ThroughputMonitor(len, window_size=2)],
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    data = DataLoader(torch.zeros(3, 32), batch_size=1)
    for _ in range(2):  # the second call goes on with its epochs, and counts anew
        trainer.fit(BoringModel(), data, data)
        lines = [line for line in logger.lines if isinstance(line, tuple) and "validate/samples" in line[1]]
        assert [(step, values["validate/samples"]) for step, values in lines] == [
            (n, (n - 1) % 3 + 1) for n in range(1, 7)
        ]
        logger.lines.clear()
        trainer.fit_loop.max_epochs += 2
