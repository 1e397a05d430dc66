"""Small modules and Trainers on the first CUDA device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from levin import Callback, LightningModule, Trainer

ACCELERATOR = "cuda"
DEVICE = torch.device("cuda", 0)
QUIET: dict[str, Any] = {
    "accelerator": ACCELERATOR,
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Numbers(Dataset):
    """Rows of random numbers; with ``is_noisy``, augmented by the random numbers of the process that reads them."""

    def __init__(self, num: int = 32, width: int = 8, is_noisy: bool = False) -> None:
        self.rows = torch.randn(num, width, generator=torch.Generator().manual_seed(1))
        self.is_noisy = is_noisy

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        row = self.rows[index]
        return row + 0.1 * torch.randn_like(row) if self.is_noisy else row


class Net(LightningModule):
    """Two layers with dropout; logs its loss under three names and keeps every loss."""

    def __init__(self, width: int = 8, hidden: int = 16, dropout: float = 0.5, lr: float = 0.01) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, 1))
        self.lr = lr
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("loss", loss, prog_bar=True)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("number", 1.0)
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Validated(Net):
    """The same, with a validation loss."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch).square().mean())


class SaveAt(Callback):
    """Saves a checkpoint at the end of one batch of the run, counted from 1."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)


def loader(num: int = 32, batch_size: int = 4, **kwargs) -> DataLoader:
    return DataLoader(Numbers(num), batch_size=batch_size, **kwargs)


def ready(batches: list[Any]) -> DataLoader:
    """Return a loader that hands out what is in the list."""
    return DataLoader(batches, batch_size=None)


def trainer(**kwargs) -> Trainer:
    return Trainer(**{**QUIET, "max_epochs": 1, **kwargs})


def values(module: LightningModule) -> list[float]:
    """Return the losses of all steps."""
    return torch.stack(module.losses).tolist()


def tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield every tensor in a tree of containers."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
