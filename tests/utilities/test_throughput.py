"""Rates over a window, beside Lightning's, and what devices can do."""

from __future__ import annotations

import pytest
import torch

from levin.utilities.throughput import Throughput, get_available_flops, measure_flops


def filled(kind, window_size=3, lengths=False, flops=False, **options):
    """What is computed after each of five updates."""
    throughput = kind(window_size=window_size, **options)
    computed = []
    for index in range(1, 6):
        more = {"lengths": 100 * index**2} if lengths else {}
        more |= {"flops": 10 * index} if flops else {}
        throughput.update(time=0.5 * index, batches=index, samples=4 * index + index**2, **more)
        computed.append(throughput.compute())
    throughput.reset()
    throughput.update(time=0.1, batches=1, samples=1)
    return [*computed, throughput.compute()]


WAYS = [
    {}, {"lengths": True}, {"flops": True}, {"flops": True, "available_flops": 50.0, "world_size": 2, "lengths": True},
    {"world_size": 3, "separator": "."}, {"flops": True, "available_flops": 7.0, "separator": "_", "window_size": 2},
    {"available_flops": 50.0, "window_size": 6},
]  # fmt: skip


@pytest.mark.parametrize("options", WAYS)
def test_rates_are_as_lightnings(options):
    theirs = pytest.importorskip("lightning.fabric.utilities.throughput")
    assert filled(Throughput, **options) == filled(theirs.Throughput, **options)


def test_rates_of_several_devices():
    *_, last, fresh = filled(Throughput, flops=True, available_flops=50.0, world_size=2, lengths=True)
    assert fresh == {"time": 0.1, "batches": 1, "samples": 1}
    assert last == {
        "time": 2.5, "batches": 5, "samples": 45, "lengths": 2500, "device/batches_per_sec": 2, "batches_per_sec": 4,
        "device/samples_per_sec": 24, "samples_per_sec": 48, "device/items_per_sec": 1600, "items_per_sec": 3200,
        "device/flops_per_sec": 90, "flops_per_sec": 180, "device/mfu": 1.8,
    }  # fmt: skip
    assert Throughput().window_size == 100 and Throughput().world_size == 1 and Throughput().separator == "/"


@pytest.mark.parametrize(
    ("before", "now", "kind", "words"),
    [
        ((1, 1, 2), (1, 2, 2), ValueError, "time must grow, received 1 after 1. Give totals since the start."),
        ((1, 1, 2), (2, 1, 2), ValueError, "batches must grow, received 1 after 1. Give totals since the start."),
        (None, (1, 2, 1), ValueError, "samples must grow and be >= batches, received 1 with 2 batches."),
        ((1, 1, 9), (2, 2, 8), ValueError, "samples must grow and be >= batches, received 8 with 2 batches."),
        (None, (1, 1, 4, 3), ValueError, "Expected lengths (3) to be greater or equal than samples (4)."),
        ((1, 1, 2), (2, 2, 2, 2), RuntimeError, "lengths must be given at every update or at none. Call reset() before a change."),
        ((1, 1, 2, 2, 1), (2, 2, 2, 2), RuntimeError, "flops must be given at every update or at none. Call reset() before a change."),
    ],
)  # fmt: skip
def test_totals_that_do_not_fit_are_refused(before, now, kind, words):
    throughput, names = Throughput(), ("time", "batches", "samples", "lengths", "flops")
    for totals in (before, now)[before is None : 1]:
        throughput.update(**dict(zip(names, totals)))
    with pytest.raises(kind) as caught:
        throughput.update(**dict(zip(names, now)))
    assert str(caught.value) == words
    if before is not None:
        assert throughput.compute()["time"] == before[0]
        throughput.update(**dict(zip(names, (2, 2, *before[2:]))))  # equal samples are fine


def test_a_window_has_two_updates_at_least():
    assert Throughput(window_size=2).window_size == 2
    with pytest.raises(ValueError, match="window_size must be >= 2, received 1. A rate needs two updates."):
        Throughput(window_size=1)


def test_operations_of_forward_and_backward():
    with torch.device("meta"):
        model, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    assert measure_flops(model, lambda: model(x)) == 2 * 2 * 4 * 3
    assert measure_flops(model, lambda: model(x), lambda out: out.sum()) == 2 * (2 * 2 * 4 * 3)


H100 = {"float32": 6.7e13, "tf32": 4.95e14, "bfloat16": 9.89e14, "float16": 9.89e14}


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", H100), ("NVIDIA H200", H100),
        ("NVIDIA H100 PCIe", {"float32": 5.1e13, "tf32": 3.78e14, "bfloat16": 7.56e14, "float16": 7.56e14}),
        ("NVIDIA A100-SXM4-40GB", {"float32": 1.95e13, "tf32": 1.56e14, "bfloat16": 3.12e14, "float16": 3.12e14}),
        ("NVIDIA L4", {"float32": 3.03e13, "tf32": 6e13, "bfloat16": 1.21e14, "float16": 1.21e14}),
        ("NVIDIA L40S", {"float32": 9.16e13, "tf32": 1.83e14, "bfloat16": 3.62e14, "float16": 3.62e14}),
        ("Tesla T4", {"float32": 8.1e12, "tf32": 8.1e12, "bfloat16": None, "float16": 6.5e13}),
    ],
)  # fmt: skip
def test_what_a_gpu_can_do_at_most(monkeypatch, name, flops):
    device, precision = torch.device("cuda", 0), torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    try:
        torch.set_float32_matmul_precision("highest")
        for dtype in ("float32", "bfloat16", "float16"):
            assert get_available_flops(device, getattr(torch, dtype)) == flops[dtype]
        torch.set_float32_matmul_precision("high")
        assert get_available_flops(device, torch.float32) == flops["tf32"]
        assert get_available_flops(device, torch.float16) == flops["float16"]
    finally:
        torch.set_float32_matmul_precision(precision)


def test_of_a_device_that_is_not_known_nothing_is_said(monkeypatch):
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.warns(
        UserWarning, match="^The FLOPs of 'some gpu' are not known. Give `available_flops` to compute their share.$"
    ):
        assert get_available_flops(torch.device("cuda"), torch.float32) is None
