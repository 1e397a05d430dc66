"""Weights go out as safetensors and come back."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

from levin import Fabric, Trainer
from levin.checkpoint.safetensors_files import export_weights, load_weights, main
from levin.demos import BoringModel
from tests.distributed import cuts_on_cpu, world_size

safetensors = pytest.importorskip("safetensors.torch")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("brain", torch.ones(2, dtype=torch.bfloat16))


def test_tied_weights_are_written_once_and_come_back_under_all_names(tmp_path):
    module = Tied()
    torch.save({"model": module.state_dict()}, tmp_path / "run.ckpt")
    export_weights(tmp_path / "run.ckpt", tmp_path / "x.safetensors", key="model")
    assert "head.weight" not in safetensors.load_file(tmp_path / "x.safetensors")
    other = Tied()
    other.load_state_dict(load_weights(tmp_path / "x.safetensors"))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in other.state_dict().items())
    assert load_weights(tmp_path / "x.safetensors")["brain"].dtype == torch.bfloat16


def test_a_trainers_file_is_exported_by_the_command(tmp_path, capsys):
    model = BoringModel()
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    words = [str(tmp_path / "run.ckpt"), str(tmp_path / "x.safetensors"), "--prefix", "layer."]
    assert main(words) == 0
    found = safetensors.load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["weight"], model.layer.weight)
    assert set(found) == {"weight", "bias"}
    with pytest.raises(SystemExit):
        main(words)  # it is there already
    words[1:] = [str(tmp_path / "y.safetensors"), "--prefix", "nothing."]
    assert main(words) == 1
    assert "layer.weight" in capsys.readouterr().out
    assert not (tmp_path / "y.safetensors").exists()
    with pytest.raises(ValueError, match="under 'model'"):
        export_weights(tmp_path / "run.ckpt", tmp_path / "y.safetensors", key="model")


@cuts_on_cpu
@world_size(2, timeout_s=120)
def test_a_folder_is_exported(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="fsdp")
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    whole = net.weight.detach().clone()
    fabric.save(tmp_path / "run", {"net": fabric.setup(net)})
    if fabric.is_global_zero:
        export_weights(tmp_path / "run", tmp_path / "x.safetensors", key="net")
        assert torch.equal(load_weights(tmp_path / "x.safetensors")["weight"], whole)
    fabric.barrier()


@pytest.mark.parametrize(("held", "received"), [({"ema": {}, "epoch": 3}, "['ema', 'epoch']"), ([1], "list")])
def test_what_a_file_without_such_weights_holds_is_said(tmp_path, held, received):
    torch.save(held, tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=re.escape(f"has no weights under 'model', received {received}. Name another")):
        export_weights(tmp_path / "run.ckpt", tmp_path / "x.safetensors", key="model")


def test_what_is_no_such_file_is_said(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    with pytest.raises(ValueError, match="damaged, or no file of safetensors"):
        load_weights(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        load_weights(tmp_path / "nothing.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
        load_weights(tmp_path / "x.safetensors")
