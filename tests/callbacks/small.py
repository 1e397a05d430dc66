"""A tiny model and a quiet Trainer for the tests of the callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset

from levin.module import LightningModule
from levin.trainer import Trainer


class Small(LightningModule):
    """Logs ``train`` (the batch index) and ``val`` (what it is told for each epoch); fails where it is told.

    Args:
        values: Value of ``val`` in each epoch; the last one is repeated.
        fail_at: Epoch, batch index and exception.
    """

    def __init__(self, values: Sequence[float] = (1.0,), fail_at: tuple[int, int, BaseException] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(2, 1)
        self.values = values
        self.fail_at = fail_at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.fail_at is not None and self.fail_at[:2] == (self.current_epoch, batch_idx):
            raise self.fail_at[2]
        self.log("train", float(batch_idx))
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.values[min(self.current_epoch, len(self.values) - 1)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TrainOnly(Small):
    """The same without validation."""

    validation_step = LightningModule.validation_step


def loader(num_batches: int = 4) -> DataLoader:
    samples = torch.randn(num_batches, 2, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(samples))


def trainer(folder: Path, callbacks: Any, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        accelerator="cpu", devices=1, default_root_dir=str(folder), logger=False, callbacks=callbacks, max_epochs=3,
        enable_checkpointing=any(callback.runs_last for callback in callbacks), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    return Trainer(**{**settings, **kwargs})


def names(folder: Path) -> list[str]:
    """The files below ``folder``, in order."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())
