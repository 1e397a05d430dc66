"""The order in which a module is prepared, and what comes of all of it together, on four ranks."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import nn

from levin.strategies import FSDPStrategy, ModelParallelStrategy, layer_plan, model_parallel, order, sharding
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.test_fsdp import alone
from tests.strategies.test_pipeline import Deep, in_rank, own, pipelines

pytestmark = cuts_on_cpu
PLAN = {"net.blocks.*.up": "column", "net.blocks.*.down": "row"}
# What does each of the steps, where the code finds it.
STEPS = {
    "layers": (layer_plan, "parallelize_module"),
    "stages": (model_parallel, "leave_out"),
    "sequences": (model_parallel, "share_sequences"),
    "recomputation": (sharding, "recompute"),
    "weights": (sharding, "fully_shard"),
    "compilation": (torch, "compile"),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return x + self.down(torch.tanh(self.up(self.norm(attended.transpose(1, 2).flatten(2)))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x[:, :, None])
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean(1)


class Attending(Deep):
    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        torch.manual_seed(3)
        self.net = Net()


def done(strategy, batch_size: int = 8, **settings) -> tuple[Attending, list[str]]:
    """Train a module on this rank, and return what was done to it, each step once."""
    found: list[str] = []
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of torch.compile
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    with ExitStack() as stack:
        for name, (owner, attribute) in STEPS.items():
            function = getattr(owner, attribute)

            def noted(*args, function=function, name=name, **kwargs):
                found.extend([name] if found[-1:] != [name] else [])
                return function(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, attribute, noted))
        module = Attending(batch_size)
        in_rank(strategy, 4, max_epochs=1, **settings).fit(module)
    return module, found


def test_each_step_is_done_once_with_what_the_step_before_left(monkeypatch):
    module, stages, calls = nn.Module(), [nn.Module(), nn.Module()], []
    monkeypatch.setattr(order, "apply_sharding", lambda part, plan: calls.append((part, plan)))

    def step(name, result=None):
        return lambda given: calls.append((given, name)) or result

    plan = sharding.ShardingPlan()
    order.prepare(module, plan, step("layers"), step("stages", stages), step("sequences"))
    steps = [(module, name) for name in ("layers", "stages", "sequences")]
    assert calls == [*steps, (stages[0], plan), (stages[1], plan)]
    calls.clear()
    order.prepare(module, plan)
    assert calls == [(module, plan)]


SLOW, COMPILED = pytest.mark.slow, {"compile": {"backend": "eager"}}


@pytest.mark.parametrize(
    ("sizes", "arguments", "settings", "expected"),
    [
        ((2, 2), {"plan": PLAN, "activation_checkpointing": "full"}, COMPILED, "compilation layers recomputation weights"),
        pytest.param(
            (2, 1), {"context_parallel_size": 2, "activation_checkpointing": 0.5}, {}, "sequences recomputation weights",
            marks=SLOW,
        ),
        pytest.param(
            (1, 2), {"context_parallel_size": 2, "plan": PLAN, "activation_checkpointing": "full"}, {},
            "layers sequences recomputation weights", marks=SLOW,
        ),
        pytest.param(
            (2, 1), {"pipeline_parallel_size": 2}, COMPILED, "compilation stages weights", marks=[SLOW, pipelines]
        ),
        pytest.param(
            (1, 2), {"pipeline_parallel_size": 2, "plan": PLAN}, COMPILED, "compilation layers stages",
            marks=[SLOW, pipelines],
        ),
        pytest.param(None, {"activation_checkpointing": "full"}, COMPILED, "compilation recomputation weights", marks=SLOW),
    ],
    ids=["tp, fsdp", "cp, fsdp", "tp, cp", "pp, fsdp", "tp, pp", "fsdp"],
)  # fmt: skip
@world_size(4, connect=False, timeout_s=240)
def test_a_module_is_prepared_in_one_order_and_trains_as_on_one_device(sizes, arguments, settings, expected):
    strategy = FSDPStrategy(**arguments) if sizes is None else ModelParallelStrategy(*sizes, **arguments)
    module, steps = done(strategy, 2 if sizes is None else 8 // sizes[0], **settings)
    assert steps == expected.split(), steps
    reference = Attending()
    alone(max_epochs=1).fit(reference)
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses), rtol=1e-4, atol=1e-5)
    found, whole = (
        {name.replace("_checkpoint_wrapped_module.", ""): w for name, w in own(m).items()} for m in (module, reference)
    )
    torch.testing.assert_close(found, {name: whole[name] for name in found}, rtol=1e-4, atol=1e-5)
