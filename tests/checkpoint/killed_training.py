"""Trains in a process that is killed again and again, and looks at the files after each kill.

    python -m tests.checkpoint.killed_training FOLDER WAY NUM_KILLS SEED

Each process goes on with ``ckpt_path="auto"``, saves after every step, and is killed with SIGKILL at a random moment, at
least NUM_KILLS times, and until there is a file of a few steps.
Prints a line of JSON with what was found. Exits with 1 at the first file that is not whole.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from levin import Callback, LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO, find_newest_intact, load
from levin.checkpoint.verify import verify
from levin.utilities.filesystem import TEMPORARY_PREFIX

MIN_STEPS = 20


class Model(LightningModule):
    """About 1.5 MB with the states of Adam; every parameter is the number of steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.zeros(12_500) for _ in range(10))

    def training_step(self, batch, batch_idx):
        loss = sum(weight.sum() for weight in self.weights)
        # Each step is better than those before, so that each is saved, and an older file deleted for it.
        self.log("score", -float(self.trainer.global_step))
        return loss

    def on_before_zero_grad(self, optimizer):
        # A file that mixes two moments would hold parameters that differ.
        with torch.no_grad():
            for weight in self.weights:
                weight.fill_(float(self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


class Announce(Callback):
    """Says that training has begun."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.pipe:
            os.write(self.pipe, b"1")
            self.pipe = 0


def train(folder: Path, way: str, pipe: int) -> None:
    callback = ModelCheckpoint(
        folder, monitor="score", save_top_k=3, every_n_train_steps=1, async_save=way == "async_save",
        save_last=True if way == "blocking" else "link",
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", default_root_dir=str(folder), logger=False, callbacks=[Announce(pipe), callback], max_epochs=-1,
        enable_progress_bar=False, enable_model_summary=False, plugins=AsyncCheckpointIO() if way == "plugin" else None,
    )  # fmt: skip
    data = DataLoader(TensorDataset(torch.zeros(5, 1)), batch_size=1)
    trainer.fit(Model(), data, ckpt_path="auto")


def killed(folder: Path, way: str, wait_s: float) -> None:
    """Train in another process, and kill it some time after its first step."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            train(folder, way, writer)
        finally:
            os._exit(status)
    os.close(writer)
    began = os.read(reader, 1)
    os.close(reader)
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not began or not os.WIFSIGNALED(status):
        raise SystemExit("the training ended by itself")


def look(folder: Path) -> int:
    """Check all files, and return the step of the newest one."""
    steps = [0]
    for path in sorted(folder.glob("*.ckpt")):
        verify(path)
        checkpoint = load(path)
        values = {value for weight in checkpoint["state_dict"].values() for value in weight.unique().tolist()}
        if len(values) != 1:
            raise ValueError(f"{path} mixes moments: {sorted(values)}")
        steps.append(checkpoint["global_step"])
    newest = find_newest_intact(folder)
    if newest is not None and load(newest)["global_step"] < max(steps) - 1:
        raise ValueError(f"the newest file {newest} is not that of step {max(steps)}")
    return max(steps)


def main() -> int:
    folder, way, num_kills, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chance = random.Random(seed)
    step, num_killed, num_stopped_while_writing = 0, 0, 0
    # On a busy machine a process may be killed before its first file is complete: then it takes some more kills.
    while num_killed < num_kills or (step < min(num_kills, MIN_STEPS) and num_killed < 10 * num_kills):
        num_killed += 1
        before = len(list(folder.glob(f"{TEMPORARY_PREFIX}*")))
        killed(folder, way, chance.uniform(0.0, 0.3))
        num_stopped_while_writing += len(list(folder.glob(f"{TEMPORARY_PREFIX}*"))) > before
        now = look(folder)
        if now < step:
            raise ValueError(f"step {now} is the newest, and {step} was there before")
        step = now
    print(json.dumps({"step": step, "while_writing": num_stopped_while_writing}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
