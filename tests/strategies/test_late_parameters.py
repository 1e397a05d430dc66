"""Parameters that come to learn during training are averaged over the processes as those that learned from the start."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from levin import Fabric, LightningModule, Trainer
from levin.callbacks import BaseFinetuning
from levin.strategies import DDPStrategy
from tests.distributed import world_size
from tests.strategies.small import QUIET

STRATEGIES = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
}


class TwoLayers(LightningModule):
    """A frozen layer and one that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        for number, parameter in enumerate(self.parameters(), 1):
            nn.init.constant_(parameter, 0.1 * number)
        self.first.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x))).square().mean()

    def training_step(self, batch, batch_idx):
        return self(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ThawsInAnEpochsStart(TwoLayers):
    def on_train_epoch_start(self):
        self.first.requires_grad_(self.current_epoch > 0)


class ThawsInTheStep(TwoLayers):
    def training_step(self, batch, batch_idx):
        self.first.requires_grad_(batch_idx > 0 or self.current_epoch > 0)
        return self(batch)


class ThawsByHand(ThawsInAnEpochsStart):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self(batch))
        optimizer.step()


class ThawsInTheStepByHand(ThawsByHand):
    on_train_epoch_start = LightningModule.on_train_epoch_start

    def training_step(self, batch, batch_idx):
        self.first.requires_grad_(batch_idx > 0 or self.current_epoch > 0)
        super().training_step(batch, batch_idx)


class GetsALayer(TwoLayers):
    """Gets its layer from the random numbers of each process."""

    def __init__(self) -> None:
        super().__init__()
        self.added = nn.Identity()

    def forward(self, x):
        return super().forward(self.added(x))

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            torch.manual_seed(self.global_rank)
            self.added = nn.Linear(4, 4)
            self.trainer.optimizers[0].add_param_group({"params": list(self.added.parameters())})


class Finetuned(TwoLayers):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def configure_callbacks(self):
        return [Finetuning()]


class Finetuning(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.first)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.first, optimizer)


def batches() -> torch.Tensor:
    return torch.randn(4, 8, 4, generator=torch.Generator().manual_seed(0))


def train(module: LightningModule, data: torch.Tensor, **kwargs) -> None:
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": False, "max_epochs": 2, "use_distributed_sampler": False, **kwargs}
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


KINDS = [ThawsInAnEpochsStart, ThawsInTheStep, ThawsByHand, ThawsInTheStepByHand, GetsALayer, Finetuned]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in ("plain", "static")]
    + [(kind, name) for kind in (ThawsInTheStep, GetsALayer) for name in ("unused", "views")],
)
@world_size(2, connect=False)
def test_parameters_that_come_to_learn_learn_on_two_processes_as_on_one(kind, name):
    rank = int(os.environ["RANK"])
    ours, theirs = kind(), kind()
    # Thawed in the middle of a window in one kind, at the begin of one in others.
    settings = {"accumulate_grad_batches": 2 if theirs.automatic_optimization else 1}
    train(ours, batches()[:, rank::2], devices=2, strategy=DDPStrategy(**STRATEGIES[name]), **settings)
    train(theirs, batches(), devices=1, **settings)
    learned = getattr(theirs, "added", theirs.first)
    assert all(parameter.grad is not None for parameter in learned.parameters())
    assert_same(ours, theirs)


@pytest.mark.parametrize("is_compiled", [False, True])
@world_size(2, connect=False)
def test_parameters_that_come_to_learn_in_a_loop_of_ones_own_are_averaged(is_compiled):
    rank = int(os.environ["RANK"])
    trained = []
    for devices, data in ((2, batches()[:, rank::2]), (1, batches())):
        fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices == 2 else "auto")
        fabric.launch()
        plain = TwoLayers()
        given = torch.compile(plain, backend="eager") if is_compiled else plain
        module, optimizer = fabric.setup(given, torch.optim.SGD(plain.parameters(), lr=0.1))
        for number, batch in enumerate(data):
            plain.first.requires_grad_(number > 1)
            fabric.backward(module(batch))
            optimizer.step()
            optimizer.zero_grad()
        trained.append(plain)
    assert not torch.equal(trained[1].first.weight, TwoLayers().first.weight)
    assert_same(*trained)
