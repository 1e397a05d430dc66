"""When a BasePredictionWriter writes, and how it says so."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.callbacks import BasePredictionWriter


class Identity(LightningModule):
    def predict_step(self, batch, batch_idx):
        return batch * 2


class Recorder(BasePredictionWriter):
    def __init__(self, write_interval):
        super().__init__(write_interval)
        self.written = []

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        self.written.append(("batch", batch_idx, list(batch_indices)))

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        self.written.append(("epoch", len(predictions), [list(map(list, part)) for part in batch_indices]))


@pytest.mark.parametrize("interval", ["batch", "epoch", "batch_and_epoch"])
def test_what_is_written_and_what_the_interval_answers(interval):
    writer = Recorder(interval)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[writer]
    )
    trainer.predict(Identity(), DataLoader(torch.arange(4.0), batch_size=2), return_predictions=False)
    batches = [("batch", 0, [0, 1]), ("batch", 1, [2, 3])] if "batch" in interval else []
    epochs = [("epoch", 2, [[[0, 1], [2, 3]]])] if "epoch" in interval else []
    assert writer.written == batches + epochs
    # Packages that override the hooks ask the interval itself.
    assert (writer.interval.on_batch, writer.interval.on_epoch) == ("batch" in interval, "epoch" in interval)
    assert writer.interval == interval and str(writer.interval) == interval


def test_predictions_of_an_epoch_wait_on_the_cpu():
    class Moved:
        def to(self, device, **options):
            return str(device)

    class Net(Identity):
        def predict_step(self, batch, batch_idx):
            return Moved()

    class Keeper(BasePredictionWriter):
        def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
            self.kept = predictions

    keeper = Keeper("epoch")
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[keeper]
    )
    trainer.predict(Net(), DataLoader(torch.arange(4.0), batch_size=2), return_predictions=False)
    assert keeper.kept == ["cpu", "cpu"]


def test_an_unknown_interval_is_an_error():
    with pytest.raises(ValueError, match="must be 'batch', 'epoch' or 'batch_and_epoch', received 'step'"):
        Recorder("step")


@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("returns", [None, False])
def test_the_loop_has_the_predictions_during_the_epoch_and_after_it(num_loaders, returns):
    seen = []

    class Net(Identity):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return batch * 2

        def on_predict_epoch_end(self):
            seen.append(self.trainer.predict_loop.predictions)

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    assert trainer.predict_loop.predictions == []
    loaders = [DataLoader(torch.arange(4.0), batch_size=2)] * num_loaders
    given = trainer.predict(Net(), loaders if num_loaders > 1 else loaders[0], return_predictions=returns)
    kept = [] if returns is False else [0.0, 2.0, 4.0, 6.0]
    for predictions in (seen[0], trainer.predict_loop.predictions):
        parts = predictions if num_loaders > 1 else [predictions]
        assert [torch.cat(part).tolist() if part else [] for part in parts] == [kept] * num_loaders
    assert given is (None if returns is False else seen[0])
