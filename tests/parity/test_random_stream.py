"""A seeded run draws the same numbers as Lightning: what levin does in between takes none, or the same.

Hooks that draw between two loaders are the exception: Lightning begins to iterate before ``on_train_start`` and
``on_validation_start``, levin after ``on_train_epoch_start`` and ``on_validation_epoch_start``.
"""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from tests.parity import trace


def drawn() -> tuple[float, float, float]:
    return torch.rand(1).item(), random.random(), float(numpy.random.rand())


@pytest.mark.parametrize("summary", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_seeded_run_draws_the_same_numbers(tmp_path, summary, shuffle, sanity, num_workers):
    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
                self.example_input_array = torch.ones(2, 4)

            def forward(self, x):
                # As models do that sample, also in evaluation.
                return self.layer(x + torch.rand(2, 4) + random.random())

            def training_step(self, batch, batch_idx):
                seen.note("train", batch_idx, batch, *drawn())
                return self(batch).sum()

            def validation_step(self, batch, batch_idx):
                seen.note("val", batch_idx, batch, *drawn())

            def on_fit_start(self):
                seen.note("on_fit_start", *drawn())

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.01)

        seen.framework.module.seed_everything(3)
        data = torch.arange(16.0).reshape(4, 4)
        loaders = [DataLoader(data, batch_size=2, shuffle=s, num_workers=num_workers) for s in (shuffle, False)]
        seen.trainer(max_epochs=2, enable_model_summary=summary, num_sanity_val_steps=sanity).fit(Model(), *loaders)
        seen.note("after", *drawn())

    trace.same(code, tmp_path)
