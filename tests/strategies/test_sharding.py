"""Layers made without memory get their weights where they are cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from levin import Trainer
from levin.strategies.sharding import WeightMaker
from levin.strategies.stage_state import own_numbers
from levin.strategies.state_of import numbers_in


@pytest.mark.parametrize("is_named", [False, True], ids=["as it is", "with a public name for its reset"])
def test_torchs_attention_has_the_first_values_that_torch_gives_it(is_named, monkeypatch):
    monkeypatch.delattr(nn.MultiheadAttention, "reset_parameters", raising=False)
    if is_named:
        monkeypatch.setattr(
            nn.MultiheadAttention, "reset_parameters", nn.MultiheadAttention._reset_parameters, raising=False
        )
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(8, 2, 16)
    make_weights = WeightMaker(layer, torch.device("cpu"))
    for part in layer.modules():
        make_weights(part)
    assert not any(parameter.is_meta for parameter in layer.parameters())
    attention = layer.self_attn
    assert attention.out_proj.bias.count_nonzero() == attention.in_proj_bias.count_nonzero() == 0
    assert 0 < attention.in_proj_weight.abs().max() <= (6 / 32) ** 0.5


def test_a_module_with_nothing_of_its_own_needs_no_reset():
    with torch.device("meta"):
        module = nn.Sequential(nn.BatchNorm1d(2, affine=False))
    make_weights = WeightMaker(module, torch.device("cpu"))
    for part in module.modules():
        make_weights(part)
    assert module[0].running_var.tolist() == [1.0, 1.0]


class Filled(nn.Module):
    def __init__(self, value: float, *parts: nn.Module) -> None:
        super().__init__()
        self.value = value
        self.weight = nn.Parameter(torch.empty(2))
        self.parts = nn.ModuleList(parts)

    def reset_parameters(self):
        nn.init.constant_(self.weight, self.value)


def test_a_layer_inside_of_another_is_reset_too():
    with torch.device("meta"):
        module = Filled(1.0, Filled(2.0), Filled(3.0))
    module.parts[1].weight = module.parts[0].weight
    make_weights = WeightMaker(module, torch.device("cpu"))
    for part in module.modules():
        make_weights(part)
    assert [part.weight.tolist() for part in (module, *module.parts)] == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
    assert module.parts[0].weight is module.parts[1].weight


@pytest.mark.parametrize("strategy", ["fsdp", "mesh:dp=2", "mesh:cp=2"])
def test_fsdp_on_the_cpu_is_refused_before_a_process_starts_where_torch_cannot(monkeypatch, strategy):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    with pytest.raises(
        ValueError, match=r"needs a torch whose torch\.cpu\.Stream has `record_event`, received torch 2"
    ):
        Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)


def test_a_state_of_another_number_of_parameters_is_refused():
    state = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1, 2]}]}
    assert numbers_in(state, 3) == [0, 1, 2]
    for ask in (lambda: numbers_in(state, 2), lambda: own_numbers(state, own=[["a"]], joined=[["a", "b"]])):
        with pytest.raises(ValueError, match="holds the state of an optimizer of 3 parameters, received one of 2"):
            ask()
