"""What is wrong in a module is said with the value received, before or at the place where it matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import levin


def sgd(module: Any) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def scheduled(module: Any, **keys: Any) -> dict[str, Any]:
    optimizer = sgd(module)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), **keys},
    }


WRONG: dict[str, tuple[str, Any, str]] = {
    "loss_is_a_number": ("training_step", lambda self, batch: 1.5, r"must return a tensor .* received float"),
    "no_loss": ("training_step", lambda self, batch: {"a": 1}, r"under 'loss', received keys \['a'\]\. Return None"),
    "loss_is_none": ("training_step", lambda self, batch: {"loss": None}, r"tensor under 'loss', received None\. Return None"),
    "optimizer_idx": ("training_step", lambda self, batch, batch_idx, optimizer_idx: None, r"optimizer_idx.*manual optimization"),
    "no_arguments": ("training_step", lambda: None, r"at least the batch, received.*Write `def training_step"),
    "no_optimizer": ("configure_optimizers", lambda self: 3, r"must return an optimizer.*received 3"),
    "two_optimizers": ("configure_optimizers", lambda self: [sgd(self), sgd(self)], r"received 2\. Set `self.automatic_optimization"),
    "interval": ("configure_optimizers", lambda self: scheduled(self, interval="batch"), r"'epoch' or 'step', received 'batch'"),
    "frequency": ("configure_optimizers", lambda self: scheduled(self, frequency=0), r"int >= 1, received 0"),
    "closure": ("optimizer_step", lambda self, *args: None, r"did not run `optimizer_closure`.*Call `optimizer.step"),
    "callbacks": ("configure_callbacks", lambda self: 3, r"must return a callback or a list of callbacks, received 3"),
    "loader": ("train_dataloader", lambda self: None, r"must return a loader, received None\. Return \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_hook_is_told_with_what_it_gave(name):
    hook, function, message = WRONG[name]

    class Model(levin.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch):
            return self.layer(batch).mean()

        def train_dataloader(self):
            return DataLoader(torch.ones(4, 4), batch_size=2)

        def configure_optimizers(self):
            return sgd(self)

    setattr(Model, hook, staticmethod(function) if name == "no_arguments" else function)
    trainer = levin.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        trainer.fit(Model())
