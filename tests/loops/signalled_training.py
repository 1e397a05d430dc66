"""Trains in a process that gets SIGTERM again and again, and compares with the unbroken run.

    python -m tests.loops.signalled_training FOLDER WAY NUM_SIGNALS SEED

WAY is ``plain``, ``async``, ``accumulate``, ``workers``, or ``persistent``: workers that live on, of the validation data as well.
Each process goes on with ``ckpt_path="auto"`` until one comes to its end. The signal comes at a random moment after training
has begun; with workers it reaches them as well. Exits with 1 at the first wrong exit status, damaged file or difference.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from levin import Callback, LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint.verify import verify
from levin.loggers.logger import Logger
from levin.ranks.signals import FILE_NAME
from tests.data.loaders_for_tests import Augmented, as_is


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

    def step(self, batch):
        time.sleep(0.003)
        return self.net(torch.tensor(batch, dtype=torch.float32)).pow(2).mean()

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.step(batch) + torch.rand(()), batch_size=len(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Announce(Callback):
    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_start(self, trainer, pl_module):
        os.write(self.pipe, b"1")


class Lines(Logger):
    """Adds the lines to a file."""

    name = "lines"
    version = 0

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def log_metrics(self, metrics, step=None):
        with open(self.path, "a") as file:
            file.write(json.dumps([step, metrics]) + "\n")

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def train(folder: Path, way: str, pipe: int) -> None:
    # A signal that comes after the end of fit finds this one.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    torch.manual_seed(1)
    random.seed(1)
    callback = ModelCheckpoint(
        folder / "kept", monitor="loss", save_top_k=2, every_n_train_steps=3, async_save=way == "async"
    )
    trainer = Trainer(
        accelerator="cpu", default_root_dir=str(folder), logger=Lines(folder / "lines"), max_epochs=3,
        callbacks=[callback, Announce(pipe)], enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
        accumulate_grad_batches=2 if way == "accumulate" else 1, val_check_interval=4,
    )  # fmt: skip
    lasts = way == "persistent"
    workers = 2 if way == "workers" or lasts else 0
    data = DataLoader(
        Augmented("tpo", size=32), batch_size=2, shuffle=True, collate_fn=as_is, num_workers=workers,
        persistent_workers=lasts,
    )  # fmt: skip
    val_data = DataLoader(
        Augmented("t", size=8), batch_size=2, collate_fn=as_is, num_workers=int(lasts), persistent_workers=lasts
    )
    model = Model()
    trainer.fit(model, data, val_data, ckpt_path="auto")
    torch.save((model.state_dict(), trainer.optimizers[0].state_dict()), folder / "end.pt")


def forked(folder: Path, way: str, wait_s: float | None) -> tuple[int, float]:
    """Train in another process, send SIGTERM some time after its beginning; return its exit status and how long it trained."""
    folder.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            os.close(reader)
            train(folder, way, writer)
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    began = time.monotonic()
    if wait_s is not None:
        time.sleep(wait_s)
        os.killpg(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), time.monotonic() - began


def main() -> int:
    folder, way, num_signals, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    status, duration_s = forked(folder / "unbroken", way, None)
    if status != 0:
        raise ValueError(f"the unbroken run ended with {status}")
    chance = random.Random(seed)
    num_told = 0
    while True:
        wait_s = chance.uniform(0.0, min(0.7, 2 / num_signals) * duration_s) if num_told < num_signals else None
        status, _ = forked(folder / "told", way, wait_s)
        if status == 0:
            break
        num_told += 1
        if status != 143:
            raise ValueError(f"a process that was told to end left with {status}")
        verify(folder / "told" / "kept" / FILE_NAME)
    lines = [(folder / name / "lines").read_text().splitlines() for name in ("unbroken", "told")]
    for number, (expected, found) in enumerate(zip(*lines)):
        if expected != found:
            raise ValueError(f"line {number}: expected {expected}, found {found}")
    if len(lines[0]) != len(lines[1]):
        raise ValueError(f"{len(lines[0])} lines expected, {len(lines[1])} found")
    ends = [torch.load(folder / name / "end.pt") for name in ("unbroken", "told")]
    if str(ends[0]) != str(ends[1]) or not all(torch.equal(ends[0][0][key], ends[1][0][key]) for key in ends[0][0]):
        raise ValueError("the weights differ")
    print(json.dumps({"num_told": num_told}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
