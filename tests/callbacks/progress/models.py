"""A small run for a progress bar to show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from levin import LightningModule, Trainer
from levin.callbacks import Callback


class Logging(LightningModule):
    """A linear layer that logs its losses to the progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def _loss(self, batch: Any) -> Tensor:
        return self.layer(batch[0]).pow(2).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self._loss(batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch), prog_bar=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(num_batches: int) -> DataLoader:
    """A loader of ``num_batches`` batches."""
    return DataLoader(TensorDataset(torch.randn(2 * num_batches, 4)), batch_size=2)


def trainer(bar: Callback, **settings: Any) -> Trainer:
    """A trainer with ``bar`` that writes nothing else."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **settings}, callbacks=[bar])
