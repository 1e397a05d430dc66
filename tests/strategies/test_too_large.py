"""A transformer that one process of limited memory cannot train trains on two, which need what was planned."""

from __future__ import annotations

import ctypes
import resource
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.planning import plan_run
from levin.strategies.fsdp import FSDPStrategy
from tests.distributed import run_ranks
from tests.strategies.small import QUIET

WIDTH, DEPTH = 512, 8


class Large(LightningModule):
    """96 MiB of weights; with gradients and Adam's moments four times as much.

    Args:
        room: Bytes that the process may take from then on, weights first; no limit when None.
    """

    def __init__(self, room: int | None = None) -> None:
        super().__init__()
        self.room = room
        self.losses: list[float] = []
        self.sums: list[float] = []
        self.before = 0

    def configure_model(self):
        if hasattr(self, "net"):
            return
        # Memory that is freed goes back at once, so that what is resident is in use.
        allocator = ctypes.CDLL(None)
        allocator.mallopt(-3, 65536)  # M_MMAP_THRESHOLD
        allocator.mallopt(-1, 0)  # M_TRIM_THRESHOLD
        self.before = memory("VmRSS")
        if self.room is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + self.room, resource.RLIM_INFINITY))
        self.net = make()[0]

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return adam(self.parameters())

    def on_train_start(self):
        for parameter in self.net.parameters():
            state = self.optimizers().state[parameter]
            for tensor in (parameter.detach(), *(state[name] for name in sorted(state))):
                whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                self.sums.append(float(whole.double().abs().sum()))


def adam(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)


def make() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True) for _ in range(DEPTH)]
    return nn.Sequential(*layers), batch()[None]


def batch() -> torch.Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH).reshape(4, WIDTH)


def memory(name: str) -> int:
    """Return a size of this process, as Linux says it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def trained(module: Large, size: int, max_epochs: int, ckpt_path: Path | None = None) -> Trainer:
    """Train on the same two batches in every process."""
    strategy = FSDPStrategy(state_dict_type="sharded") if size > 1 else "auto"
    settings = {"devices": size, "strategy": strategy, "max_epochs": max_epochs, "use_distributed_sampler": False}
    trainer = Trainer(**QUIET, **settings, enable_checkpointing=False)
    torch.manual_seed(1)
    trainer.fit(module, DataLoader([batch(), -batch()], batch_size=1), ckpt_path=ckpt_path)
    return trainer


def train_in(room: int, size: int, folder: Path) -> tuple[str, int]:
    """Return the error, "" for none, and the most memory that training took."""
    module = Large(room)
    try:
        trainer = trained(module, size, max_epochs=1)
    except (RuntimeError, MemoryError) as error:
        return str(error), 0
    needed = memory("VmHWM") - module.before
    trainer.save_checkpoint(folder)
    return "", needed


def go_on(size: int, folder: Path) -> tuple[list[float], list[float]]:
    warnings.filterwarnings("ignore", "The checkpoint was saved by 2 processes")
    module = Large()
    trained(module, size, max_epochs=2, ckpt_path=folder)
    return module.sums, module.losses


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_train_what_one_cannot_hold(tmp_path):
    one, two = (plan_run(make, f"mesh:dp={size}", optimizer=adam).peak for size in (1, 2))
    room = (one + two) // 2
    assert two < 0.65 * one
    ((error, _),) = run_ranks(train_in, 1, {"room": room, "size": 1, "folder": tmp_path / "one"}, 400, connect=False)
    assert "allocate" in error
    assert not (tmp_path / "one").exists()
    for error, needed in run_ranks(
        train_in, 2, {"room": room, "size": 2, "folder": tmp_path / "run"}, 400, connect=False
    ):
        assert error == ""
        assert two == pytest.approx(needed, rel=0.25)
    ((sums, losses),) = run_ranks(go_on, 1, {"size": 1, "folder": tmp_path / "run"}, 400, connect=False)
    assert len(losses) == 2
    assert all(sums)
    for found in run_ranks(go_on, 3, {"size": 3, "folder": tmp_path / "run"}, 400, connect=False):
        assert found[0] == pytest.approx(sums, rel=1e-5)
        assert found[1] == pytest.approx(losses, rel=1e-4)
