"""A training on two processes that is told to end by signals.

    python signalled_program.py FOLDER STRATEGY STEP_S MOMENT

A step takes STEP_S. MOMENT is ``"batch"``; with ``"busy"`` rank 0 does not hear of signals within a step, as in a long
operation; with ``"saving"`` files are written in the background, which takes a while; with ``"setup"`` both ranks wait in
``setup`` until they are told; with ``"stuck"`` the shutdown after Ctrl-C takes for ever. Each rank writes the number of its process and of the step that it is in into a file of its own; rank 0 writes the
weights at the end. It goes on with ``ckpt_path="auto"``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import LightningModule, Trainer
from levin.callbacks import Callback, ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO
from levin.utilities import filesystem
from levin.utilities.filesystem import SyncedFile

STEPS_PER_EPOCH, EPOCHS = 10, 2
SHUTDOWN = 1000  # where both ranks would be in step 1000


class Model(LightningModule):
    def __init__(self, folder: Path, step_s: float, moment: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.folder, self.step_s, self.moment = folder, step_s, moment
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def announce(self, step: int) -> None:
        (self.folder / f"step-{self.global_rank}.tmp").write_text(f"{os.getpid()} {step}")
        os.rename(self.folder / f"step-{self.global_rank}.tmp", self.folder / f"step-{self.global_rank}")

    def setup(self, stage):
        if self.moment == "setup":
            self.announce(0)
            time.sleep(60)

    def training_step(self, batch, batch_idx):
        is_deaf = self.moment == "busy" and self.global_rank == 0
        if is_deaf:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        self.announce(self.global_step)
        time.sleep(self.step_s)
        if is_deaf:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        torch.rand(self.global_rank + 1)  # so that the ranks draw different numbers for the dropout
        return self.net(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Stuck(Callback):
    def on_exception(self, trainer, pl_module, exception):
        pl_module.announce(SHUTDOWN)
        time.sleep(600)


class SlowFile(SyncedFile):
    def finish(self) -> None:
        time.sleep(2.5)
        super().finish()


def main() -> None:
    folder, strategy, step_s, moment = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("ignore")
    rows = torch.randn(STEPS_PER_EPOCH * 4, 4, generator=torch.Generator().manual_seed(5))
    if moment == "saving":
        filesystem.SyncedFile = SlowFile
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=EPOCHS, logger=False, strategy=strategy, default_root_dir=str(folder),
        callbacks=[ModelCheckpoint(folder / "saved"), *([Stuck()] if moment == "stuck" else [])], enable_progress_bar=False, enable_model_summary=False,
        plugins=[AsyncCheckpointIO()] if moment == "saving" else None,
    )  # fmt: skip
    model = Model(folder, step_s, moment)
    trainer.fit(model, DataLoader(TensorDataset(rows), batch_size=2, shuffle=True), ckpt_path="auto")
    if trainer.is_global_zero:
        (folder / "resumed_from").write_text(str(trainer.ckpt_path))
        torch.save(model.state_dict(), folder / "weights")


if __name__ == "__main__":
    main()
