"""What must be the same on all ranks is compared: settings before the first batch, weights after the first step."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from levin import LightningModule, Trainer
from levin.callbacks import (
    BackboneFinetuning,
    BadStepGuard,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
)
from levin.ranks.same_everywhere import AlikeCheck, check_logged_name, check_logged_names, fingerprint
from levin.strategies import DDPStrategy, SingleDeviceStrategy
from levin.utilities.warnings import PossibleUserWarning
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small, loader

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
    for mine, message in (
        (
            [[ModelCheckpoint(every_n_train_steps=2)], []][rank],
            "callbacks that save=ModelCheckpoint.*2.* on rank 0 and .*0.* on rank 1",
        ),
        (
            [ModelCheckpoint(), *[ModelCheckpoint(monitor="v")][:rank]],
            "on rank 0 and ModelCheckpoint.*, ModelCheckpoint.* on rank 1",
        ),
        ([ModelCheckpoint(monitor=["a", "b"][rank])], "'monitor': 'a'.* on rank 0 and .*'monitor': 'b'"),
    ):
        trainer = Trainer(**{**ONCE, "enable_checkpointing": True}, callbacks=mine, strategy="ddp")
        with pytest.raises(ValueError, match=message):
            trainer.fit(Small())
    trainer = Trainer(**ONCE, strategy="ddp")
    # A limit that was changed afterwards counts.
    trainer.fit_loop.max_epochs = 1 + rank
    with pytest.raises(ValueError, match=r"max_epochs=1 on rank 0 and 2 on rank 1"):
        trainer.fit(Small())
    Trainer(**ONCE, strategy="ddp").fit(Small())


ON_ALL_RANKS = (
    EarlyStopping("loss"), GradientAccumulationScheduler({1: 2}), StochasticWeightAveraging(1e-2), BackboneFinetuning(),
    ModelPruning("l1_unstructured", amount=0.5), SpikeDetection(), BadStepGuard(), LearningRateFinder(),
)  # fmt: skip


@world_size(2)
def test_callbacks_and_validation_that_one_rank_lacks_are_named_before_the_first_batch():
    rank = dist.get_rank()
    for callback in ON_ALL_RANKS:
        trainer = Trainer(**ONCE, callbacks=[callback][rank:], strategy="ddp")
        name = type(callback).__name__
        with pytest.raises(ValueError, match=f"callbacks that stop or change training={name}.* on rank 0 and none on"):
            trainer.fit(Small())
    for having in (0, 1):
        message = rf"validation in fit={having == 0} on rank 0 and {having == 1} on rank 1"
        with warnings.catch_warnings(), pytest.raises(ValueError, match=message):
            warnings.filterwarnings("ignore", ".*have no `val_dataloader`")
            trainer = Trainer(**ONCE | {"limit_val_batches": 1.0}, strategy="ddp")
            trainer.fit(WithoutValidation(), None, loader(2) if rank == having else None)
    # One that only looks may be on a rank alone.
    model = Small()
    Trainer(**ONCE, callbacks=[LambdaCallback(on_train_start=lambda *_: None)][rank:], strategy="ddp").fit(model)
    assert model.seen


class WithoutValidation(Small):
    val_dataloader = LightningModule.val_dataloader


class Optimizing(Small):
    """Trains by the optimizers of classes."""

    def __init__(self, *kinds) -> None:
        super().__init__()
        self.kinds = kinds
        self.automatic_optimization = len(kinds) < 2

    def configure_optimizers(self):
        return [kind(self.parameters(), lr=0.1) for kind in self.kinds]


@world_size(2)
def test_optimizers_of_other_classes_are_named_before_the_first_batch():
    sgd, adam, lbfgs = torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS
    for ranks, message in (
        ([[sgd], [lbfgs]], "SGD on rank 0 and LBFGS on rank 1"),
        ([[adam], [sgd]], "Adam on rank 0 and SGD on rank 1"),
        ([[sgd, sgd], [sgd]], "SGD, SGD on rank 0 and SGD on rank 1"),
    ):
        model = Optimizing(*ranks[dist.get_rank()])
        with pytest.raises(ValueError, match=f"the same optimizers, received classes={message}"):
            Trainer(**ONCE, strategy="ddp").fit(model)
        assert model.seen == []


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


def test_what_must_be_alike_is_shown_as_numbers_and_told_once():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    copies = [parameter]
    run = SimpleNamespace(
        fn="fit", global_step=0, module=None, optimizers=[optimizer], agreement=None,
        store=SimpleNamespace(order=SimpleNamespace(number=5)),
        strategy=SimpleNamespace(copied_parameters=lambda module: copies),
    )  # fmt: skip
    alike = AlikeCheck(run)
    before = alike.numbers()
    assert before[0] == 0.0 and before[2] == 5
    run.global_step = 1
    shown = alike.numbers()
    assert shown[0] == fingerprint(copies) != 0.0
    # The number of parameters is compared where each process has all of them.
    assert shown[1] != before[1]
    assert alike.numbers() == [0.0, shown[1], 5]
    optimizer.param_groups[0]["lr"] = 0.2
    changed = alike.numbers()[1]
    assert changed != shown[1]
    for lr in (0.3, 0.4):
        optimizer.param_groups[0]["lr"] = torch.tensor(lr)
        assert alike.numbers()[1] != changed
    tensors = alike.numbers()[1]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert alike.numbers()[1] == tensors
    copies.clear()
    assert AlikeCheck(run).numbers()[0] == fingerprint([]) == 0.0
    run.fn, copies[:] = "validate", [parameter]
    assert AlikeCheck(run).numbers()[0] == 0.0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alike.compare([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [3.0, 3.0, 3.0])
        for _ in range(2):
            alike.compare([1.0, 2.0, 1.0], [2.0, 2.0, 4.0], [3.0, 4.0, 3.0])
    drift = (
        "After the first step the weights differ: those of ranks 0, 2, those of rank 1. The gradients were not averaged over the "
        "ranks, or something steps or draws differently on each. If this is intended, leave it so; otherwise look for no_sync, for "
        "backward passes outside of manual_backward, and for weights that are made anew during training."
    )
    rates = (
        "The optimizers differ in learning rates or parameters: those of ranks 0, 1, those of rank 2. With these the weights drift "
        "apart. Decide by what is the same on all ranks, as values that were logged with sync_dist=True."
    )
    # Weights are shown once, and so they are told.
    assert [(str(each.message), each.category) for each in caught] == [
        (text, PossibleUserWarning) for text in (drift, rates, drift)
    ]


def logged(*ways, numbers=None, steps=()):
    """Compare what ranks have logged, the ways of each as a dict, and return the message, or what was put first."""
    strategy = DDPStrategy()
    numbers = numbers or [0] * len(ways)
    steps = steps or [[]] * len(ways)
    strategy.control = SimpleNamespace(exchange_objects=lambda own, what: list(zip(ways, numbers, steps, strict=True)))
    first = []
    store = SimpleNamespace(
        collective_keys=dict, order=SimpleNamespace(number=0), names_in_steps=list, put_first=first.append
    )
    try:
        check_logged_names(SimpleNamespace(agreement=object(), strategy=strategy, store=store))
    except RuntimeError as error:
        return str(error)
    return first


def test_logged_names_that_differ_are_told_by_hook_and_rank():
    loss, other = ("training_step", "loss", 0), ("on_train_epoch_end", "a", None)
    assert logged({loss: "mean"}, {loss: "mean"}) == [{loss: "mean"}]
    assert logged({loss: "mean"}, {loss: "mean", other: "sum"}, {}) == (
        "self.log('a', ...), which is reduced over all ranks, was called in on_train_epoch_end on rank 1 and not on ranks 0, 2. "
        "Call it on all ranks in every epoch, or with sync_dist=False."
    )
    assert logged({loss: "mean"}, {loss: "sum"}, {loss: "mean"}) == (
        "self.log('loss', ...), which is reduced over all ranks, was called in training_step on all ranks, with mean on ranks 0, 2 "
        "and sum on rank 1. Log the same on all ranks."
    )
    assert logged({}, {}, {}, numbers=[1, 2, 1], steps=[["a", "b", "a"], ["b", "a"], []]) == (
        "self.log(..., sync_dist=True) reduces the values of steps in the order of its calls, which was not the same on all ranks, "
        "so that values of several names were mixed. Logged were 'a', 'b' on rank 0 and 'b', 'a' on rank 1 and nothing on rank 2. "
        "Log the same names in the same order on all ranks, or with on_step=False."
    )


def test_a_name_that_is_logged_in_a_step_is_compared_before_it_is_reduced():
    asked, strategy = [], DDPStrategy()
    found = ["'a' in training_step"] * 2
    strategy.control = SimpleNamespace(exchange_objects=lambda own, what: asked.append((own, what)) or found)
    check_logged_name(strategy, "training_step", "a")
    assert asked == [("'a' in training_step", "values of steps")]
    found[1] = "'b' in training_step"
    with pytest.raises(RuntimeError) as told:
        check_logged_name(strategy, "training_step", "a")
    assert str(told.value) == (
        "self.log(..., sync_dist=True) reduces the values of steps in the order of its calls, which is not the same on all ranks, "
        "received 'a' in training_step on rank 0 and 'b' in training_step on rank 1. Log the same names in the same order on all "
        "ranks, or with on_step=False."
    )
    check_logged_name(SingleDeviceStrategy("cpu"), "training_step", "a")
    assert len(asked) == 2
