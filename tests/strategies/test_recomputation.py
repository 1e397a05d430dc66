"""Activations that are computed again in backward: which operations run twice."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from levin.strategies import ModelParallelStrategy
from levin.strategies.recomputation import recompute
from levin.strategies.sharding import recomputation_of
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.test_context import Attention, Language, Layer, in_rank, shared
from tests.strategies.test_fsdp import Deep, Net, alone, whole
from tests.strategies.test_model_parallel import PLAN, Wide


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def run(value, make):
    torch.manual_seed(0)
    net = make()
    recomputation = recomputation_of(value, net)
    if recomputation is not None:
        recompute(net, recomputation)
    inputs = torch.ones(2, 8, 16) if make is transformer else torch.ones(2, 4)
    with Operations() as operations:
        net(inputs).sum().backward()
    return operations.names, [parameter.grad for parameter in net.parameters()]


def transformer() -> nn.Sequential:
    return nn.Sequential(Layer(), Layer())


@pytest.mark.parametrize(
    ("make", "product", "num", "other"),
    [
        (lambda: Net(depth=3), "addmm.default", 3, "tanh.default"),
        (transformer, "_scaled_dot_product_flash_attention_for_cpu.default", 2, "relu.default"),
    ],
    ids=["products", "attention"],
)  # fmt: skip
def test_words_say_what_is_computed_again(make, product, num, other):
    kept, expected = run(None, make)
    for value, is_product, is_other in (
        ("full", True, True),
        ("selective", False, True),
        (0.0, True, True),
        (1.0, False, False),
    ):
        names, gradients = run(value, make)
        assert names.count(product) == kept.count(product) + num * is_product
        assert names.count(other) == kept.count(other) + num * is_other
        torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["layers", *(pytest.param(kind, marks=cuts_on_cpu) for kind in ("data", "sequence"))])
@world_size(2, connect=False)
def test_blocks_that_processes_share_are_computed_again(kind):
    make, one, strategy = {
        "layers": (Wide, 8, ModelParallelStrategy(1, 2, plan=PLAN, activation_checkpointing="selective")),
        "data": (Deep, 8, ModelParallelStrategy(2, 1, activation_checkpointing="full")),
        "sequence": (partial(Language, Attention), 4, shared(activation_checkpointing=0.5)),
    }[kind]
    module, reference = make(one // strategy.data_parallel_size), make(one)
    in_rank(strategy).fit(module)
    assert any("CheckpointWrapper" in type(part).__name__ for part in module.modules())
    alone().fit(reference)
    found, expected = (list(whole(part).values()) for part in (module, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 2, "activation_checkpointing": "selective"}, "cannot be used with context_parallel_size > 1"),
        ({"context": 1, "pipeline_parallel_size": 2, "activation_checkpointing": 0.5}, "does not go with pipeline_parallel_size"),
        ({"activation_checkpointing": "some"}, "received 'some'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        shared(**arguments)
