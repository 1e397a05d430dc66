"""Ranks with different numbers of batches: they end together, and every sample counts once."""

from __future__ import annotations

import contextlib
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from levin import Callback, LightningModule, Trainer
from levin.ranks.uneven import Uneven
from levin.strategies import DDPStrategy
from tests.distributed import world_size
from tests.strategies.small import QUIET

Sizes = list[int]  # the size of every batch of one rank


def batches_of(rank: int, sizes: Sizes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(size, 4, generator=generator) for size in sizes]


class Stream(IterableDataset):
    """Batches of unknown number."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Known:
    """A loader of known length that is no DataLoader."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Net(LightningModule):
    def __init__(self, optimizer: str = "SGD", has_weight: bool = False, is_manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization = not is_manual
        self.net = nn.Linear(4, 1)
        self.optimizer = optimizer
        self.has_weight = has_weight
        self.mean = torchmetrics.MeanMetric()
        self.seen = torchmetrics.CatMetric()
        self.num_steps = 0

    def training_step(self, batch, batch_idx):
        self.num_steps += 1
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("count", len(batch), on_step=False, on_epoch=True, reduce_fx="sum", sync_dist=True)
        self.log("least", batch.min(), on_step=False, on_epoch=True, reduce_fx="min", sync_dist=True)
        self.mean(batch.mean(), weight=len(batch))
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.mean.compute()  # which it keeps
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss, "weight": len(batch)} if self.has_weight else loss

    def configure_optimizers(self):
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.05)


def expected(
    sizes: list[Sizes],
    optimizer: str,
    window: int = 1,
    has_weight: bool = False,
    num_steps: int | None = None,
    num_epochs: int = 1,
):
    """Return the weights and the mean loss that one process computes from the batches of all ranks, and the last step's."""
    module = Net(optimizer)
    stepper = module.configure_optimizers()
    data = [batches_of(rank, own) for rank, own in enumerate(sizes)]
    num_steps = max(map(len, sizes)) if num_steps is None else num_steps
    for place in range(0, num_epochs * num_steps, window):
        start = place % num_steps
        if start == 0:
            losses, counts = [], []
        stepper.zero_grad()
        held = [own[i] for i in range(start, min(start + window, num_steps)) for own in data if i < len(own)]
        weights = [len(batch) if has_weight else 1 for batch in held]
        for batch, weight in zip(held, weights):
            loss = module.net(batch).pow(2).mean()
            (loss * weight / sum(weights)).backward()
            losses.append(loss.detach() * len(batch))
            counts.append(len(batch))
        stepper.step()
    return module.net.state_dict(), torch.stack(losses).sum() / sum(counts), losses[-1] / counts[-1]


def ranked(**kwargs) -> Trainer:
    kwargs = {"strategy": DDPStrategy(uneven=kwargs.pop("uneven", "longest")), **kwargs}
    return Trainer(**{**QUIET, "devices": 2, "enable_checkpointing": False, "max_epochs": 1, **kwargs})


def loader_of(kind: str, sizes: list[Sizes]):
    own = batches_of(int(os.environ["RANK"]), sizes[int(os.environ["RANK"])])
    return Known(own) if kind == "known" else DataLoader(own if kind == "data" else Stream(own), batch_size=None)


@contextlib.contextmanager
def told_of_no_length():
    """Let a rank without data say so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned 0 length")
        yield


CASES = [
    # sizes of the batches of each rank, options of the Trainer, options of the module
    ([[2, 2, 2, 2, 2], [3, 3, 3]], {}, {}),
    ([[2] * 3, [2] * 13], {}, {"optimizer": "Adam"}),
    ([[], [2, 3]], {}, {}),
    ([[2, 1, 2, 2, 2], [3]], {"accumulate_grad_batches": 2}, {}),
    ([[2, 1, 2, 2, 2], [3]], {"accumulate_grad_batches": 3}, {"has_weight": True}),
    ([[2, 2, 2], [1]], {}, {"is_manual": True}),
    ([[2], [2, 1]], {"max_epochs": 2}, {}),
]


@pytest.mark.parametrize("kind", ["known", "stream"])
@world_size(2, timeout_s=120, connect=False)
def test_all_batches_are_trained_on_and_each_counts_once(kind):
    rank = int(os.environ["RANK"])
    for sizes, options, own in CASES:
        module = Net(**own)
        ends = []

        class Watch(Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                ends.append((batch_idx, trainer.is_last_batch))

        trainer = ranked(callbacks=[Watch()], **options)
        with told_of_no_length():
            trainer.fit(module, loader_of(kind, sizes))
        num_epochs = options.get("max_epochs", 1)
        weights, loss, last_loss = expected(
            sizes,
            own.get("optimizer", "SGD"),
            options.get("accumulate_grad_batches", 1),
            "has_weight" in own,
            num_epochs=num_epochs,
        )
        for ours, theirs in zip(module.net.state_dict().values(), weights.values(), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda text: f"{sizes} {options} {own}\n{text}")
        num_steps = max(map(len, sizes))
        assert ends == [(i, i == num_steps - 1) for i in range(num_steps)] * num_epochs
        if kind == "known":
            assert trainer.num_training_batches == num_steps
        metrics = trainer.callback_metrics
        torch.testing.assert_close(metrics["loss_epoch"], loss)
        everything = [batch for r, own_sizes in enumerate(sizes) for batch in batches_of(r, own_sizes)]
        assert metrics["count"] == sum(map(len, everything))
        assert metrics["least"] == torch.cat(everything).min()
        torch.testing.assert_close(metrics["mean"], torch.cat(everything).mean())
        # The last step's value is that of the ranks which had a batch.
        torch.testing.assert_close(metrics["loss_step"], last_loss)
        assert module.num_steps == num_steps * num_epochs
        assert rank in (0, 1)


@world_size(2, timeout_s=120, connect=False)
def test_the_shortest_rank_ends_the_epoch_where_that_is_asked_for():
    sizes = [[2] * 5, [2] * 3]
    for kind in ("data", "known", "stream"):
        module, ends = Net(), []
        module.on_train_batch_end = lambda *_: ends.append(trainer.is_last_batch)  # noqa: B023  # called in this round
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = ranked(uneven="shortest", max_epochs=2, use_distributed_sampler=False)
            trainer.fit(module, loader_of(kind, sizes))
        told = [str(warning.message) for warning in caught if "uneven='shortest'" in str(warning.message)]
        assert len(told) == (os.environ["RANK"] == "0")
        assert trainer.num_training_batches == (float("inf") if kind == "stream" else 3)
        assert ends == [False, False, True] * 2
        weights, *_ = expected(sizes, "SGD", num_steps=3, num_epochs=2)
        for ours, theirs in zip(module.net.state_dict().values(), weights.values(), strict=True):
            torch.testing.assert_close(ours, theirs)


@world_size(2, timeout_s=120, connect=False)
def test_different_numbers_are_an_error_on_all_ranks_where_that_is_asked_for():
    for kind, numbers in (("known", "5, 3"), ("stream", "3, 2")):
        with pytest.raises(ValueError, match=f"uneven='error', received {numbers}"):
            ranked(uneven="error").fit(Net(), loader_of(kind, [[2] * 5, [2] * 3]))
        trainer = ranked(uneven="error")
        trainer.fit(Net(), loader_of(kind, [[2] * 3, [1] * 3]))
        assert trainer.global_step == 3


def test_an_unknown_rule_fails_in_the_constructor():
    with pytest.raises(ValueError, match="uneven must be one of 'longest', 'shortest', 'error', received 'stop'"):
        DDPStrategy(uneven="stop")


def test_a_filler_counts_for_nothing_and_leaves_metrics_as_they_were():
    module = Net()
    store = SimpleNamespace(is_filler=None)
    uneven = Uneven(SimpleNamespace(store=store, module=module), size=4)
    module.mean.update(2.0)
    module.seen.update(torch.ones(1))
    assert module.mean.compute() == 2.0
    assert uneven.share == 1.0
    with uneven(True, 3):
        assert (uneven.share, uneven.is_filler, store.is_filler, uneven.num_lacking) == (0.0, True, True, 1)
        module.mean.update(100.0)
        module.seen.update(torch.zeros(5))
        uneven.forget_filler()
        assert module.mean.compute() == 2.0 and module.seen.compute() == 1.0
        # What follows in the same step counts.
        module.mean.update(4.0)
    assert (uneven.is_filler, store.is_filler, uneven.num_lacking) == (False, None, 0)
    assert module.mean.compute() == 3.0
    with uneven(False, 1):
        assert (uneven.share, store.is_filler) == (4.0, False)
        module.mean.update(6.0)
        assert module.mean.compute() == 4.0
        # What the others put in is forgotten with the step.
        module.mean._computed = torch.tensor(99.0)
    assert module.mean.compute() == 4.0
    # Without batches nothing was ever seen, which is no reason to warn.
    module.mean.reset()
    with uneven(True, 3):
        module.mean.update(100.0)
    assert module.mean.update_called and module.mean.weight == 0


class Judge(LightningModule):
    """Judges each sample by its number, so that one that counts twice is seen."""

    def __init__(self, talks: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.talks = talks
        self.numbers: list[int] = []
        self.mean, self.cat = torchmetrics.MeanMetric(), torchmetrics.CatMetric()

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        (numbers,) = batch
        if self.talks:
            assert self.all_gather(torch.ones(1)).sum() == self.trainer.world_size
        else:
            self.numbers.extend(numbers.tolist())
        self.log("mean", numbers.mean(), sync_dist=True)
        self.log("sum", numbers.sum(), reduce_fx="sum", sync_dist=True)
        self.log("most", numbers.max(), reduce_fx="max", sync_dist=True)
        self.mean.update(numbers)
        self.cat.update(numbers)

    def on_test_epoch_end(self):
        self.log("metric", self.mean)
        self.log("total", self.cat.compute().sum())


def numbered(size: int, batch_size: int) -> DataLoader:
    return DataLoader(TensorDataset(torch.arange(float(size))), batch_size=batch_size)


@pytest.mark.parametrize("talks", [False, True])
@world_size(2, timeout_s=120, connect=False)
def test_evaluation_counts_each_sample_once(talks):
    # Before 1.4, torchmetrics cannot put the lists of ranks together of which one saw nothing.
    few = [([1], 2)] if Version(torchmetrics.__version__) >= Version("1.4") else []
    for sizes, batch_size in (([13], 2), *few, ([9, 6], 3), ([3, 1, 5], 1)):
        module = Judge(talks)
        with told_of_no_length():
            results = ranked().test(module, [numbered(size, batch_size) for size in sizes], verbose=False)
        everything = torch.cat([torch.arange(float(size)) for size in sizes])
        for index, (size, result) in enumerate(zip(sizes, results, strict=True)):
            suffix = f"/dataloader_idx_{index}" if len(sizes) > 1 else ""
            assert result[f"mean{suffix}"] == pytest.approx((size - 1) / 2)
            assert result[f"sum{suffix}"] == size * (size - 1) / 2
            assert result[f"most{suffix}"] == size - 1
            assert result["metric"] == pytest.approx(everything.mean().item())
            assert result["total"] == everything.sum()
        if not talks and len(sizes) == 1 and sizes[0] > 1:
            rank = int(os.environ["RANK"])
            assert module.numbers == list(range(rank, sizes[0], 2))


@world_size(2, timeout_s=120, connect=False)
def test_evaluation_of_streams_of_different_lengths():
    rank = int(os.environ["RANK"])

    class Source(IterableDataset):
        def __iter__(self):
            return iter(range(1, 4) if rank == 0 else range(4, 24))

    for talks in (False, True):
        module = Judge(talks)
        loader = DataLoader(Source(), batch_size=2, collate_fn=lambda items: (torch.tensor(items).float(),))
        (result,) = ranked().test(module, loader, verbose=False)
        assert result["sum"] == result["total"] == sum(range(1, 24))
        assert result["mean"] == pytest.approx(result["metric"]) == pytest.approx(12.0)


@world_size(2, timeout_s=120, connect=False)
def test_predictions_are_made_once_also_where_steps_talk():
    class Talking(Judge):
        def predict_step(self, batch, batch_idx):
            self.all_gather(torch.ones(1))
            return batch[0]

    rank = int(os.environ["RANK"])
    found = ranked().predict(Talking(), numbered(5, 1))
    assert [int(value) for value in found] == list(range(rank, 5, 2))
    assert dist.is_initialized()
