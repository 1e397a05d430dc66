"""XLA under the Trainer and Fabric, with processors that stand in for TPUs: what comes out is what the CPU gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import levin
from levin import Fabric, Trainer, seed_everything
from levin.accelerators import XLAAccelerator
from levin.callbacks import ModelCheckpoint
from levin.precision import XLAPrecision
from levin.strategies import SingleDeviceXLAStrategy, XLAFSDPStrategy, XLAStrategy
from tests.distributed import world_size
from tests.strategies.small import QUIET, dataset
from tests.strategies.test_fsdp import Block, Deep, alone

torch_xla = pytest.importorskip("torch_xla", reason="torch_xla is not installed; `make test-xla` installs it")
pytestmark = [pytest.mark.xla, pytest.mark.timeout(500)]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "CPU")


def trainer(accelerator="tpu", **settings) -> Trainer:
    defaults = {"devices": 1, "max_epochs": 2, "enable_checkpointing": False}
    return Trainer(**{**QUIET, **defaults, "accelerator": accelerator, **settings})


def weights(module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}


def assert_same(module: Deep, reference: Deep) -> None:
    torch.testing.assert_close(module.losses, reference.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(module), weights(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
)
def test_one_device_trains_like_the_cpu(settings):
    module, reference = Deep(), Deep()
    xla, cpu = trainer(**settings), alone(**settings)
    xla.fit(module)
    cpu.fit(reference)
    assert all(parameter.device.type == "cpu" for parameter in module.parameters())
    assert_same(module, reference)
    torch.testing.assert_close(dict(xla.callback_metrics), dict(cpu.callback_metrics), rtol=1e-4, atol=1e-5)


class Tied(Deep):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__(optimizer=torch.optim.SGD)
        self.net.blocks[1].layer.weight = self.net.blocks[0].layer.weight


def assert_one_weight(**settings) -> None:
    module, reference = Tied(), Tied()
    trainer(**settings).fit(module)
    alone().fit(reference)
    assert len(list(module.parameters())) == len(list(reference.parameters()))
    assert module.net.blocks[1].layer.weight is module.net.blocks[0].layer.weight
    assert_same(module, reference)


def test_layers_with_one_weight_keep_it():
    assert_one_weight()


@world_size(1, connect=False, timeout_s=400)
def test_layers_with_one_weight_keep_it_when_it_is_cut():
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    assert_one_weight(strategy="xla_fsdp", devices=4)


def test_evaluation_and_prediction():
    module = Deep()
    xla, cpu = trainer(), trainer("cpu")
    assert isinstance(xla.strategy, SingleDeviceXLAStrategy)
    for verb in (Trainer.validate, Trainer.test):
        module.test_step, module.test_dataloader = module.validation_step, module.val_dataloader
        found, expected = verb(xla, module, verbose=False), verb(cpu, module, verbose=False)
        assert found[0].keys() == expected[0].keys()
        torch.testing.assert_close(list(found[0].values()), list(expected[0].values()))
    loader = module.val_dataloader()
    found = torch.cat(xla.predict(module, loader))
    torch.testing.assert_close(found, torch.cat(cpu.predict(module, loader)))


def test_a_step_is_one_program_that_is_compiled_once():
    from torch_xla.debug import metrics

    def programs(max_epochs: int) -> tuple[int, int]:
        module = Silent()
        before = _counted(metrics)
        trainer(max_epochs=max_epochs, limit_val_batches=0).fit(module)
        return tuple(now - then for now, then in zip(_counted(metrics), before, strict=True))

    programs(2)
    compiled, run = programs(7)
    assert compiled == 0
    # 28 steps; the rest are single values that are read, and weights that are moved.
    assert 28 <= run <= 40


def _counted(metrics) -> tuple[int, int]:
    counts = [metrics.metric_data(name) for name in ("CompileTime", "ExecuteTime")]
    return tuple(0 if count is None else count[0] for count in counts)


class Silent(Deep):
    """Reads nothing of a step."""

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass


class Random(Silent):
    """Draws random numbers on the device, in a shuffled order of the data."""

    def __init__(self, saves_at: str | None = None) -> None:
        super().__init__(2)
        self.saves_at = saves_at

    def training_step(self, batch, batch_idx):
        return self.net(torch.nn.functional.dropout(batch[0], 0.5)).pow(2).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.saves_at is not None and self.trainer.current_epoch == 1 and batch_idx == 3:
            self.trainer.save_checkpoint(self.saves_at)

    def train_dataloader(self):
        return DataLoader(dataset(), batch_size=2, shuffle=True)


# The batch after which is saved is the first of a window of three.
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_not_ended(tmp_path):
    path = tmp_path / "middle.ckpt"
    found = []
    for saves_at, ckpt_path in ((None, None), (path, None), (None, path)):
        seed_everything(3)
        module = Random(saves_at)
        trainer(max_epochs=3, accumulate_grad_batches=3).fit(module, ckpt_path=ckpt_path)
        found.append(weights(module))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.filterwarnings("ignore:The checkpoint holds states of callbacks")
def test_a_checkpoint_holds_nothing_of_the_device(tmp_path):
    saves = ModelCheckpoint(dirpath=tmp_path, filename="last", monitor="val_loss", save_last=True)
    module = Deep()
    trainer(enable_checkpointing=True, callbacks=[saves]).fit(module)
    code = (
        f"import sys, torch; sys.modules['torch_xla'] = None; c = torch.load({str(saves.best_model_path)!r}, weights_only=False)\n"
        "devices = []\n"
        "def walk(x):\n"
        "    if isinstance(x, torch.Tensor): devices.append(x.device.type)\n"
        "    for y in x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else (): walk(y)\n"
        "walk(c); assert len(devices) > 20 and set(devices) == {'cpu'}, devices\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    resumed = Deep()
    trainer("cpu", max_epochs=2).fit(resumed, ckpt_path=saves.best_model_path)
    torch.testing.assert_close(weights(resumed), weights(module))


@pytest.mark.parametrize("precision, dtype", [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16)])
def test_sixteen_bits(precision, dtype):
    seen = []

    class Watched(Silent):
        def training_step(self, batch, batch_idx):
            seen.append((self.net.embed(batch[0]).dtype, self.net.embed.weight.dtype))
            return super().training_step(batch, batch_idx)

    module = Watched()
    trainer(precision=precision).fit(module)
    assert set(seen) == {(torch.bfloat16, dtype)}
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert XLAPrecision("bf16-true").precision == "bf16-true"


def test_true_sixteen_bits_are_those_of_the_name():
    kinds = [XLAPrecision(name).convert_module(torch.nn.Linear(1, 1)).weight.dtype for name in ("bf16-true", "16-true")]
    assert kinds == [torch.bfloat16, torch.float16]


def test_one_device_tells_what_it_compiles_where_it_is_debugged(monkeypatch):
    monkeypatch.setenv("PT_XLA_DEBUG_LEVEL", "0")
    trainer(strategy=SingleDeviceXLAStrategy(debug=True)).validate(Deep(), verbose=False)
    assert os.environ["PT_XLA_DEBUG_LEVEL"] == "2"


def test_gradients_of_connected_devices_go_from_one_to_the_other(monkeypatch):
    import torch_xla.core.xla_model as xm
    from torch_xla import runtime

    asked = []
    monkeypatch.setattr(XLAStrategy, "world_size", 4)
    monkeypatch.setattr(runtime, "world_size", lambda: 4)
    monkeypatch.setattr(xm, "all_reduce", lambda *args, **kwargs: asked.append((*args, kwargs)))
    layer, unused = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer = torch.optim.SGD([*layer.parameters(), *unused.parameters()], lr=0.1)
    XLAStrategy()._average_gradients(optimizer)
    ((operation, gradients, settings),) = asked
    assert operation == xm.REDUCE_SUM and settings == {"scale": 0.25}
    assert [id(gradient) for gradient in gradients] == [id(parameter.grad) for parameter in layer.parameters()]


def test_memory_of_a_tpu_is_told_in_megabytes(monkeypatch):
    import torch_xla.core.xla_model as xm

    assert XLAAccelerator().get_device_stats(torch.device("xla", 0)) == {}
    monkeypatch.setenv("PJRT_DEVICE", "TPU")
    memory = {"bytes_limit": 8 * 2**20, "bytes_used": 3 * 2**20, "peak_bytes_used": 4 * 2**20}
    monkeypatch.setattr(xm, "get_memory_info", lambda device: memory)
    stats = XLAAccelerator().get_device_stats(torch.device("xla", 0))
    assert stats == {"avg. free memory (MB)": 5.0, "avg. peak memory (MB)": 4.0}


def test_what_cannot_be_is_refused(monkeypatch):
    for precision in ("16-mixed", "64-true", "float8"):
        with pytest.raises(
            ValueError, match=rf"precision='{precision}' cannot be used on XLA devices. Use 'bf16-mixed'"
        ):
            trainer(precision=precision)
    with pytest.raises(
        ValueError, match=r"must be one of '32-true', 'bf16-true', '16-true' for XLAPrecision, received 'fp8'"
    ):
        XLAPrecision("fp8")
    for strategy in ("ddp", "fsdp"):
        with pytest.raises(ValueError, match=rf"strategy='{strategy}' cannot be used with accelerator='tpu'"):
            trainer(strategy=strategy)
    for strategy in ("xla", "single_xla", "xla_fsdp"):
        with pytest.raises(ValueError, match=rf"strategy='{strategy}' cannot be used with accelerator='cpu'"):
            trainer("cpu", strategy=strategy)
    with pytest.raises(ValueError, match=r"received num_nodes=2. Use num_nodes=1, or strategy='xla'"):
        trainer(strategy="xla_fsdp", devices=2, num_nodes=2)
    with pytest.raises(ValueError, match=r"state_dict_type must be 'full' for XLAFSDPStrategy, received 'sharded'"):
        XLAFSDPStrategy(state_dict_type="sharded")
    with pytest.raises(ValueError, match=r"start_method must be one of popen, .* received 'thread'"):
        XLAStrategy(start_method="thread")
    # torch_xla sets the variable itself when it finds no TPU; that alone must not move a program to XLA.
    assert Trainer(logger=False).strategy.root_device.type == "cpu"
    monkeypatch.delenv("PJRT_DEVICE")
    with pytest.raises(RuntimeError, match=r"accelerator='tpu' is not available on this machine"):
        trainer()


def test_the_profiler_listens_and_names_steps(monkeypatch):
    import torch_xla.debug.profiler as xp

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    from levin.profilers import XLAProfiler

    named = []
    real = xp.StepTrace
    monkeypatch.setattr(xp, "StepTrace", lambda name, **kwargs: named.append((name, kwargs)) or real(name, **kwargs))
    profiler = XLAProfiler(port)
    trainer(max_epochs=1, profiler=profiler, limit_train_batches=2, limit_val_batches=0).fit(Deep())
    with socket.create_connection(("127.0.0.1", port), timeout=10):
        pass
    assert named == [("[Strategy]SingleDeviceXLAStrategy.training_step", {"step_num": step}) for step in (0, 1)]


def test_fabric():
    torch.manual_seed(1)
    fabric = Fabric(accelerator="tpu", devices=1)
    fabric.launch()
    net = torch.nn.Linear(4, 1)
    start = net.weight.detach().clone()
    net, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(dataset(), batch_size=8))
    expected = torch.nn.Linear(4, 1)
    expected.load_state_dict({name: value.cpu() for name, value in net.module.state_dict().items()})
    assert torch.equal(expected.weight, start)
    plain = torch.optim.SGD(expected.parameters(), lr=0.1)
    for x, _ in loader:
        assert x.device.type == "xla"
        for model, stepped, inputs in ((net, optimizer, x), (expected, plain, x.cpu())):
            loss = model(inputs).pow(2).mean()
            fabric.backward(loss) if model is net else loss.backward()
            stepped.step()
            stepped.zero_grad()
    torch.testing.assert_close(net.module.weight.cpu(), expected.weight)


# ---- two processes, each with a device of its own ----


class Manual(Deep):
    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size, optimizer=torch.optim.SGD)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.net(batch[0]).pow(2).mean()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()


@world_size(2, connect=False, timeout_s=400)
def test_two_processes_are_one_device():
    os.environ["PJRT_DEVICE"] = "CPU"
    for kind, settings in (
        (Deep, {}),
        (Deep, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
        (Manual, {}),
    ):
        module, reference = kind(4), kind(8)
        if os.environ["RANK"] != "0":
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)  # they start from the weights of rank 0
        found = trainer(devices=2, strategy="xla", **settings)
        found.fit(module)
        assert found.world_size == 2
        alone(**settings).fit(reference)
        assert_same(module, reference)


@world_size(2, connect=False, timeout_s=400)
def test_two_processes_go_on_from_their_checkpoint(tmp_path):
    os.environ["PJRT_DEVICE"] = "CPU"
    path = tmp_path / "middle.ckpt"
    found = []
    for saves_at, ckpt_path in ((path, None), (None, path)):
        seed_everything(3)
        module = Random(saves_at)
        settings = {"max_epochs": 3, "accumulate_grad_batches": 3, "devices": 2}
        trainer(**settings).fit(module, ckpt_path=ckpt_path)
        found.append(weights(module))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


SCRIPT = """
import sys
import torch
from levin import Trainer
from levin.strategies import XLAStrategy
from tests.strategies.small import QUIET, Small

if __name__ == "__main__":
    module = Small()
    before = module.net[1].weight.detach().clone()
    strategy = sys.argv[1] if sys.argv[1].startswith("xla") else XLAStrategy(start_method=sys.argv[1])
    trainer = Trainer(**{**QUIET, "accelerator": "tpu"}, devices=2, strategy=strategy, max_epochs=1, enable_checkpointing=False)
    trainer.fit(module)
    assert not torch.equal(before, module.net[1].weight)
    print("RANK", trainer.global_rank, trainer.world_size, float(trainer.callback_metrics["loss"]), module.net[1].weight.device.type)
"""


@pytest.mark.parametrize("strategy, num_lines", [("xla_debug", 2), ("spawn", 1)])
def test_processes_are_started(tmp_path, strategy, num_lines):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    paths = [Path(levin.__file__).parents[1], Path(__file__).parents[2]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, str(script), strategy],
        env=environment,
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("RANK")]
    assert len(lines) == num_lines
    assert len({line[3] for line in lines}) == 1  # one loss for all
    assert {line[4] for line in lines} == {"cpu"}
    assert ("Compilation Analysis" in done.stderr + done.stdout) == (strategy == "xla_debug")


# ---- all devices in one process ----


class Watched(Deep):
    """Notes how its batches, its weights and the states of its optimizer lie on the devices, and the calls of a block."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.batches, self.calls = set(), 0
        self.net.blocks[0].layer.register_forward_hook(lambda layer, *_: self.count(layer.training))

    def count(self, is_training: bool) -> None:
        self.calls += is_training

    def training_step(self, batch, batch_idx):
        self.batches.add(torch_xla._XLAC._get_xla_sharding_spec(batch[0]))
        return super().training_step(batch, batch_idx)

    def on_train_end(self):
        spec = torch_xla._XLAC._get_xla_sharding_spec
        moments = [state["exp_avg"] for state in self.trainer.optimizers[0].state.values()]
        self.specs = [[spec(tensor) for tensor in group] for group in (list(self.parameters()), moments)]


@world_size(1, connect=False, timeout_s=400)
def test_weights_are_cut_over_four_devices(tmp_path):
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="4")
    with pytest.raises(ValueError, match=r"takes all devices, received devices=2 where there are 4. Use devices=4"):
        trainer(strategy="xla_fsdp", devices=2).fit(Deep())
    module, reference = Watched(8), Deep(8)
    strategy = XLAFSDPStrategy(activation_checkpointing_policy={Block})
    found = trainer(strategy=strategy, devices=4, gradient_clip_val=0.05, accumulate_grad_batches=2)
    found.fit(module)
    trainer("cpu", gradient_clip_val=0.05, accumulate_grad_batches=2).fit(reference)
    assert_same(module, reference)
    assert all(spec.startswith("{devices=[4") for spec in module.batches), module.batches
    assert module.calls == 2 * len(module.losses)  # once more in each backward pass
    for specs in module.specs:
        cut = [spec for spec in specs if spec.startswith("{devices=[4")]
        assert len(cut) == len(specs) - 2, specs  # the head has one output
    found.save_checkpoint(tmp_path / "whole.ckpt")
    assert weights(Deep.load_from_checkpoint(tmp_path / "whole.ckpt")).keys() == weights(module).keys()
    torch.testing.assert_close(torch.load(tmp_path / "whole.ckpt")["state_dict"], dict(module.state_dict()))
