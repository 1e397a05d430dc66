"""Checkpoints out of a model registry. The service itself cannot be reached here: a stand-in puts a real file in its place."""

from __future__ import annotations

import shutil
import sys
from types import ModuleType

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.checkpoint.select import is_registry, name_in_registry


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **settings):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, **{"max_epochs": 1, **settings},
    )  # fmt: skip


def data():
    return DataLoader(torch.ones(4, 2), batch_size=2)


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Stand in for the package: names that were asked for, and a checkpoint for each."""
    first = trainer(tmp_path)
    first.fit(Model(), data())
    first.save_checkpoint(tmp_path / "trained.ckpt")
    names: list[str] = []

    def download_model(name, download_dir):
        names.append(name)
        (tmp_path / download_dir).mkdir()
        shutil.copy(tmp_path / "trained.ckpt", tmp_path / download_dir / "model.ckpt")

    package = ModuleType("litmodels")
    package.__spec__ = sys.__spec__
    package.download_model = download_model
    monkeypatch.setitem(sys.modules, "litmodels", package)
    return names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("registry", "owner/space/net"),
        ("registry:other/space/net", "other/space/net"),
        ("registry:version:v3", "owner/space/net:v3"),
        ("registry:other/space/net:version:v3", "other/space/net:v3"),
    ],
)
def test_fit_goes_on_from_a_file_of_the_registry(tmp_path, registry, given, name):
    run = trainer(tmp_path, max_epochs=3, model_registry="owner/space/net:v1")
    run.fit(Model(), data(), ckpt_path=given)
    assert registry == [name]
    assert run.ckpt_path == str(tmp_path / name.replace("/", "_").replace(":", "_") / "model.ckpt")
    assert run.global_step == 6


@pytest.mark.parametrize("given", ["registry:", "registry:a:v1", "registry:version:", "registry:a:version:v:w"])
def test_another_form_is_refused(given):
    with pytest.raises(ValueError, match="must be 'registry'"):
        name_in_registry(given, "owner/space/net")


def test_a_model_must_be_named(tmp_path):
    with pytest.raises(ValueError, match="names no model"):
        trainer(tmp_path).fit(Model(), data(), ckpt_path="registry:version:v1")


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litmodels", None)
    with pytest.raises(ModuleNotFoundError, match="pip install litmodels"):
        trainer(tmp_path).fit(Model(), data(), ckpt_path="registry:owner/space/net")


def test_a_file_whose_name_begins_like_it_is_a_file():
    assert not is_registry("registry.ckpt")
