"""The ways in which a user may name devices, and what each kind of hardware makes of them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import subprocess
import sys
import types

import pytest
import torch

from levin.accelerators import (
    Accelerator,
    AcceleratorRegistry,
    CPUAccelerator,
    CUDAAccelerator,
    MPSAccelerator,
    XLAAccelerator,
    find_usable_cuda_devices,
)
from levin.accelerators.cuda import _hint_matmul_precision
from levin.accelerators.devices import parse_device_indices
from levin.accelerators.registry import AcceleratorRegistryType
from levin.utilities.xla_generator import XlaGenerator


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (1, [0]),
        (3, [0, 1, 2]),
        ("2", [0, 1]),
        (" 2 ", [0, 1]),
        (-1, [0, 1, 2, 3]),
        ("-1", [0, 1, 2, 3]),
        ([2], [2]),
        ([3, 1], [3, 1]),
        ((0, 1), [0, 1]),
        ("3,", [3]),
        ("0, 2", [0, 2]),
    ],
)
def test_indices_by_number_and_by_name(devices, expected):
    assert parse_device_indices(devices, available=range(4)) == expected


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (0, r"must name at least one cuda device, received 0 with 4 available\. Use devices=1"),
        ("0", r"must name at least one cuda device, received '0'"),
        ([], r"must name at least one cuda device, received \[\]"),
        ("", r"must be a number"),
        (-2, r"must be > 0 or -1 for all devices, received -2"),
        ("-2", r"must be > 0 or -1 for all devices, received '-2'"),
        ([1, 1], r"must name each cuda device once, received \[1, 1\]"),
        ("1,1", r"must name each cuda device once, received '1,1'"),
        ([4], r"asks for cuda devices \[4\], received \[4\], but this machine has \[0, 1, 2, 3\]"),
        (5, r"asks for cuda devices \[0, 1, 2, 3, 4\], received 5, but this machine has"),
    ],
)
def test_impossible_devices(devices, message):
    with pytest.raises((ValueError, TypeError), match=message):
        parse_device_indices(devices, available=range(4))


@pytest.mark.parametrize("devices", [1.0, None, True, [True], ["1"], [1.0], "a", "1,b", {0}, {"a": 1}])
def test_other_forms(devices):
    with pytest.raises(TypeError, match=r"devices must be a number \(2, '2'\), -1 for all, or indices .* received"):
        parse_device_indices(devices, available=range(4))


def test_no_devices_at_all():
    with pytest.raises(ValueError, match=r"received -1 with 0 available"):
        parse_device_indices(-1, available=range(0))


def test_cpu_devices_are_processes():
    for devices, expected in ((1, 1), (4, 4), ("3", 3), (" 2 ", 2), (True, 1)):
        assert CPUAccelerator.parse_devices(devices) == expected
    assert CPUAccelerator.get_parallel_devices(2) == [torch.device("cpu")] * 2
    assert CPUAccelerator.auto_device_count() == 1
    assert CPUAccelerator.is_available()
    for devices in (-1, "-1", [0], [0, 1], "0,1", "1,", 1.0, None, "many"):
        with pytest.raises(TypeError, match=r"devices must be an int > 0 with accelerator='cpu' .* received"):
            CPUAccelerator.parse_devices(devices)
    for devices in (0, "0", False):
        with pytest.raises(ValueError, match=r"devices must be > 0, received"):
            CPUAccelerator.parse_devices(devices)


def test_cuda_and_mps_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert CUDAAccelerator.is_available()
    assert CUDAAccelerator.auto_device_count() == 2
    assert CUDAAccelerator.parse_devices("-1") == [0, 1]
    assert CUDAAccelerator.get_parallel_devices([1]) == [torch.device("cuda", 1)]
    with pytest.raises(ValueError, match=r"but this machine has \[0, 1\]"):
        CUDAAccelerator.parse_devices([2])
    monkeypatch.setattr("levin.accelerators.cuda.is_interactive", lambda: True)
    assert CUDAAccelerator.auto_device_count() == 1
    for count in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)  # noqa: B023
        assert CUDAAccelerator.auto_device_count() == count
        assert CUDAAccelerator.is_available() is bool(count)

    assert MPSAccelerator.auto_device_count() == 1
    assert MPSAccelerator.parse_devices(1) == [0]
    assert MPSAccelerator.parse_devices("-1") == [0]
    assert MPSAccelerator.get_parallel_devices([0]) == [torch.device("mps", 0)]
    with pytest.raises(ValueError, match="mps"):
        MPSAccelerator.parse_devices(2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert MPSAccelerator.is_available()
    monkeypatch.setenv("DISABLE_MPS", "1")
    assert MPSAccelerator.is_available() is False


def test_memory_of_an_apple_is_measured_and_given_back(monkeypatch):
    emptied = []
    for name, function in {
        "current_allocated_memory": lambda: 3, "driver_allocated_memory": lambda: 5, "empty_cache": lambda: emptied.append(1),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.mps, name, function)
    measured = MPSAccelerator().get_device_stats("mps")
    assert measured == {"mps.current_allocated_bytes": 3, "mps.driver_allocated_bytes": 5}
    MPSAccelerator().teardown()
    assert emptied == [1]


def test_the_cuda_device_of_a_process_is_made_its_own_and_fast_products_are_pointed_out_once(monkeypatch, caplog):
    used: list[object] = []
    capability = [8, 0]
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: used.append("emptied"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"bytes": 7})
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    accelerator, device, told = CUDAAccelerator(), torch.device("cuda", 1), []
    for capability[0], precision in ((8, "highest"), (7, "highest"), (8, "high")):
        _hint_matmul_precision.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="levin"):
            accelerator.setup_device(device)
            accelerator.setup_device(device)
        told.append(caplog.messages)
    _hint_matmul_precision.cache_clear()
    assert told == [
        ["'Card' has Tensor Cores. To use them for float32 matrix products, call "
         "`torch.set_float32_matmul_precision('medium' | 'high')`: faster, with fewer digits."], [], [],
    ]  # fmt: skip
    assert used == [device] * 6
    accelerator.setup(None)
    accelerator.teardown()
    assert used[6:] == ["emptied"] * 2
    assert accelerator.get_device_stats(device) == {"bytes": 7}


def test_a_device_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"The cpu accelerator needs a cpu device, received cuda:0"):
        CPUAccelerator().setup_device(torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"The cuda accelerator needs a cuda device, received cpu"):
        CUDAAccelerator().setup_device(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"The mps accelerator needs an mps device, received cpu"):
        MPSAccelerator().setup_device(torch.device("cpu"))


def test_tpu_without_its_package():
    assert XLAAccelerator.is_available() is False
    assert XLAAccelerator.auto_device_count() == 0
    with pytest.raises(ModuleNotFoundError, match=r"needs the package torch_xla, which is not installed"):
        XLAAccelerator()


def pretend_torch_xla(monkeypatch, count_tpus, **runtime) -> None:
    """Let torch_xla seem to be installed, with a way of counting TPUs and what else it may be asked for."""
    monkeypatch.delenv("PJRT_DEVICE", raising=False)
    modules = {name: types.ModuleType(name) for name in ("torch_xla", "torch_xla._internal", "torch_xla.core")}
    modules["torch_xla"].__spec__ = importlib.machinery.ModuleSpec("torch_xla", None)
    modules["torch_xla._internal"].tpu = types.SimpleNamespace(num_available_devices=count_tpus)
    modules["torch_xla.core.xla_model"] = types.SimpleNamespace(**runtime)
    modules["torch_xla.core"].xla_model = modules["torch_xla.core.xla_model"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_no_tpu_is_found_where_the_cloud_does_not_answer(monkeypatch):
    def asks_the_metadata_server():
        raise ConnectionError("metadata.google.internal")

    pretend_torch_xla(monkeypatch, asks_the_metadata_server)
    assert XLAAccelerator.auto_device_count() == 0
    assert XLAAccelerator.is_available() is False
    # Another device stands in: as many of it as there are processes.
    monkeypatch.setenv("PJRT_DEVICE", "CPU")
    assert XLAAccelerator.auto_device_count() == 1
    assert XLAAccelerator.parse_devices(3) == 3
    assert XLAAccelerator().get_device_stats("xla:0") == {}


def test_a_tpu_is_taken_into_use_and_measured(monkeypatch):
    memory = {"bytes_limit": 9 * 2**20, "bytes_used": 2 * 2**20, "peak_bytes_used": 4 * 2**20}
    pretend_torch_xla(monkeypatch, lambda: 1, get_memory_info=lambda device: memory)
    assert XLAAccelerator.is_available() is True
    started = []
    sys.modules["torch_xla"].device = lambda: started.append(True)
    generator = XlaGenerator()
    monkeypatch.setattr("levin.accelerators.xla.XLA_GENERATOR", generator)
    XLAAccelerator().setup_device(torch.device("xla", 0))
    assert started == [True] and generator.state == torch.initial_seed() % 2**63
    with pytest.raises(ValueError, match="The tpu accelerator needs an xla device, received cpu"):
        XLAAccelerator().setup_device(torch.device("cpu"))
    measured = XLAAccelerator().get_device_stats("xla:0")
    assert measured == {"avg. free memory (MB)": 7.0, "avg. peak memory (MB)": 4.0}


def test_tpu_cores(monkeypatch):
    monkeypatch.setattr(XLAAccelerator, "auto_device_count", staticmethod(lambda: 8))
    assert XLAAccelerator.parse_devices(8) == 8
    assert XLAAccelerator.parse_devices("-1") == 8
    assert XLAAccelerator.parse_devices([3]) == [3]
    assert XLAAccelerator.parse_devices("3,") == [3]
    assert XLAAccelerator.get_parallel_devices([3]) == [torch.device("xla", 3)]
    assert XLAAccelerator.get_parallel_devices(2) == [torch.device("xla", 0), torch.device("xla", 1)]
    for devices in (2, "5", [8], [0, 1], "x", None, True, 0):
        with pytest.raises(ValueError, match=r"devices must be 1, 8 or \[index\] with accelerator='tpu'"):
            XLAAccelerator.parse_devices(devices)


def test_cpu_statistics():
    stats = CPUAccelerator().get_device_stats("cpu")
    assert set(stats) == {"cpu_vm_percent", "cpu_percent", "cpu_swap_percent"}
    assert all(isinstance(value, float) for value in stats.values())


def test_cpu_statistics_need_a_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="CPU statistics needs the package psutil"):
        CPUAccelerator().get_device_stats("cpu")


def test_usable_cuda_devices(monkeypatch):
    assert find_usable_cuda_devices(0) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"but this machine has none"):
        find_usable_cuda_devices()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)

    def taken(size, device):
        if device.index == 0:
            raise RuntimeError("all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(torch, "zeros", taken)
    assert find_usable_cuda_devices() == [1, 2]
    assert find_usable_cuda_devices(1) == [1]
    with pytest.raises(ValueError, match=r"num_devices must be <= 3"):
        find_usable_cuda_devices(4)
    with pytest.raises(RuntimeError, match=r"\[0\] are taken by other processes and only \[1, 2\] can be used"):
        find_usable_cuda_devices(3)


class Toy(Accelerator):
    def __init__(self, size: int = 1) -> None:
        self.size = size

    @staticmethod
    def name() -> str:
        return "toy"

    @staticmethod
    def parse_devices(devices):
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices):
        return [torch.device("cpu")] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True


def test_registry():
    registry = AcceleratorRegistryType()
    registry.register("toy", Toy, description="a toy", size=3)
    assert registry.get("toy").size == 3
    assert "toy" in registry
    with pytest.raises(ValueError, match=r"'toy' is taken\. Pass override=True"):
        registry.register("toy", Toy)
    registry.register("toy", Toy, override=True)
    assert registry.get("toy").size == 1

    @registry.register("other")
    class Other(Toy):
        pass

    assert registry.get_class("other") is Other
    assert registry.available_accelerators() == ["other", "toy"]
    registry.remove("other")
    with pytest.raises(KeyError, match=r"No accelerator is named 'other'\. Available names: toy"):
        registry.get("other")
    with pytest.raises(TypeError, match="name must be a str"):
        registry.register(1, Toy)
    assert list(AcceleratorRegistry) == ["tpu", "cuda", "cpu", "mps"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_cuda_device():
    accelerator = CUDAAccelerator()
    device = accelerator.get_parallel_devices(accelerator.parse_devices(1))[0]
    accelerator.setup_device(device)
    held = torch.ones(1000, device=device)
    stats = accelerator.get_device_stats(device)
    assert stats["allocated_bytes.all.current"] >= held.nbytes
    assert find_usable_cuda_devices(1) == [0]
    accelerator.teardown()


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_devices_are_counted_without_a_context_unless_the_user_says_otherwise(given, expected):
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: given} if given else {})
    program = f"from levin.accelerators import CUDAAccelerator; import os; print(os.environ[{name!r}])"
    printed = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.strip() == expected
