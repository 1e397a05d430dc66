from __future__ import annotations

import pytest
import torch
from torch import nn

from levin.utilities.move import move_module
from levin.utilities.parameters import all_modules, find_shared_parameters, grad_norm, set_shared_parameters
from levin.utilities.throughput import Throughput, get_available_flops, measure_flops


@pytest.mark.parametrize(("kind", "total", "first"), [(2, 13.0, 5.0), ("inf", 12.0, 4.0), (1, 19.0, 7.0)])
def test_norms_of_gradients(kind, total, first):
    net = nn.ModuleDict({"a": nn.Linear(2, 1, bias=False), "b": nn.Linear(1, 1, bias=False), "c": nn.Linear(1, 1)})
    net["a"].weight.grad = torch.tensor([[3.0, -4.0]])
    net["b"].weight.grad = torch.tensor([[12.0]])
    norms = grad_norm(net, kind, group_separator=".")
    p = float(kind)
    assert norms.keys() == {f"grad_{p}_norm.a.weight", f"grad_{p}_norm.b.weight", f"grad_{p}_norm_total"}
    assert norms[f"grad_{p}_norm.a.weight"] == first and norms[f"grad_{p}_norm_total"] == total


def test_all_modules_are_walked_through_once():
    shared = nn.Linear(1, 1)
    net = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared, nn.ModuleDict({"a": shared, "b": nn.ReLU()})))
    net[1].register_module("none", None)
    net[1][2]["around"] = net
    assert len(all_modules(net)) == 6 and set(all_modules(net)) == set(net.modules())


def test_norms_without_gradients_and_of_a_wrong_kind():
    assert grad_norm(nn.Linear(1, 1), 2) == {}
    with pytest.raises(ValueError, match="norm_type must be > 0, received 0"):
        grad_norm(nn.Linear(1, 1), 0)


def test_shared_parameters_are_found_and_shared_again():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    net[1][0].weight = net[0].weight
    net[1][1].bias = net[0].bias
    groups = find_shared_parameters(net)
    assert groups == [["0.weight", "1.0.weight"], ["0.bias", "1.1.bias"]]
    net[1][0].weight = nn.Parameter(torch.zeros(2, 2))
    assert find_shared_parameters(net) == [["0.bias", "1.1.bias"]]
    assert set_shared_parameters(net, groups) is net
    assert net[1][0].weight is net[0].weight and find_shared_parameters(net) == groups


def test_throughput_needs_totals_that_grow():
    throughput = Throughput(window_size=2, world_size=2, separator="|")
    throughput.update(time=1.0, batches=1, samples=4)
    assert throughput.compute() == {"time": 1.0, "batches": 1, "samples": 4}
    throughput.update(time=3.0, batches=2, samples=8)
    assert throughput.compute() == {
        "time": 3.0, "batches": 2, "samples": 8, "device|batches_per_sec": 0.5, "batches_per_sec": 1.0,
        "device|samples_per_sec": 2.0, "samples_per_sec": 4.0,
    }  # fmt: skip
    for wrong in ({"time": 3.0, "batches": 3, "samples": 9}, {"time": 4.0, "batches": 2, "samples": 9},
                  {"time": 4.0, "batches": 3, "samples": 7}, {"time": 4.0, "batches": 9, "samples": 8},
                  {"time": 4.0, "batches": 3, "samples": 9, "lengths": 8}):  # fmt: skip
        with pytest.raises(ValueError):
            throughput.update(**wrong)
    with pytest.raises(RuntimeError, match="flops must be given at every update or at none"):
        throughput.update(time=4.0, batches=3, samples=9, flops=1.0)
    throughput.reset()
    throughput.update(time=1.0, batches=1, samples=1, flops=1.0)
    with pytest.raises(ValueError, match="window_size must be >= 2"):
        Throughput(window_size=1)


def test_rates_of_items_and_operations_where_they_are_given():
    throughput = Throughput(window_size=2, available_flops=20.0)
    throughput.update(time=1.0, batches=1, samples=4, lengths=40, flops=8.0)
    throughput.update(time=3.0, batches=2, samples=8, lengths=100, flops=10.0)
    assert throughput.compute() == {
        "time": 3.0, "batches": 2, "samples": 8, "lengths": 100, "device/batches_per_sec": 0.5, "device/samples_per_sec": 2.0,
        "device/items_per_sec": 30.0, "device/flops_per_sec": 5.0, "device/mfu": 0.25,
    }  # fmt: skip


def test_a_module_is_moved_and_what_is_one_stays_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    move_module(net, torch.device("meta"))
    assert {parameter.device.type for parameter in net.parameters()} == {"meta"}
    assert net[1].weight is net[0].weight


def test_operations_are_counted():
    layer, batch = nn.Linear(4, 3), torch.randn(2, 4)
    assert measure_flops(layer, lambda: layer(batch)) == 2 * 2 * 4 * 3
    assert measure_flops(layer, lambda: layer(batch), lambda output: output.sum()) == 2 * 2 * 2 * 4 * 3
    assert get_available_flops(torch.device("cpu"), torch.float32) is None
