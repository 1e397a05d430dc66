"""A run that fails in the first batch of an epoch, when the loader has drawn its order and no batch is done with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.callbacks import OnExceptionCheckpoint
from tests.data.loaders_for_tests import Augmented, as_is

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings(
        "ignore:This DataLoader will create", "ignore:.*does not have many workers", "ignore:.*there is no last"
    ),
]
NUM_BATCHES = 6


class Stop(Exception):
    pass


class Model(LightningModule):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
        self.fails_at, self.seen = fails_at, []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fails_at:
            raise Stop
        self.seen.append((self.global_step, batch_idx, batch))
        return self.net(torch.tensor(batch)).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


def fit(model: Model, num_workers: int, folder: Path, ckpt_path: Any = None) -> None:
    torch.manual_seed(2)
    data = DataLoader(
        Augmented(size=2 * NUM_BATCHES), batch_size=2, shuffle=True, collate_fn=as_is, num_workers=num_workers
    )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder), callbacks=[OnExceptionCheckpoint(folder)],
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt_path)


@pytest.mark.parametrize("fails_at", [0, NUM_BATCHES])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_epoch_begins_again_in_the_same_order(tmp_path, num_workers, fails_at):
    models = [Model(), Model(fails_at), Model(fails_at), Model()]
    fit(models[0], num_workers, tmp_path)
    for model, path in ((models[1], None), (models[2], tmp_path / "on_exception.ckpt")):  # also when it fails twice
        with pytest.raises(Stop):
            fit(model, num_workers, tmp_path, path)
    fit(models[3], num_workers, tmp_path, tmp_path / "on_exception.ckpt")
    assert models[3].seen == models[0].seen[fails_at:]
    expected = models[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in models[3].state_dict().items())
