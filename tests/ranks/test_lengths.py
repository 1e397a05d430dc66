"""Loaders on several ranks whose length is not the number of their batches, and ranks that have none."""

from __future__ import annotations

import os
import warnings

import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

from levin import LightningModule, Trainer
from levin.utilities.warnings import PossibleUserWarning
from tests.distributed import world_size
from tests.strategies.small import QUIET


class Lying:
    def __init__(self, says: int, gives: int) -> None:
        self.says, self.gives = says, gives

    def __len__(self) -> int:
        return self.says

    def __iter__(self):
        return iter([torch.full((2, 4), float(index)) for index in range(self.gives)])


class LyingSampler(Sampler):
    def __len__(self) -> int:
        return 20

    def __iter__(self):
        return iter(range(12))


def lying_loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.ones(20, 4)), batch_size=2, sampler=LyingSampler())


class Model(LightningModule):
    def __init__(self, **how) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.how, self.seen = torch.nn.Linear(4, 1), how, []

    def training_step(self, batch, batch_idx):
        self.seen.append(("train", batch_idx))
        loss = self.layer(batch[0] if isinstance(batch, list) else batch).pow(2).mean()
        self.log("loss", loss, on_step=False, on_epoch=True, **self.how)
        return loss

    def validation_step(self, batch, batch_idx):
        self.seen.append(("val", batch_idx))
        self.log("val", self.layer(batch).mean(), **self.how)

    def on_train_epoch_end(self):
        self.seen.append(("end", self.trainer.is_last_batch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def fit(train, val=None, **how):
    module = Model(**how)
    trainer = Trainer(
        **{
            **QUIET,
            "strategy": "ddp",
            "devices": int(os.environ["WORLD_SIZE"]),
            "max_epochs": 2,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
        }
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, train, val)
    return trainer, module, [str(each.message) for each in caught if issubclass(each.category, UserWarning)], caught


@world_size(2, connect=False)
def test_the_end_of_the_data_is_the_end_of_the_epoch():
    is_first = os.environ["RANK"] == "0"
    for train in (Lying(5, 3), lying_loader()):
        trainer, module, told, _ = fit(train, sync_dist=True)
        steps = [("train", 0), ("train", 1), ("train", 2), ("end", True)]
        assert module.seen == steps * 2, module.seen
        assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 * 0.1**2
        assert sum("ended after 3 batches" in text for text in told) == is_first, told
    # One rank alone ends early: the others go on, and it with them.
    trainer, module, told, _ = fit(Lying(5, 3 if is_first else 5), sync_dist=True)
    assert trainer.global_step == 10
    assert sum("ended after 3 batches" in text for text in told) == is_first, told
    # In validation as well; a length that is too short is the end.
    trainer, module, told, _ = fit(Lying(2, 3), Lying(4, 2), sync_dist=True)
    assert module.seen == [("train", 0), ("train", 1), ("val", 0), ("val", 1), ("end", True)] * 2
    assert sum("ended after 2 batches" in text for text in told) == is_first, told


@world_size(2, connect=False)
def test_a_rank_without_batches_takes_part_and_has_no_values_of_its_own():
    is_first = os.environ["RANK"] == "0"
    for flag in (False, True):
        trainer, module, *_ = fit(Lying(*[3 * is_first] * 2), Lying(*[2 * is_first] * 2))
        assert trainer.global_step == 6 and ("end", True) in module.seen
        assert set(trainer.callback_metrics) == ({"loss", "val"} if is_first else set())
        weight = trainer.strategy.all_gather(module.layer.weight.detach())
        assert torch.equal(weight[0], weight[1])
        trainer, module, *_ = fit(Lying(*[3 * is_first] * 2), Lying(*[2 * is_first] * 2), sync_dist=True)
        values = trainer.strategy.all_gather(trainer.callback_metrics["val"])
        assert values[0] == values[1] and values.isfinite().all()


@world_size(2, connect=False)
def test_an_epoch_value_that_is_not_synced_is_pointed_out():
    for how, wanted in ({}, {"loss", "val"}), ({"sync_dist": True}, set()), ({"rank_zero_only": True}, set()):
        *_, caught = fit([torch.ones(2, 4)] * 2, [torch.ones(2, 4)], **how)
        told = {
            name
            for each in caught
            for name in ("loss", "val")
            if each.category is PossibleUserWarning and f"'{name}', ..., sync_dist=True" in str(each.message)
        }
        assert told == (wanted if os.environ["RANK"] == "0" else set())


@world_size(1, connect=False)
def test_the_epoch_value_of_one_process_needs_no_sync():
    *_, caught = fit([torch.ones(2, 4)] * 2, [torch.ones(2, 4)])
    assert not [each for each in caught if "sync_dist" in str(each.message)]
