"""Several processes under Fabric: cut weights, batches of unequal size, and processes that hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from levin import Fabric
from levin.checkpoint import TorchCheckpointIO
from levin.compat._fabric_strategies import ModelParallelStrategy
from tests.distributed import world_size


def make_net(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in model.parameters()]


def batches() -> list[torch.Tensor]:
    return list(torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(1)))


def train_alone() -> list[torch.Tensor]:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for batch in batches():
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        optimizer.step()
    return whole(net)


@world_size(2, timeout_s=120)
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_cpu_offload"])
def test_a_module_and_its_optimizer_are_set_up_together_when_weights_are_cut(strategy, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    model, optimizer = fabric.setup(net, optimizer)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    path = tmp_path / "run"
    for batch in batches():
        optimizer.zero_grad()
        fabric.backward(model(batch.chunk(2)[fabric.global_rank]).square().mean())
        optimizer.step()
        state["step"] += 1
        if state["step"] == 3:
            fabric.save(path, state)
    found = whole(model)
    assert all(torch.allclose(ours, bare, atol=1e-5) for ours, bare in zip(found, train_alone(), strict=True))
    assert path.is_dir()  # every process wrote its part
    fabric.load(path, state)
    assert state["step"] == 3
    for batch in batches()[3:]:
        optimizer.zero_grad()
        fabric.backward(model(batch.chunk(2)[fabric.global_rank]).square().mean())
        optimizer.step()
    assert all(torch.equal(ours, before) for ours, before in zip(whole(model), found, strict=True))


@world_size(2, timeout_s=120)
def test_an_optimizer_that_has_stepped_is_refused_when_its_weights_are_cut():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="Call setup before the first step"):
        fabric.setup(net, optimizer)


@world_size(2, timeout_s=120)
def test_two_networks_with_cut_weights_train_side_by_side(tmp_path):
    losses = {}
    for strategy in ("ddp", "fsdp"):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        generator, critic = make_net(), make_net(1)
        generator, of_generator = fabric.setup(generator, torch.optim.SGD(generator.parameters(), lr=0.1))
        critic, of_critic = fabric.setup(critic, torch.optim.SGD(critic.parameters(), lr=0.1))
        seen = losses[strategy] = []
        for batch in batches():
            noise = batch[fabric.global_rank :: 2]
            of_critic.zero_grad()
            loss = critic(generator(noise).detach()).mean() - critic(noise[:, :1]).mean()
            fabric.backward(loss)
            of_critic.step()
            of_generator.zero_grad()
            of_critic.zero_grad()
            fabric.backward(-critic(generator(noise)).mean())
            fabric.clip_gradients(generator, of_generator, max_norm=0.1)
            of_generator.step()
            seen.append(float(fabric.all_reduce(loss.detach())))
        # One file for rank 0 to write is what another CheckpointIO means.
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, plugins=TorchCheckpointIO())
        fabric.launch()
        fabric.save(tmp_path / strategy, {"generator": generator, "critic": critic})
    assert losses["ddp"] == pytest.approx(losses["fsdp"], abs=1e-6)
    one, other = (torch.load(tmp_path / strategy, weights_only=True) for strategy in ("ddp", "fsdp"))
    for name in one:
        assert all(torch.allclose(value, other[name][key], atol=1e-6) for key, value in one[name].items())


def train_with_weights(fabric: Fabric, sizes: list[int]) -> list[torch.Tensor]:
    """Train one step on batches of these sizes, cut out of the same samples, and return the weights."""
    net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    samples = torch.cat(batches()).split(sizes)
    own = samples[fabric.global_rank :: fabric.world_size]
    for number, batch in enumerate(own):
        with fabric.no_backward_sync(model, enabled=number + 1 < len(own)):
            fabric.backward(model(batch).square().sum())
    fabric.average_gradients(optimizer, weight=sum(map(len, own)))
    fabric.clip_gradients(model, optimizer, max_norm=0.5)
    optimizer.step()
    return whole(model)


def train_at_once() -> list[torch.Tensor]:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.cat(batches())).square().mean().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    optimizer.step()
    return whole(net)


def test_batches_of_unequal_size_come_to_the_average_over_all_samples():
    fabric = Fabric(accelerator="cpu", devices=1)
    found = train_with_weights(fabric, [1, 20, 3])
    assert all(torch.allclose(ours, bare, atol=1e-6) for ours, bare in zip(found, train_at_once(), strict=True))
    with pytest.raises(ValueError, match="received 0"):
        fabric.average_gradients(torch.optim.SGD(make_net().parameters()), weight=0)


@world_size(2, timeout_s=120)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_batches_of_unequal_size_on_two_processes(strategy):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    found = train_with_weights(fabric, [1, 14, 6, 3])
    assert all(torch.allclose(ours, bare, atol=1e-6) for ours, bare in zip(found, train_at_once(), strict=True))


def cut(module: nn.Module, mesh):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(module, mesh["tensor_parallel"], plan)


@world_size(2, timeout_s=120)
def test_a_function_of_the_users_cuts_layers(tmp_path):
    strategy = ModelParallelStrategy(parallelize_fn=cut)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    with fabric.init_module(empty_init=False):
        net = make_net()
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.1))
    assert net[0].weight.to_local().shape == (4, 4)
    for batch in batches():
        optimizer.zero_grad()
        fabric.backward(model(batch).square().mean())
        optimizer.step()
    assert all(torch.allclose(ours, bare, atol=1e-5) for ours, bare in zip(whole(model), train_alone(), strict=True))
    fabric.save(tmp_path / "run", {"net": model, "optimizer": optimizer, "step": 6})
    # What is not asked for as an object comes whole.
    assert torch.equal(fabric.load(tmp_path / "run")["net"]["0.weight"], net[0].weight.full_tensor())
    with pytest.raises(TypeError, match="return module"):
        strategy._parallelize_fn = lambda module, mesh: None
        fabric.setup(make_net())


HANGING = """
import os, signal, sys, time
from datetime import timedelta
import torch
from torch.utils.data import DataLoader
from levin import Fabric
from levin.ranks import hang_watchdog
from levin.strategies import DDPStrategy

hang_watchdog.GRACE_S, hang_watchdog.DEADLOCK_S = 1.0, 2.0


def train(fabric):
    net = torch.nn.Linear(1, 1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    for epoch in range(2):
        for number, x in enumerate(fabric_loader(fabric)):
            if (epoch, number, fabric.global_rank) == (0, 3, 1):
                print("fault", flush=True)
                time.sleep(2)  # so that it has said where it is
                if sys.argv[1] == "leaves":
                    return
                if sys.argv[1] == "raises":
                    raise KeyError("broken in the loop")
                os.kill(os.getpid(), signal.SIGKILL if sys.argv[1] == "killed" else signal.SIGSTOP)
            optimizer.zero_grad()
            fabric.backward(model(x).sum())
            optimizer.step()


def fabric_loader(fabric):
    return fabric.setup_dataloaders(DataLoader(torch.ones(20, 1)))


if __name__ == "__main__":
    method = sys.argv[2]
    strategy = DDPStrategy(start_method=method, timeout=timedelta(seconds=60), step_timeout=timedelta(seconds=float(sys.argv[3])))
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    if method == "fork":
        fabric.launch(train)
    else:
        fabric.launch()
        train(fabric)
"""


@pytest.mark.parametrize(
    ("fault", "words", "method"),
    [
        pytest.param("raises", "broken in the loop", "popen", marks=pytest.mark.slow),
        pytest.param("leaves", "left the run, the others wait", "popen", marks=pytest.mark.slow),
        ("stopped", "batch 4 of epoch 0", "popen"),
        pytest.param("stopped", "batch 4 of epoch 0", "fork", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_processes_that_wait_for_one_that_is_gone_say_which_and_where(fault, words, method, tmp_path):
    (tmp_path / "script.py").write_text(HANGING)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # What has left is told by the comparison, long before the limit of a step.
    command = [sys.executable, str(tmp_path / "script.py"), fault, method, "50" if fault == "leaves" else "3"]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    started = time.monotonic()
    try:
        assert process.wait(timeout=90) != 0
    finally:
        with suppress(ProcessLookupError):  # the one that was stopped would stay
            os.killpg(process.pid, signal.SIGKILL)
        output = log.read_text()
    assert "rank 1" in output.lower(), output
    assert words in output, output
    assert time.monotonic() - started < 60, output


def test_dp_is_answered_in_words():
    for accelerator in ("cpu", "auto") if not torch.cuda.is_available() else ("cpu",):
        with pytest.warns(UserWarning, match="Using 'ddp'"):
            fabric = Fabric(accelerator=accelerator, devices=1, strategy="dp")
        assert type(fabric.strategy).__name__ == "DDPStrategy"


def test_dp_on_gpus_is_refused_with_the_way_out():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with pytest.raises(ValueError, match="strategy='ddp'"):
        Fabric(accelerator="gpu", devices=1, strategy="dp")
