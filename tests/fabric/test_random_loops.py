"""Loops of all kinds, drawn at random, that are ended anywhere and go on from their last checkpoint as if nothing had happened."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from levin import Fabric
from tests.distributed import world_size


class Ended(BaseException):
    """Stands for the end of the process."""


class Noisy(TensorDataset):
    """Each item has a random part."""

    def __getitem__(self, index):
        (x,) = super().__getitem__(index)
        return x + torch.rand(1) + random.random()


class Program:
    """A loop that somebody could have written.

    Args:
        seed: Decides what it does.
        num_processes: How many run it.
        folder: Where it saves.
    """

    def __init__(self, seed: int, num_processes: int, folder: Path) -> None:
        choose = self.choose = random.Random(seed)
        self.num_processes, self.path = num_processes, folder / f"{seed}.ckpt"
        self.epochs = choose.randint(2, 3)
        self.batch_size = choose.randint(1, 3)
        self.num_samples = choose.randint(8, 15) * num_processes
        self.window = choose.randint(1, 3)
        self.limit = choose.choice([None, None, 3])
        self.workers = choose.choice([0, 0, 0, 2])
        self.precision = choose.choice(["32-true", "bf16-mixed", "64-true"])
        self.optimizers = [choose.choice(["SGD", "Adam", "AdamW"]) for _ in range(choose.randint(1, 3))]
        self.steps_in_turn = choose.random() < 0.5
        self.has_scheduler = choose.random() < 0.5
        self.clips = choose.random() < 0.5
        self.validates_every = choose.choice([None, 2, 3])
        self.saves_every = choose.randint(1, 4)
        self.seen: list[float] = []

        strategy = "ddp" if num_processes > 1 else "auto"
        self.fabric = Fabric(accelerator="cpu", devices=num_processes, strategy=strategy, precision=self.precision)
        self.fabric.launch()

    def make(self) -> dict[str, Any]:
        """Return all anew, as another process would make it."""
        fabric, self.seen = self.fabric, []
        random.seed(0)
        torch.manual_seed(0)
        state: dict[str, Any] = {"epoch": 0, "batches": 0, "in_epoch": 0, "steps": 0}
        self.nets = []
        for number, kind in enumerate(self.optimizers):
            net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.BatchNorm1d(4), nn.Linear(4, 1))
            net, optimizer = fabric.setup(net, getattr(torch.optim, kind)(net.parameters(), lr=0.05))
            self.nets.append(net)
            state |= {f"net{number}": net, f"optimizer{number}": optimizer}
            if self.has_scheduler:
                state[f"scheduler{number}"] = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
        data = Noisy(torch.randn(self.num_samples, 3))
        train = DataLoader(data, self.batch_size, shuffle=True, num_workers=self.workers, drop_last=True)
        state["loader"] = fabric.setup_dataloaders(train)
        state["val"] = fabric.setup_dataloaders(DataLoader(data, 4, shuffle=True))
        return state

    def run(self, state: dict[str, Any], ends_at: int | None = None) -> dict[str, torch.Tensor]:
        """Train to the end, or to the batch of number ``ends_at``, and return all weights."""
        for epoch in range(state["epoch"], self.epochs):
            for x in state["loader"]:
                if state["batches"] == ends_at:
                    raise Ended
                state["batches"] += 1
                state["in_epoch"] += 1
                self.train(state, x)
                if self.limit is not None and state["in_epoch"] >= self.limit:
                    break
            state["epoch"], state["in_epoch"] = epoch + 1, 0
            self.validate(state)
            if state["batches"] % self.window == 0:
                self.fabric.save(self.path, state)
        return {
            f"{n}.{key}": value.clone() for n, net in enumerate(self.nets) for key, value in net.state_dict().items()
        }

    def train(self, state: dict[str, Any], x: torch.Tensor) -> None:
        closes = state["batches"] % self.window == 0
        for number, net in enumerate(self.nets):
            with self.fabric.no_backward_sync(net, enabled=not closes):
                loss = net(torch.cat([x, x + 1])).square().mean() / self.window
                self.fabric.backward(loss)
            self.seen.append(float(loss.detach()))
            if closes:
                self.update(state, number)
        state["steps"] += closes
        if closes and self.validates_every and state["steps"] % self.validates_every == 0:
            self.validate(state)
        # The gradients of a window that is open are not in a checkpoint.
        if closes and state["steps"] % self.saves_every == 0:
            self.fabric.save(self.path, state)

    def update(self, state: dict[str, Any], number: int) -> None:
        optimizer = state[f"optimizer{number}"]
        if self.clips:
            self.fabric.clip_gradients(self.nets[number], optimizer, max_norm=0.5)
        if not self.steps_in_turn or state["steps"] % len(self.nets) == number:
            optimizer.step()
            if self.has_scheduler:
                state[f"scheduler{number}"].step()
        optimizer.zero_grad()

    def validate(self, state: dict[str, Any]) -> None:
        for net in self.nets:
            net.eval()
        with torch.no_grad():
            self.seen += [float(net(x).sum()) for x in state["val"] for net in self.nets]
        for net in self.nets:
            net.train()


def check(seed: int, folder: Path, num_processes: int = 1) -> None:
    program = Program(seed, num_processes, folder)
    whole = program.make()
    weights, seen = program.run(whole), program.seen
    program.fabric.barrier()
    program.path.unlink(missing_ok=True)
    program.fabric.barrier()
    # Twice, since what was taken up has to be saved again.
    for _ in range(2):
        state = program.make()
        random.seed(seed + 1)
        torch.manual_seed(seed + 1)
        if program.path.exists():
            program.fabric.load(program.path, state)
        else:
            state = program.make()
        with suppress(Ended):
            program.run(state, ends_at=program.choose.randint(state["batches"], whole["batches"] - 1))
    state = program.make()
    if program.path.exists():
        assert program.fabric.load(program.path, state) == {}
    found = program.run(state)
    assert program.seen == seen[len(seen) - len(program.seen) :], (seed, vars(program))
    different = [name for name in weights if not torch.equal(weights[name], found[name])]
    assert not different, (seed, different, vars(program))


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 60))])
def test_a_loop_that_was_ended_anywhere_goes_on(seed, tmp_path):
    check(seed, tmp_path)


@world_size(2, timeout_s=200)
def test_loops_of_two_processes_go_on(tmp_path):
    for seed in range(101, 104):
        check(seed, tmp_path, num_processes=2)


@pytest.mark.slow
@pytest.mark.timeout(660)
@world_size(2, timeout_s=600)
def test_many_loops_of_two_processes_go_on(tmp_path):
    for seed in (100, *range(104, 130)):
        check(seed, tmp_path, num_processes=2)
