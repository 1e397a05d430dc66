"""Transformer Engine, which needs a GPU of NVIDIA's: what levin asks of it, by a stand-in that writes it down."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from levin.precision import TransformerEnginePrecision

PACKAGE = "transformer_engine"


class TELinear(nn.Linear):
    def __init__(self, in_features: int, out_features: int, bias: bool = True, params_dtype: object = None) -> None:
        super().__init__(in_features, out_features, bias, dtype=params_dtype)


class TELayerNorm(nn.LayerNorm):
    pass


for kind in (TELinear, TELayerNorm):
    kind.__module__ = f"{PACKAGE}.pytorch.module"


@pytest.fixture
def engine(monkeypatch):
    """Return what the stand-in was asked for: the ``contexts`` that were entered."""
    seen = SimpleNamespace(contexts=[])

    @contextmanager
    def fp8_autocast(**settings):
        seen.contexts.append(settings)
        yield

    names = {
        "": {},
        ".pytorch": {"Linear": TELinear, "LayerNorm": TELayerNorm, "fp8_autocast": fp8_autocast},
        ".common": {},
        ".common.recipe": {
            "DelayedScaling": lambda **arguments: SimpleNamespace(**arguments),
            "Format": SimpleNamespace(HYBRID="the format named HYBRID"),
        },
    }
    for name, members in names.items():
        module = ModuleType(PACKAGE + name)
        module.__spec__ = ModuleSpec(PACKAGE + name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, PACKAGE + name, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def autocast(device_type, dtype):
        seen.contexts.append((device_type, dtype))
        return nullcontext()

    monkeypatch.setattr(torch, "autocast", autocast)
    return seen


def plain() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16, eps=0.5)),
        nn.Linear(16, 8, bias=False),
        nn.Linear(8, 8),
        nn.Linear(16, 3),
        nn.LayerNorm((2, 3)),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm(8, bias=False),
    )
    net.register_buffer("phase", torch.tensor([1 + 2j]))
    for tensor in net.parameters():
        nn.init.normal_(tensor)
    return net


def test_layers_with_fitting_dimensions_are_replaced_and_keep_their_weights(engine):
    net, reference = plain(), plain()
    net[0].requires_grad_(False)
    precision = TransformerEnginePrecision(weights_dtype=torch.bfloat16)
    assert precision.convert_module(net) is net
    assert [type(part) for part in (*net[0], *net[1:])] == [
        TELinear, TELayerNorm, TELinear, nn.Linear, nn.Linear, nn.LayerNorm, nn.LayerNorm, nn.LayerNorm,
    ]  # fmt: skip
    assert net[0][1].eps == 0.5 and net.phase.item() == 1 + 2j
    found, expected = dict(net.named_parameters()), dict(reference.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name].bfloat16()) and tensor.dtype == torch.bfloat16
        assert tensor.requires_grad == (not name.startswith("0."))


@pytest.mark.parametrize(("replaces", "has_own", "is_replaced"), [
    (None, False, True), (True, False, True), (False, False, False), (None, True, False), (True, True, False),
])  # fmt: skip
def test_layers_are_replaced_unless_there_are_some_already_or_the_user_says_no(engine, replaces, has_own, is_replaced):
    net = nn.Sequential(nn.Linear(16, 16), TELinear(16, 16) if has_own else nn.Identity())
    precision = TransformerEnginePrecision(weights_dtype=torch.float16, replace_layers=replaces)
    precision.convert_module(net)
    assert (type(net[0]) is TELinear) == is_replaced
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float16}


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.bfloat16, "transformer-engine"), (torch.float16, "transformer-engine-float16"),
])  # fmt: skip
def test_steps_run_in_the_recipe_and_the_other_format(engine, dtype, name):
    recipe = {"margin": 3, "fp8_format": "HYBRID"}
    precision = TransformerEnginePrecision(weights_dtype=dtype, recipe=recipe, fallback_compute_dtype=torch.float32)
    assert precision.precision == name
    with precision.forward_context():
        assert torch.zeros(1).dtype == dtype
    assert torch.zeros(1).dtype == torch.float32
    other, eight_bits = engine.contexts
    assert other == ("cuda", torch.float32)
    assert eight_bits == {
        "enabled": True,
        "fp8_recipe": SimpleNamespace(margin=3, fp8_format="the format named HYBRID"),
    }


def test_a_recipe_is_taken_as_it_is_and_made_where_there_is_none(engine):
    mine = object()
    assert TransformerEnginePrecision(weights_dtype=torch.bfloat16, recipe=mine).recipe is mine
    default = TransformerEnginePrecision(weights_dtype=torch.bfloat16)
    assert default.recipe == SimpleNamespace()
    with default.forward_context():
        pass
    assert engine.contexts[0] == ("cuda", torch.bfloat16)
