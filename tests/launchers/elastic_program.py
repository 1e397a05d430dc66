"""A training that goes on by itself after a process has died; started by torchrun.

    torchrun ... elastic_program.py FOLDER [STEP RANK]

With STEP and RANK, that rank is killed by SIGKILL in that step, once. Each rank writes the samples that it sees into a file;
rank 0 writes the weights at the end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.strategies import DDPStrategy

NUM_SAMPLES, EPOCHS = 24, 2


class Model(LightningModule):
    def __init__(self, folder: Path, death: tuple[int, int] | None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.folder, self.death = folder, death
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def on_train_start(self):
        attempt = self.trainer.strategy.broadcast(len(list(self.folder.glob("seen-*-0"))))
        self.seen = open(self.folder / f"seen-{attempt:03}-{self.global_rank}", "w")

    def training_step(self, batch, batch_idx):
        rows, numbers = batch
        if not self.trainer.is_filler:
            print(self.global_step, self.current_epoch, *numbers.tolist(), file=self.seen, flush=True)
        if self.death == (self.global_step, self.global_rank) and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if pause := float(os.environ.get("STEP_S", 0)):
            threading.Event().wait(pause)
        torch.rand(self.global_rank + 1)  # so that the ranks draw different numbers for the dropout
        return self.net(rows).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def main() -> None:
    folder = Path(sys.argv[1])
    death = (int(sys.argv[2]), int(sys.argv[3])) if len(sys.argv) > 2 else None
    rows = torch.randn(NUM_SAMPLES, 4, generator=torch.Generator().manual_seed(5))
    data = DataLoader(TensorDataset(rows, torch.arange(NUM_SAMPLES)), batch_size=2, shuffle=True)
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ["LOCAL_WORLD_SIZE"]), num_nodes=num_nodes, max_epochs=EPOCHS, logger=False,
        strategy=DDPStrategy(step_timeout=timedelta(seconds=float(os.environ.get("STEP_TIMEOUT_S", 60)))),
        default_root_dir=str(folder), callbacks=[ModelCheckpoint(folder / "saved", every_n_train_steps=1)],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    model = Model(folder, death)
    trainer.fit(model, data, ckpt_path="auto")
    if trainer.is_global_zero:
        torch.save(model.state_dict(), folder / "weights.tmp")
        os.rename(folder / "weights.tmp", folder / "weights")


if __name__ == "__main__":
    main()
