"""The ``levin`` command: runs without a program, what the machine offers, what a checkpoint holds."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch

import levin
from levin.__main__ import COMMANDS, main
from levin.cli import env
from levin.environments import LightningEnvironment

PROJECT = """
import torch
import levin

class Net(levin.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

    def test_step(self, batch, batch_idx):
        self.log("lr", self.hparams.lr)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

class Data(levin.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=self.batch_size)

    test_dataloader = train_dataloader
"""
QUIET = ["--seed_everything=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.log_every_n_steps=1"]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The checkpoint holds states of callbacks")  # the test has no ModelCheckpoint
def test_a_module_is_trained_and_tested_without_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # As for a program of its own, which has its folder there and not the present one.
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    before = sys.argv, sys.path[:]
    (tmp_path / "commanded_project.py").write_text(PROJECT)
    words = ["--model=commanded_project.Net", "--data=commanded_project.Data", "--data.batch_size=2", *QUIET]
    assert (
        main(
            [
                "fit",
                *words,
                "--model.lr=0.25",
                "--trainer.max_epochs=1",
                "--trainer.logger=CSVLogger",
                "--trainer.logger.save_dir=logs",
            ]
        )
        == 0
    )
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    assert checkpoint.name == "epoch=0-step=4.ckpt"
    config = next(tmp_path.rglob("config.yaml"))
    assert (
        main(
            ["test", "--config", str(config), "--config", str(_without_seed(tmp_path)), "--ckpt_path", str(checkpoint)]
        )
        == 0
    )
    assert "0.25" in capsys.readouterr().out
    assert (sys.argv, sys.path) == before
    sys.modules.pop("commanded_project")


def _without_seed(folder):
    # The folder of the logs has a configuration already.
    file = folder / "quiet.yaml"
    file.write_text("trainer: {logger: false, enable_checkpointing: false}\n")
    return file


def test_help_fits_a_screen_and_names_every_command(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 28 and all(f"    {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as left:
        main([name, *(["run"] if name == "fabric" else []), "--help"])
    assert left.value.code == 0
    assert re.search(f"Examples?: levin {name} ", " ".join(capsys.readouterr().out.split()))


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without CUDA")
def test_the_machine_is_described(capsys, monkeypatch):
    for name in list(os.environ):  # a scheduler may have started the tests
        if name.startswith(("SLURM_", "LSB_", "TORCHELASTIC_", "OMPI_", "PMI_")):
            monkeypatch.delenv(name)
    monkeypatch.setattr(env, "count_processors", lambda: 3)
    monkeypatch.setattr(env, "PACKAGES", ["torch", "no-such-package"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(["env"]) == 0
    assert (
        capsys.readouterr().out
        == f"""versions
  levin              {levin.__version__}
  python             {platform.python_version()}
  torch              {version("torch")}
  no-such-package    -
machine
  system             {platform.platform()}
  processors         3 of {os.cpu_count()}, torch uses {torch.get_num_threads()} threads
  cuda               no
  mps                no
  distributed        yes
selected by Trainer()
  accelerator        CPUAccelerator: the first of tpu, mps, cuda and cpu that is there
  devices            1: all of them; one process on the CPU
  strategy           SingleDeviceStrategy: ddp for several devices, else one device
  precision          32-true: unless precision= says otherwise
  environment        none, which one process does not need
"""
    )


def test_gpus_and_the_environment_are_described(monkeypatch):
    card = SimpleNamespace(name="Card", total_memory=3 * 2**30, major=9, minor=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    cards = [(f"cuda:{index}", "Card, 3.0 GiB, capability 9.1") for index in range(2)]
    assert list(env._devices()) == [*cards, ("mps", "yes"), ("distributed", "no")]
    strategy = SimpleNamespace(environment=LightningEnvironment(), precision=SimpleNamespace(precision="32-true"))
    chosen = SimpleNamespace(strategy=strategy, accelerator=None, num_devices=2)
    monkeypatch.setattr("levin.engine.build_engine", lambda: chosen)
    assert (
        dict(dict(env.describe())["selected by Trainer()"])["environment"] == "LightningEnvironment, by its variables"
    )


class Evil:
    def __reduce__(self):
        return os.mkdir, ("made-by-a-checkpoint",)


def test_a_checkpoint_is_described_and_never_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved = {
        "epoch": 2, "global_step": 70, "pytorch-lightning_version": "2.6.6", "hyper_parameters": {"lr": 0.1},
        "state_dict": {"net.0.weight": torch.zeros(3, 4), "net.0.bias": torch.zeros(3), "scale": torch.zeros(2, dtype=torch.float64)},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}], "callbacks": {"Early": {"wait": 1}},
    }  # fmt: skip
    torch.save(saved, "good.ckpt")
    assert main(["inspect", "good.ckpt"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "epoch 2",
        "step 70",
        "Lightning 2.6.6",
        "lr 0.1",
        "net.0 15 numbers, 60 bytes, float32",
        "in all 17 numbers, 76 bytes",
        "2 parameters",
        "Early",
    ):
        assert part in text
    torch.save({**saved, "extra": Evil()}, "evil.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"x" * 100)
    assert main(["inspect", "evil.ckpt", "broken.ckpt", "missing.ckpt"]) == 1
    assert capsys.readouterr().out.count("cannot be read") == 3
    assert not (tmp_path / "made-by-a-checkpoint").exists()
