"""A training on one process that is told to end while a checkpoint is being written in the background.

    python signalled_saving.py FOLDER WAY WRITE_S

WAY is ``"async_save"`` or ``"plugin"``. The second file takes WRITE_S to write, as on a slow disk: when it is half written,
the step that is under way makes the file ``writing`` and waits a little.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import LightningModule, Trainer
from levin.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from levin.checkpoint import AsyncCheckpointIO
from levin.utilities import filesystem
from levin.utilities.filesystem import SyncedFile

is_writing = threading.Event()


class Model(LightningModule):
    def __init__(self, folder: Path, waits: bool) -> None:
        super().__init__()
        self.folder, self.waits = folder, waits
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.2), nn.Linear(64, 1))

    def training_step(self, batch, batch_idx):
        if self.waits and self.global_step == 8:
            is_writing.wait(30)
            (self.folder / "writing").touch()
            time.sleep(1.0)
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def slow_file(write_s: float) -> type[SyncedFile]:
    num_files = 0

    class SlowFile(SyncedFile):
        def finish(self) -> None:
            nonlocal num_files
            num_files += 1
            if num_files == 2:
                is_writing.set()
                time.sleep(write_s)
            super().finish()

    return SlowFile


def train(folder: Path, way: str, write_s: float = 0.0) -> Trainer:
    saving = ModelCheckpoint(folder / "saved", every_n_train_steps=4, save_top_k=-1, async_save=way == "async_save")
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder), callbacks=[saving, OnExceptionCheckpoint(folder / "saved")],
        plugins=[AsyncCheckpointIO()] if way == "plugin" else None,
    )  # fmt: skip
    model = Model(folder, waits=write_s > 0)
    rows = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    trainer.fit(model, DataLoader(TensorDataset(rows), batch_size=2, shuffle=True), ckpt_path="auto")
    return trainer


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    filesystem.SyncedFile = slow_file(float(sys.argv[3]))
    train(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
