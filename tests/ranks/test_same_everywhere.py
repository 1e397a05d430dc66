"""What must be the same on all ranks is compared: settings before the first batch, weights after the first step."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from levin import Trainer
from levin.ranks.same_everywhere import fingerprint
from levin.strategies import DDPStrategy
from levin.utilities.warnings import PossibleUserWarning
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small

ONCE = {**QUIET, "devices": 2, "max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0}


@world_size(2)
def test_settings_that_differ_are_named_before_the_first_batch():
    rank = dist.get_rank()
    for mine, message in (
        ({"max_epochs": 2 + rank}, r"max_epochs=2 on rank 0 and 3 on rank 1"),
        ({"accumulate_grad_batches": 1 + rank}, r"accumulate_grad_batches=1 on rank 0 and 2 on rank 1"),
        (
            {"max_steps": [-1, 3][rank], "limit_train_batches": [1.0, 2][rank]},
            r"limit_train_batches=1.0 on .*; max_steps=-1",
        ),
    ):
        model = Small()
        trainer = Trainer(**{**ONCE, **mine}, strategy="ddp")
        with pytest.raises(ValueError, match=f"All ranks must have the same settings, received .*{message}"):
            trainer.fit(model)
        assert model.seen == []
    trainer = Trainer(**ONCE, strategy="ddp")
    # A limit that was changed afterwards counts.
    trainer.fit_loop.max_epochs = 1 + rank
    with pytest.raises(ValueError, match=r"max_epochs=1 on rank 0 and 2 on rank 1"):
        trainer.fit(Small())
    Trainer(**ONCE, strategy="ddp").fit(Small())


class Manual(Small):
    """Steps by hand, with the gradients of all ranks or with its own alone."""

    def __init__(self, is_alone: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.is_alone = is_alone

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.net(batch[0]).pow(2).mean()
        with self.trainer.strategy.block_backward_sync() if self.is_alone else nullcontext():
            self.manual_backward(loss)
        optimizer.step()


@world_size(2)
def test_ranks_that_drift_apart_are_told_after_the_first_step_and_once():
    rank = dist.get_rank()
    for settings in ({}, {"static_graph": True}):
        model = Manual(is_alone=False)
        Trainer(**ONCE, strategy=DDPStrategy(**settings)).fit(model)
        weights = [torch.empty_like(model.net[1].weight) for _ in range(2)]
        dist.all_gather(weights, model.net[1].weight.detach())
        assert torch.equal(*weights)
    expected = pytest.warns(PossibleUserWarning, match=r"weights differ: those of rank 0, those of rank 1")
    with expected if rank == 0 else nullcontext() as caught:
        Trainer(**{**ONCE, "max_epochs": 3}, strategy="ddp").fit(Manual(is_alone=True))
    assert rank == 1 or len(caught) == 1


def rate_of_rank(module):
    module.optimizers().param_groups[0]["lr"] = 0.1 * (1 + module.global_rank)


def plateau_by_hand(module):
    # What a rank alone has rises on rank 1 and falls on rank 0.
    module.lr_schedulers().step(float(module.current_epoch * (1 if module.global_rank else -1)))


def parameters_of_rank(module):
    if module.current_epoch == 1 and module.global_rank == 1:
        module.optimizers().param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(1)))


def the_same(module):
    module.optimizers().param_groups[0]["lr"] = 0.1 / (1 + module.current_epoch)


class StepsByHand(Manual):
    """Does something to its optimizer at the end of each epoch."""

    def __init__(self, act) -> None:
        super().__init__(is_alone=False)
        self.act = act

    def on_train_epoch_end(self):
        self.act(self)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)]


@world_size(2)
def test_optimizers_that_differ_are_told_once():
    for act, is_told in ((rate_of_rank, 1), (plateau_by_hand, 1), (parameters_of_rank, 1), (the_same, 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Trainer(**{**ONCE, "max_epochs": 5}, strategy="ddp").fit(StepsByHand(act))
        told = [str(each.message) for each in caught if "The optimizers differ in" in str(each.message)]
        assert len(told) == (is_told if dist.get_rank() == 0 else 0), (act, told)
        assert all("those of rank 0, those of rank 1" in text for text in told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.int8])
def test_the_smallest_difference_shows(dtype):
    value = torch.arange(1.0, 7.0).to(dtype).view(2, 3)
    other = value.clone()
    assert fingerprint([value, value]) == fingerprint([other, other])
    assert fingerprint([value.T]) == fingerprint([value.T.contiguous()])
    real = torch.view_as_real(other) if dtype.is_complex else other
    bits = real.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])
    bits.view(-1)[3] += 1
    assert fingerprint([value, value]) != fingerprint([value, other])
    assert fingerprint([other, value]) != fingerprint([value, other])
