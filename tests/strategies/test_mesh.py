"""The short form of a mesh."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from levin import Fabric, Trainer
from levin.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from levin.strategies.mesh import parse_mesh, strategy_of_mesh
from tests.distributed import cuts_on_cpu, world_size


def test_degrees_choose_the_strategy():
    assert type(strategy_of_mesh("mesh:ddp=4")) is DDPStrategy
    assert parse_mesh("mesh:dp=1, tp=2") == {"dp": 1, "tp": 2}
    assert type(strategy_of_mesh("mesh:dp=4")) is FSDPStrategy
    assert (
        strategy_of_mesh("mesh:ddp=1,dp=4")._given_mesh is None and type(strategy_of_mesh("mesh:dp=1")) is DDPStrategy
    )
    assert strategy_of_mesh("mesh: ddp=2, fsdp=3")._given_mesh == (2, 3)
    tensor = strategy_of_mesh("mesh:tp=2,dp=3")
    assert type(tensor) is ModelParallelStrategy
    assert (tensor.data_parallel_size, tensor.tensor_parallel_size, tensor.copies) == (3, 2, 1)
    piped = strategy_of_mesh("mesh:pp=2")
    assert (piped.pipeline_plan.size, piped.data_parallel_size, piped.tensor_parallel_size) == (2, 1, 1)
    assert strategy_of_mesh("mesh:cp=2,dp=2").context_parallel_size == 2
    copied = strategy_of_mesh("mesh:ddp=2,dp=3,tp=2")
    assert (copied.data_parallel_size, copied.tensor_parallel_size, copied.copies) == (6, 2, 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mesh:", "received ''"), ("mesh:dp", "received 'dp'"), ("mesh:dp=0", "received 'dp=0'"),
        ("mesh:dp=2,fsdp=2", "received 'fsdp=2'"), ("mesh:dp=-1", "received 'dp=-1'"), ("mesh:zz=2", "Degrees are ddp"),
        ("mesh:dp=2;tp=2", "received 'dp=2;tp=2'"), ("mesh:cp=2", "product is 3"),
        ("mesh:dp=2,pp=2", "product is 3"), ("mesh:ddp=2,tp=2", "product is 3"),
        ("mesh:dp=2", "devices=3 and num_nodes=1, which make 3. Use devices=2"),
        ("mesh:ddp=4", "which make 3"), ("mesh:dp=2,tp=2", "product is 3"), ("mesh:ddp=2,dp=2", "product is 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_before_a_process_starts(text, words):
    with pytest.raises(ValueError) as caught:
        Trainer(accelerator="cpu", devices=3, strategy=text)
    assert words in str(caught.value)


def test_copies_fit_the_data_parallel_processes():
    with pytest.raises(ValueError, match=r"copies=3 must divide data_parallel_size=2.* Use copies=2"):
        Trainer(accelerator="cpu", devices=4, strategy=ModelParallelStrategy(2, 2, copies=3))
    with pytest.raises(ValueError, match=r"copies must be an int >= 1, received 0"):
        ModelParallelStrategy(2, 2, copies=0)


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@cuts_on_cpu
@world_size(2, timeout_s=120)
def test_processes_are_laid_out_so():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="mesh:dp=2")
    fabric.launch()
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 4) * (1 + fabric.global_rank)).mean())
    optimizer.step()
    alone = make_net()
    ((alone(torch.ones(2, 4)).mean() + alone(torch.ones(2, 4) * 2).mean()) / 2).backward()
    torch.optim.SGD(alone.parameters(), lr=0.1).step()
    for cut, whole in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(cut.full_tensor(), whole, atol=1e-6)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="mesh:tp=2")
    fabric.launch()
    with pytest.raises(ValueError, match="no layer of Sequential is cut"):
        fabric.setup(make_net())
