"""What levin's Fabric adds to what tests/parity/test_fabric.py compares, and its command."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader

import levin
from levin import Fabric
from levin.fabric.command import count_processes, main
from levin.fabric.settings import with_environment
from levin.fabric.throughput import ThroughputMonitor
from levin.fabric.wrappers import FabricModule
from levin.loggers import CSVLogger
from levin.precision import MixedPrecision, Precision
from levin.strategies import SingleDeviceCollective, SingleDeviceStrategy, TorchCollective
from levin.utilities.collections import apply_to_collection
from tests.distributed import world_size


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, x):
        return self.layer(x)

    def generate(self, x):
        return self.layer(x)


def test_the_class_of_a_logger_is_told():
    with pytest.raises(ValueError, match=r"loggers must be an object, not its class.*Write CSVLogger\(\.\.\.\)"):
        Fabric(accelerator="cpu", devices=1, loggers=CSVLogger)


def test_a_copy_of_a_wrapped_module_runs_its_own_weights():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    model = fabric.setup(Net())
    model.mark_forward_method("generate")
    x = torch.ones(1, 2)
    before = model(x)
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.layer.weight)
    nn.init.zeros_(copied.layer.bias)
    assert copied(x).item() == copied.generate(x).item() == 0
    assert torch.equal(model(x), before)


def test_attributes_that_are_set_on_a_wrapped_module_are_those_of_the_module():
    net = Net()
    model = Fabric(accelerator="cpu", devices=1).setup(net)
    model.scale = 2.0
    model.head = nn.Linear(1, 1)
    assert net.scale == model.scale == 2.0
    assert net.head is model.head
    assert sorted(model.state_dict()) == sorted(net.state_dict())
    assert sorted(net.state_dict()) == ["head.bias", "head.weight", "layer.bias", "layer.weight"]


def test_gradients_are_unscaled_once_whoever_clips_them():
    fabric = Fabric(
        accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=1024.0))
    )
    net = Net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    before = net.layer.weight.detach().clone()
    for clips in (True, False):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(1, 2)).sum())
        if clips:
            assert fabric.clip_gradients(model, optimizer, max_norm=100.0).item() == pytest.approx(3**0.5, rel=1e-3)
        optimizer.step()
    assert torch.allclose(net.layer.weight, before - 2, atol=1e-3)


NEEDS_PROCESSES = {
    "setup": lambda fabric: fabric.setup(Net()),
    "setup_module": lambda fabric: fabric.setup_module(Net()),
    "setup_optimizers": lambda fabric: fabric.setup_optimizers(torch.optim.SGD(Net().parameters(), lr=1.0)),
    "setup_dataloaders": lambda fabric: fabric.setup_dataloaders(DataLoader([1, 2])),
    "init_module": lambda fabric: fabric.init_module(),
    "save": lambda fabric: fabric.save("x.ckpt", {}),
    "load": lambda fabric: fabric.load("x.ckpt"),
    "barrier": lambda fabric: fabric.barrier(),
    "broadcast": lambda fabric: fabric.broadcast(1),
    "all_gather": lambda fabric: fabric.all_gather(1),
    "all_reduce": lambda fabric: fabric.all_reduce(1),
}


@pytest.mark.parametrize("call", NEEDS_PROCESSES)
def test_what_needs_the_other_processes_is_refused_before_they_are_there(call):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(RuntimeError, match="processes that are not there yet. Call fabric.launch"):
        NEEDS_PROCESSES[call](fabric)


def test_an_optimizer_and_its_scheduler_can_be_made_before_or_after_setup():
    fabric = Fabric(accelerator="cpu", devices=1)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    earlier = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    _, stepper = fabric.setup(net, optimizer)
    later = torch.optim.lr_scheduler.StepLR(stepper, 1, gamma=0.5)
    stepper.step()
    earlier.step()
    later.step()
    assert stepper.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.25
    stepper.load_state_dict(stepper.state_dict())
    assert stepper.param_groups is optimizer.param_groups
    assert stepper.state is optimizer.state


def test_setup_says_what_it_takes_before_it_changes_anything():
    fabric = Fabric(accelerator="cpu", devices=1)
    net, loader = Net(), DataLoader(range(2))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls = [
        lambda: fabric.setup(optimizer, net),
        lambda: fabric.setup(net, [optimizer]),
        lambda: fabric.setup(net, {"optimizer": optimizer}),
        lambda: fabric.setup(net, optimizer, scheduler),
        lambda: fabric.setup_module([net]),
        lambda: fabric.setup_optimizers([optimizer]),
        lambda: fabric.setup_optimizers(net),
        lambda: fabric.setup_dataloaders([loader]),
        lambda: fabric.setup_dataloaders(loader, loader.dataset),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"received \w+\. Write fabric\.setup"):
            call()
    assert fabric.setup(net, optimizer)[1].optimizer is optimizer


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    net, loader = Net(), DataLoader(range(2))
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    place = fabric.setup_dataloaders(loader)
    path = tmp_path / "run.ckpt"
    for nested in ({"a": model}, [optimizer], (1, {"b": place}), loader):
        with pytest.raises(TypeError, match=r"state\['parts'\] holds a \w+ that cannot"):
            fabric.save(path, {"parts": nested})
    for state in (model, [model], 3):
        with pytest.raises(TypeError, match="state must be a dict"):
            fabric.save(path, state)
    assert not path.exists()
    fabric.save(path, {"model": model, "place": place, "plain": [1, {"a": torch.ones(1)}]})
    with pytest.raises(TypeError, match="state must be a dict, received a FabricModule"):
        fabric.load(path, model)
    for name in ("model", "plain"):
        with pytest.raises(ValueError, match="no place of a loader"):
            fabric.load(path, {name: place})
    with pytest.raises(TypeError, match="load_raw takes a module or an optimizer, received 3"):
        fabric.load_raw(path, 3)
    assert fabric.load(path, {"model": model, "place": place}) == {"plain": [1, {"a": torch.ones(1)}]}


def worker(fabric: Fabric, offset: int) -> int:
    return fabric.all_reduce(torch.tensor(float(fabric.global_rank))).item() + offset


class Counting(Fabric):
    def run(self, offset):
        return worker(self, offset)


def test_functions_and_run_are_launched_in_new_processes():
    assert Fabric(accelerator="cpu", devices=2, strategy="ddp_spawn").launch(worker, 7) == 7.5
    assert Counting(accelerator="cpu", devices=2, strategy="ddp_fork").run(8) == 8.5


class Module(levin.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()


@world_size(2, timeout_s=120)
def test_steps_of_a_module_exchange_gradients_and_cut_weights_are_saved_whole(tmp_path):
    for strategy in ("ddp", "fsdp"):
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        fabric.launch()
        module = Module()
        model = fabric.setup_module(module)
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=1.0))
        loss = model.training_step(torch.ones(1, 2) * (1 + fabric.global_rank), 0)
        module.manual_backward(loss)
        optimizer.step()
        fabric.save(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
        fabric.load(tmp_path / "run.ckpt", {"model": model, "optimizer": optimizer})
        weight = fabric.all_gather(
            module.layer.weight.sum().full_tensor() if strategy == "fsdp" else module.layer.weight.sum()
        )
        torch.manual_seed(0)
        assert torch.allclose(weight, nn.Linear(2, 1).weight.sum() - 3.0)
        assert fabric.received_sigterm is False


@world_size(2, connect=False)
def test_collectives_over_a_group():
    collective = TorchCollective()
    with pytest.raises(RuntimeError, match="create_group"):
        collective.all_reduce(torch.ones(1))
    collective.setup(backend="gloo").create_group()
    rank = collective.rank
    one = torch.ones(1) * rank
    assert collective.all_reduce(one.clone()).item() == 1
    assert collective.all_reduce(one.clone(), op="mean").item() == 0.5
    assert [int(part) for part in collective.all_gather([torch.zeros(1), torch.zeros(1)], one)] == [0, 1]
    assert collective.broadcast(one.clone(), src=1).item() == 1
    assert collective.all_gather_object([None, None], rank) == [0, 1]
    assert collective.broadcast_object_list([rank], src=1) == [1]
    assert (
        collective.scatter(torch.zeros(1), [torch.ones(1), torch.ones(1) * 2] if rank == 0 else []).item() == rank + 1
    )
    gathered = collective.gather(one, [torch.zeros(1), torch.zeros(1)] if rank == 0 else [])
    assert [int(part) for part in gathered] == ([0, 1] if rank == 0 else [])
    if rank == 0:
        collective.send(torch.ones(1) * 5, dst=1)
    else:
        assert collective.recv(torch.zeros(1), src=0).item() == 5
    with pytest.raises(ValueError, match="reduce_op"):
        collective.all_reduce(one, op="foo")
    with pytest.raises(RuntimeError, match="has a group already"):
        collective.create_group()
    collective.barrier()
    collective.monitored_barrier()
    collective.teardown()
    assert not torch.distributed.is_initialized()
    alone = SingleDeviceCollective().create_group()
    assert alone.all_gather([torch.zeros(1)], torch.ones(1)) == [torch.ones(1)]


def test_the_monitor_gives_rates_to_the_loggers():
    class Logger:
        seen: list = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((metrics["samples"], step))

    monitor = ThroughputMonitor(Fabric(accelerator="cpu", devices=1, loggers=Logger()), window_size=2)
    for number in (1, 2):
        monitor.update(time=float(number), batches=number, samples=number * 4)
        metrics = monitor.compute_and_log()
    assert metrics["device/samples_per_sec"] == 4
    assert Logger.seen == [(4, 0), (8, 1)]


SCRIPT = """
import sys
from levin import Fabric
fabric = Fabric()
print(sys.argv[1], fabric.world_size, fabric.global_rank, fabric.strategy.precision.precision, flush=True)
fabric.barrier()
"""


def test_the_command_sets_what_the_script_left_open(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [
        "--accelerator",
        "cpu",
        "--devices",
        "2",
        "--strategy",
        "ddp",
        "--precision",
        "64-true",
        "--main-port",
        "29731",
    ]
    command = [sys.executable, "-m", "levin", "fabric", "run", *words, "script.py", "word"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "word 2 0 64-true" in done.stdout


def test_the_command_counts_processes_and_refuses_what_it_cannot_start(capsys):
    assert [count_processes("cpu", devices) for devices in ("1", "3", "auto")] == [1, 3, 1]
    assert count_processes("cpu", "4", "dp") == 1
    with pytest.raises(ValueError, match="tpu"):
        count_processes("tpu", "1")
    for words in (["run", "--strategy", "ddp_spawn", "x.py"], ["run"], ["run", "--precision", "8", "x.py"]):
        with pytest.raises(SystemExit):
            main(words)
    assert main(["consolidate", "nowhere"]) == 1


@pytest.mark.parametrize("side", ["convert_input", "convert_output"])
def test_a_precision_of_ones_own_may_convert_one_side_alone(side):
    def doubled(self, data):
        return apply_to_collection(data, torch.Tensor, lambda tensor: 2 * tensor)

    kind = type("Doubling", (Precision,), {side: doubled})
    module = Fabric(accelerator="cpu", devices=1, plugins=[kind()]).setup(nn.Linear(1, 1, bias=False))
    assert torch.equal(module(torch.ones(1)), 2 * module.weight[0])


def test_the_command_line_counts_where_the_code_says_nothing_or_the_same(monkeypatch):
    said = {"ACCELERATOR": "cpu", "DEVICES": "2", "NUM_NODES": "3", "PRECISION": "bf16-mixed"}
    for name, value in said.items():
        monkeypatch.setenv(f"LT_{name}", value)
    wanted = {"accelerator": "cpu", "devices": "2", "num_nodes": 3, "precision": "bf16-mixed", "strategy": "ddp"}
    for by_command in ("0", "1"):
        monkeypatch.setenv("LT_CLI_USED", by_command)
        given = {"accelerator": "auto", "devices": None, "num_nodes": 1, "precision": None, "strategy": "ddp"}
        assert with_environment(given) == wanted
        assert with_environment({**given, "accelerator": "cpu", "devices": 2, "num_nodes": 3}) == wanted
    with pytest.raises(ValueError, match=r"num_nodes is 3 on the command line, received Fabric\(num_nodes=2\)"):
        with_environment({"num_nodes": 2})
    monkeypatch.setenv("LT_CLI_USED", "0")
    assert with_environment({"num_nodes": 2}) == {"num_nodes": 3}


class Doubled(FabricModule):
    def forward(self, *args, **kwargs):
        assert self._strategy.precision is not None and self._forward_module is not None
        return 2 * super().forward(*args, **kwargs)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_subclass_puts_something_around_the_forward_of_a_wrapped_module(precision, is_hooked):
    model = Fabric(accelerator="cpu", devices=1, precision=precision).setup(nn.Linear(3, 1))
    x = torch.ones(2, 3, dtype=next(model.parameters()).dtype)
    expected = 2 * model(x)
    object.__setattr__(model, "__class__", Doubled)  # after the fact: Fabric makes these objects itself
    heard = []
    if is_hooked:
        model.register_forward_hook(lambda *args: heard.append(args))
    copied = copy.deepcopy(model)
    assert type(copied) is Doubled
    for run in (model, model.forward, copied):
        assert torch.equal(run(x), expected)
    assert len(heard) == is_hooked


@pytest.mark.parametrize(
    "precisions", [("bf16-mixed", "bf16-mixed"), ("32-true", "bf16-mixed"), ("bf16-mixed", "32-true")]
)
def test_one_backward_pass_goes_through_modules_of_several_fabrics(precisions):
    fabrics = [Fabric(accelerator="cpu", devices=1, precision=precision) for precision in precisions]
    first, second = (fabric.setup(nn.Linear(2, 2)) for fabric in fabrics)
    for fabric in fabrics:
        fabric.backward(second(first(torch.ones(4, 2)).float()).float().sum())
        assert first.weight.grad is not None and second.weight.grad is not None
        with pytest.raises(RuntimeError, match=r"Call fabric\.backward"):
            second(first(torch.ones(4, 2)).float()).float().sum().backward()


def test_parts_are_found_under_the_names_that_packages_read():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    assert fabric._accelerator is fabric.accelerator
    assert fabric._precision is fabric.strategy.precision
    assert fabric._precision.convert_module(nn.Linear(2, 1)).weight.dtype == torch.bfloat16
    alone = Fabric(strategy=SingleDeviceStrategy(fabric.device, fabric.accelerator, None, fabric._precision))
    assert alone.setup(nn.Linear(2, 1)).weight.dtype == torch.bfloat16
