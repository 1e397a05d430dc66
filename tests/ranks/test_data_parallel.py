"""Ranks that see the same data, as in tensor parallelism, count once: what has to do with data asks for the data-parallel group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from levin import LightningModule, Trainer
from levin.strategies import DDPStrategy
from levin.strategies.data_parallel import DataParallelGroup
from tests.distributed import world_size
from tests.strategies.small import QUIET


class Paired(DDPStrategy):
    """Two and two processes see the same data: (0, 1) the first half, (2, 3) the second."""

    @property
    def data_parallel(self) -> DataParallelGroup:
        rank = self.global_rank
        if not dist.is_initialized():
            return DataParallelGroup(rank // 2, self.world_size // 2)
        if getattr(self, "_pair", None) is None:
            groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
            self._pair = groups[rank % 2]
        return DataParallelGroup(rank // 2, 2, self._pair, (rank % 2, 2 + rank % 2))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[int] = []
        self.logged: list[float] = []

    def training_step(self, batch, batch_idx):
        (x,) = batch
        self.seen.extend(int(value) for value in x[:, 0])
        self.log("mean", x.mean(), sync_dist=True, on_step=True)
        self.log("sum", x.sum(), sync_dist=True, on_step=True, reduce_fx="sum")
        return {"loss": self.layer(x / 10).pow(2).mean(), "weight": len(x)}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = self.trainer.callback_metrics
        self.logged.append((metrics["mean"].item(), metrics["sum"].item()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(size: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(size))[:, None]), batch_size=2)


@world_size(4)
def test_ranks_that_see_the_same_data_count_once():
    model = Model()
    trainer = Trainer(max_epochs=1, devices=4, strategy=Paired(), **QUIET)
    trainer.fit(model, data(8))
    # The samples go to two parts, not to four.
    halves = [None] * 4
    dist.all_gather_object(halves, sorted(model.seen))
    assert halves[0] == halves[1]
    assert halves[2] == halves[3]
    assert sorted(halves[0] + halves[2]) == list(range(8))
    # A sum over ranks counts each sample once.
    assert sum(total for _, total in model.logged) == pytest.approx(sum(range(8)))


@world_size(4)
def test_uneven_loaders_end_together_where_pairs_see_the_same():
    rank = dist.get_rank()

    class Uneven(Model):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.ones(2 + 4 * (rank // 2), 1)), batch_size=2)

    model = Uneven()
    trainer = Trainer(max_epochs=1, devices=4, strategy=Paired(), use_distributed_sampler=False, **QUIET)
    trainer.fit(model)
    assert trainer.global_step == 3
    weights = [None] * 4
    dist.all_gather_object(weights, model.layer.weight.item())
    assert len(set(weights)) == 1
