"""A name that is logged in another way in a later epoch, or with another metric object: no epoch's value is lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader

from levin import Callback, LightningModule, Trainer

NUMBERS = [1.0, 3.0, 8.0]


class Values(Callback):
    """Keeps the epoch's values as they are read after each epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_start(self, trainer, pl_module):
        self.trainer = trainer

    def on_train_epoch_start(self, trainer, pl_module):
        self.keep()

    def on_train_end(self, trainer, pl_module):
        self.keep()

    def keep(self) -> None:
        values = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        if values:
            self.seen.append(values)


class Model(LightningModule):
    """Logs in training or validation what ``log(module, number, batch_idx)`` does."""

    def __init__(self, stage: str, log: Any) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.stage, self.log_number = stage, log

    def training_step(self, batch, batch_idx):
        if self.stage == "train":
            self.log_number(self, NUMBERS[batch_idx] + 10 * self.current_epoch, batch_idx)
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        if self.stage == "validation":
            self.log_number(self, NUMBERS[batch_idx] + 10 * self.current_epoch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(tmp_path: Any, stage: str, log: Any, sanity: int = 0) -> list[dict[str, float]]:
    data, values = DataLoader(torch.ones(3, 1)), Values()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=sanity, callbacks=[values],
    )  # fmt: skip
    trainer.fit(Model(stage, log), data, data)
    return values.seen


@pytest.mark.parametrize("sanity", [0, 2])
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_a_metric_made_anew_in_each_epoch_gives_the_value_of_each(tmp_path, stage, sanity):
    def log(module, number, batch_idx):
        if batch_idx == 0:
            module.mean = torchmetrics.MeanMetric()
        module.mean.update(number)
        module.log("m", module.mean, on_step=False, on_epoch=True)

    assert run(tmp_path, stage, log, sanity) == [{"m": 4.0}, {"m": 14.0}]


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_another_metric_within_an_epoch_is_refused(tmp_path, stage):
    def log(module, number, batch_idx):
        module.mean = torchmetrics.MeanMetric()
        module.mean.update(number)
        module.log("m", module.mean, on_step=False, on_epoch=True)

    with pytest.raises(ValueError, match="received another MeanMetric in .*_step than before in this epoch"):
        run(tmp_path, stage, log)


@pytest.mark.parametrize("metric_first", [True, False])
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_a_number_in_one_epoch_and_a_metric_in_the_other(tmp_path, stage, metric_first):
    def log(module, number, batch_idx):
        if (module.current_epoch == 0) != metric_first:
            return module.log("m", number, on_step=False, on_epoch=True)
        if batch_idx == 0:
            module.mean = torchmetrics.MeanMetric()
        module.mean.update(number)
        return module.log("m", module.mean, on_step=False, on_epoch=True)

    assert run(tmp_path, stage, log) == [{"m": 4.0}, {"m": 14.0}]


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_another_reduction_in_another_epoch(tmp_path, stage):
    def log(module, number, batch_idx):
        module.log("v", number, on_step=False, on_epoch=True, reduce_fx="max" if module.current_epoch else "min")

    assert run(tmp_path, stage, log) == [{"v": 1.0}, {"v": 18.0}]


@pytest.mark.parametrize("stage", ["train", "validation"])
def test_another_reduction_within_an_epoch_is_refused(tmp_path, stage):
    def log(module, number, batch_idx):
        module.log("v", number, on_step=False, on_epoch=True, reduce_fx="max" if batch_idx else "min")

    with pytest.raises(ValueError, match="called twice in .*_step with different arguments"):
        run(tmp_path, stage, log)


def test_a_name_without_the_loaders_index_may_move_to_the_next_loader_in_another_epoch(tmp_path):
    class Moving(Model):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if dataloader_idx == self.current_epoch:
                self.log("v", float(dataloader_idx), add_dataloader_idx=False)

    data, values = DataLoader(torch.ones(2, 1)), Values()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[values],
    )  # fmt: skip
    trainer.fit(Moving("none", None), data, [data, data])
    assert values.seen == [{"v": 0.0}, {"v": 1.0}]
