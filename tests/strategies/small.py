"""A module small enough to be trained by several processes in a blink."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from levin import LightningModule


class WithLosses(LightningModule):
    """Keeps the mean loss over all ranks of each step; ``net`` is that of the class that derives from it."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(self.all_gather(outputs["loss"]).mean()))

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])


class Small(LightningModule):
    def __init__(self, has_norm: bool = False, lr: float = 0.1, batch_size: int = 4, size: int = 16) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, size
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.BatchNorm1d(4) if has_norm else nn.Identity(), nn.Linear(4, 1))
        self.lr = lr
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        self.seen.extend(batch[1].tolist())
        loss = self.net(batch[0]).pow(2).mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch[0]).pow(2).mean(), sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return ordered_loader(self)

    def val_dataloader(self):
        return loader(self.batch_size)


def dataset(size: int = 16) -> TensorDataset:
    data = torch.randn(size, 4, generator=torch.Generator().manual_seed(5))
    return TensorDataset(data, torch.arange(size))


def loader(batch_size: int = 4) -> DataLoader:
    return DataLoader(dataset(), batch_size=batch_size)


def ordered_loader(module) -> DataLoader:
    """Return training data that is split between the ranks in order, so that ranks together see what one would see."""
    trainer, data = module.trainer, dataset(module.size)
    sampler = DistributedSampler(data, num_replicas=trainer.world_size, rank=trainer.global_rank, shuffle=False)
    return DataLoader(data, batch_size=module.batch_size, sampler=sampler)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}
