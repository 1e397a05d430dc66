"""The feed knows which batch is the last."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from levin import LightningModule, Trainer
from levin.data.feed import with_end


class Numbers(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(1.0, 6.0).reshape(5, 1))


class Steps(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        self.steps: list[int] = []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def on_before_optimizer_step(self, optimizer):
        self.steps.append(self.trainer.fit_loop.batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("limit", [3, 6, 1.0])
def test_the_last_window_of_a_stream_that_ends_before_the_limit_is_stepped(limit):
    module = Steps()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=limit, accumulate_grad_batches=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Numbers(), batch_size=1))
    assert module.steps == ([2] if limit == 3 else [2, 4]) * 2


def test_nothing_is_fetched_beyond_the_limit():
    fetched = iter(range(9))
    assert list(with_end(fetched, 3)) == [(0, False), (1, False), (2, True)]
    assert next(fetched) == 3
    assert list(with_end(iter(range(2)), 3)) == [(0, False), (1, True)]
    assert list(with_end(iter(()), 3)) == [] == list(with_end(fetched, 0))
