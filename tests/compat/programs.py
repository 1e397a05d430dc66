"""Programs written for Lightning, run in fresh processes under the alias."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Stands where Python looks into folders, so that an installed Lightning is invisible, in child processes too.
BLOCKER = """
import sys

ROOTS = ("lightning", "pytorch_lightning", "lightning_fabric")


class Blocker:
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ROOTS:
            raise ModuleNotFoundError(f"{fullname} is not installed here", name=fullname)


sys.meta_path.insert(len(sys.meta_path) - 1, Blocker())
"""


def without_lightning(folder: Path) -> dict[str, str]:
    """The environment of a process that has no Lightning: a `sitecustomize` of the user's own sees to it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(BLOCKER)
    paths = [str(folder), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), "OMP_NUM_THREADS": "1"}


def run(words: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *words]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=200)


def output(words: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = run(words, env, cwd)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


MODULE = """
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, width=4, name="a"):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader():
    return DataLoader(TensorDataset(torch.arange(32.0).reshape(8, 4)), batch_size=2)


def trainer(**kwargs):
    settings = dict(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(**{**settings, **kwargs})
"""
