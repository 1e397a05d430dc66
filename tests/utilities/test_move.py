"""Batches, modules and optimizers on their way to a device."""

from __future__ import annotations

import torch
from torch import nn

from levin.utilities.move import move_data_to_device, move_module, move_optimizer

META, CPU = torch.device("meta"), torch.device("cpu")


class Moves:
    """Has a `to` that remembers how it was called."""

    def __init__(self, result=None):
        self.calls, self.result = [], result

    def to(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return self.result


class Seen(torch.Tensor):
    """A tensor that remembers how it was moved."""

    def to(self, *args, **kwargs):
        self.calls = [*getattr(self, "calls", []), (args, kwargs)]
        return super().to(*args, **kwargs)


def test_what_is_there_already_is_not_copied():
    tensor = torch.zeros(2)
    for batch in (tensor, [tensor, tensor], (tensor,), []):
        assert move_data_to_device(batch, "cpu") is batch
    mixed = [tensor, "name", {"a": tensor}]
    moved = move_data_to_device(mixed, CPU)
    assert moved is not mixed and moved[0] is tensor and moved[1] == "name" and moved[2]["a"] is tensor
    far = torch.zeros(2, device="meta")
    assert move_data_to_device([tensor, far], META)[0].is_meta


def test_tensors_travel_without_waiting_except_to_the_cpu():
    seen = torch.zeros(2).as_subclass(Seen)
    move_data_to_device({"a": [seen]}, "meta")
    move_data_to_device({"a": [seen]}, CPU)
    assert seen.calls == [((META,), {"non_blocking": True}), ((CPU,), {"non_blocking": False})]


def test_other_objects_are_moved_by_themselves_and_may_move_in_place():
    moves, makes = Moves(), Moves("new")
    assert move_data_to_device([moves, makes, Moves], META) == [moves, "new", Moves]
    assert moves.calls == makes.calls == [((META,), {})]
    assert move_data_to_device(moves, CPU) is moves


def test_tensors_are_moved_by_the_function_that_is_given():
    seen = []
    tensor, moves = torch.zeros(1), Moves("new")
    moved = move_data_to_device([tensor, moves, 1], META, lambda leaf, device: seen.append((leaf, device)) or "moved")
    assert moved == ["moved", "new", 1] and seen == [(tensor, META)]


def test_parameters_that_are_one_stay_one(monkeypatch):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    copied = []

    def apart(self, device):
        copied.append(device)
        self[1].weight = nn.Parameter(self[0].weight.clone())

    monkeypatch.setattr(nn.Sequential, "to", apart)
    move_module(net, META)
    assert copied == [META] and net[1].weight is net[0].weight and net[2].weight is not net[0].weight
    monkeypatch.undo()
    move_module(net, META)
    assert net[1].weight is net[0].weight and net[2].weight.is_meta


def test_the_state_of_an_optimizer_is_moved_in_place():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    states = optimizer.state
    move_optimizer(optimizer, META)
    assert optimizer.state is states and states.keys() == set(net.parameters())
    assert all(value.is_meta for state in states.values() for value in state.values())
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in states.values())
