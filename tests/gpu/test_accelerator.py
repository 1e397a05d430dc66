"""The CUDA accelerator: names of devices, memory and statistics."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from levin import Trainer
from levin.accelerators import CUDAAccelerator, find_usable_cuda_devices
from levin.callbacks import DeviceStatsMonitor
from levin.loggers import CSVLogger
from tests.gpu.small import DEVICE, Net, loader, trainer

COUNT = torch.cuda.device_count()


@pytest.mark.parametrize(
    "accelerator", ["cuda", "gpu", "auto", CUDAAccelerator()], ids=lambda a: a if isinstance(a, str) else "own"
)
@pytest.mark.parametrize("devices", [1, "1", [0], "0", "0,"], ids=str)
def test_the_first_device_by_each_of_its_names(accelerator, devices):
    if devices == "0":
        with pytest.raises(ValueError, match="at least one device, received '0'"):
            trainer(accelerator=accelerator, devices=devices)
        return
    runner = trainer(accelerator=accelerator, devices=devices)
    assert isinstance(runner.accelerator, CUDAAccelerator)
    assert runner.strategy.root_device == DEVICE
    assert runner.device_ids == [0]
    assert runner.num_devices == 1


@pytest.mark.parametrize("devices", [-1, "-1", "auto"])
def test_all_devices(devices):
    if COUNT > 1:
        assert trainer(devices=devices).num_devices == COUNT
    else:
        assert trainer(devices=devices).device_ids == [0]


@pytest.mark.parametrize(
    ("devices", "error", "words"),
    [
        (COUNT + 1, ValueError, f"this machine has {list(range(COUNT))}"),
        ([COUNT], ValueError, f"this machine has {list(range(COUNT))}"),
        ([0, 0], ValueError, "each cuda device once"),
        (0, ValueError, "at least one cuda device"),
        ([], ValueError, "at least one device"),
        (-2, ValueError, "must be > 0 or -1"),
        ("one", TypeError, "must be a number"),
        (1.0, TypeError, "received 1.0 of type float"),
        (True, TypeError, "received True of type bool"),
    ],
    ids=str,
)
def test_wrong_devices_say_what_there_is(devices, error, words):
    with pytest.raises(error) as raised:
        Trainer(accelerator="cuda", devices=devices, logger=False)
    assert words in str(raised.value)


def test_usable_devices():
    assert find_usable_cuda_devices() == list(range(COUNT))
    assert find_usable_cuda_devices(1) == [0]
    with pytest.raises(ValueError, match=f"must be <= {COUNT}"):
        find_usable_cuda_devices(COUNT + 1)


def test_the_properties_of_the_accelerator():
    assert CUDAAccelerator.name() == "cuda"
    assert CUDAAccelerator.is_available()
    assert CUDAAccelerator.auto_device_count() == COUNT
    assert CUDAAccelerator.get_parallel_devices([0]) == [DEVICE]
    with pytest.raises(ValueError, match="needs a cuda device, received cpu"):
        CUDAAccelerator().setup_device(torch.device("cpu"))


def test_the_module_is_on_the_device_in_the_hooks_and_not_after_the_fit():
    class Looking(Net):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.places = (self.device, self.on_gpu, batch.device, outputs["loss"].device, torch.cuda.current_device())

        def on_fit_end(self):
            self.at_end = self.device

    module = Looking()
    trainer().fit(module, loader())
    assert module.places == (DEVICE, True, DEVICE, DEVICE, 0)
    assert module.at_end == torch.device("cpu")


def test_optimizer_states_are_on_the_device():
    runner = trainer()
    runner.fit(Net(), loader())
    (optimizer,) = runner.optimizers
    for parameter, state in optimizer.state.items():
        assert parameter.device == state["exp_avg"].device


def test_device_stats_are_numbers_and_grow_with_memory():
    accelerator = CUDAAccelerator()
    before = accelerator.get_device_stats(DEVICE)
    held = torch.empty(2**22, dtype=torch.uint8, device=DEVICE)
    after = accelerator.get_device_stats(DEVICE)
    assert all(isinstance(value, (int, float)) for value in after.values())
    assert after["allocated_bytes.all.current"] - before["allocated_bytes.all.current"] == held.numel()


def test_the_device_stats_monitor_logs_memory(tmp_path):
    keys = {"allocated_bytes.all.current", "allocated_bytes.all.peak"}
    logger = CSVLogger(tmp_path)
    runner = trainer(logger=logger, callbacks=DeviceStatsMonitor(filter_keys=keys), log_every_n_steps=1)
    runner.fit(Net(), loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = {f"DeviceStatsMonitor.on_train_batch_{when}/{key}" for when in ("start", "end") for key in keys}
    assert names <= set(rows[0])
    for name in names:
        logged = [float(row[name]) for row in rows if row[name]]
        assert len(logged) == 8
        assert all(value > 0 for value in logged)
