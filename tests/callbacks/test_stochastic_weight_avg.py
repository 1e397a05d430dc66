"""StochasticWeightAveraging gives back what it changed; its numbers stand beside Lightning's in tests/parity."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.callbacks import StochasticWeightAveraging


def test_batch_norms_have_their_momenta_again_after_an_average():
    class Normed(LightningModule):
        def __init__(self):
            super().__init__()
            self.norms = torch.nn.Sequential(
                torch.nn.BatchNorm1d(1, momentum=0.3), torch.nn.BatchNorm1d(1, momentum=None)
            )
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(self.norms(batch)).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Normed()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=3,
        enable_model_summary=False, callbacks=[StochasticWeightAveraging(0.1, swa_epoch_start=1)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(8, 1), batch_size=4))
    assert [norm.momentum for norm in module.norms] == [0.3, None]
