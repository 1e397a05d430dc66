"""The ways in which a user may name devices, and what each kind of hardware makes of them."""

from __future__ import annotations

import importlib.machinery
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
from levin.accelerators.devices import parse_device_indices
from levin.accelerators.registry import AcceleratorRegistryType


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

    assert MPSAccelerator.parse_devices(1) == [0]
    assert MPSAccelerator.parse_devices("-1") == [0]
    assert MPSAccelerator.get_parallel_devices([0]) == [torch.device("mps", 0)]
    with pytest.raises(ValueError, match="mps"):
        MPSAccelerator.parse_devices(2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert MPSAccelerator.is_available()
    monkeypatch.setenv("DISABLE_MPS", "1")
    assert not MPSAccelerator.is_available()


def test_a_device_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"The cpu accelerator needs a cpu device, received cuda:0"):
        CPUAccelerator().setup_device(torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"The cuda accelerator needs a cuda device, received cpu"):
        CUDAAccelerator().setup_device(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"The mps accelerator needs an mps device, received cpu"):
        MPSAccelerator().setup_device(torch.device("cpu"))


def test_tpu_without_its_package():
    assert not XLAAccelerator.is_available()
    assert XLAAccelerator.auto_device_count() == 0
    with pytest.raises(ModuleNotFoundError, match=r"needs the package torch_xla, which is not installed"):
        XLAAccelerator()


def test_no_tpu_is_found_where_the_cloud_does_not_answer(monkeypatch):
    def asks_the_metadata_server():
        raise ConnectionError("metadata.google.internal")

    tpu = types.ModuleType("torch_xla._internal.tpu")
    tpu.num_available_devices = asks_the_metadata_server
    internal = types.ModuleType("torch_xla._internal")
    internal.tpu = tpu
    monkeypatch.setitem(sys.modules, "torch_xla", types.ModuleType("torch_xla"))
    sys.modules["torch_xla"].__spec__ = importlib.machinery.ModuleSpec("torch_xla", None)
    monkeypatch.setitem(sys.modules, "torch_xla._internal", internal)
    assert XLAAccelerator.auto_device_count() == 0
    assert not XLAAccelerator.is_available()


def test_tpu_cores(monkeypatch):
    monkeypatch.setattr(XLAAccelerator, "auto_device_count", staticmethod(lambda: 8))
    assert XLAAccelerator.parse_devices(8) == 8
    assert XLAAccelerator.parse_devices("-1") == 8
    assert XLAAccelerator.parse_devices([3]) == [3]
    assert XLAAccelerator.parse_devices("3,") == [3]
    assert XLAAccelerator.get_parallel_devices([3]) == [torch.device("xla", 3)]
    for devices in (2, "5", [8], [0, 1], "x", None):
        with pytest.raises(ValueError, match=r"devices must be 1, 8 or \[index\] with accelerator='tpu'"):
            XLAAccelerator.parse_devices(devices)


def test_cpu_statistics():
    stats = CPUAccelerator().get_device_stats("cpu")
    assert set(stats) == {"cpu_vm_percent", "cpu_percent", "cpu_swap_percent"}
    assert all(isinstance(value, float) for value in stats.values())


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
