"""Checkpoints of several ranks: each goes on with what was its own, and another number of ranks shares what is left."""

from __future__ import annotations

import io
import os
import warnings
from collections import Counter

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler, WeightedRandomSampler

from levin import Callback, LightningModule, Trainer
from levin.callbacks import OnExceptionCheckpoint
from levin.checkpoint import load
from levin.resume.rank_states import part_of_rank
from levin.utilities.seed import seed_everything
from tests.distributed import run_ranks, world_size
from tests.strategies.small import QUIET


class Augmented(Dataset):
    """Samples with noise from the global generator, which is that of the rank."""

    def __init__(self, size: int) -> None:
        self.data = torch.randn(size, 4, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.data[index] + 0.1 * torch.randn(4), index


class Net(LightningModule):
    def __init__(self, size: int = 40, shuffle: bool = True, sampler: Sampler | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.sampler = sampler
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.mean = torchmetrics.MeanMetric()
        self.size, self.shuffle = size, shuffle
        self.seen: list[int] = []

    def training_step(self, batch, batch_idx):
        x, index = batch
        self.seen.extend(index.tolist())
        loss = self.net(x).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.mean.update(loss)
        self.log("metric", self.mean, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        if self.sampler is not None:
            return DataLoader(Augmented(self.size), batch_size=2, sampler=self.sampler)
        return DataLoader(Augmented(self.size), batch_size=2, shuffle=self.shuffle)


class SaveAt(Callback):
    """Saves after so many batches of the second epoch, and stops there if that is asked for."""

    def __init__(self, path: str, batch_idx: int, stops: bool = False, epoch: int = 1) -> None:
        self.path, self.batch_idx, self.stops, self.epoch = path, batch_idx, stops, epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch_idx):
            trainer.save_checkpoint(self.path)
            if self.stops:
                raise KeyboardInterrupt


def trainer_for(size: int, **kwargs) -> Trainer:
    kwargs = {"max_epochs": 3, "strategy": "ddp" if size > 1 else "auto", **kwargs}
    return Trainer(**{**QUIET, "devices": size, "enable_checkpointing": False, **kwargs})


PARTIAL = {
    "more than there are": lambda: RandomSampler(range(40), replacement=True, num_samples=52),
    "a part, from its own generator": lambda: RandomSampler(
        range(40), num_samples=22, generator=torch.Generator().manual_seed(9)
    ),
    "weighted": lambda: WeightedRandomSampler(torch.arange(1.0, 41.0), 30),
}


@pytest.mark.parametrize("sampler", PARTIAL)
@world_size(2, timeout_s=120, connect=False)
def test_each_rank_goes_on_with_its_part_of_what_a_sampler_draws(tmp_path, sampler):
    path = str(tmp_path / "middle.ckpt")
    seed_everything(5, verbose=False)
    whole = Net(sampler=PARTIAL[sampler]())
    trainer_for(2, callbacks=[SaveAt(path, 2), Differ()]).fit(whole)
    torch.manual_seed(1234 + int(os.environ["RANK"]))
    rest = Net(sampler=PARTIAL[sampler]())
    trainer_for(2).fit(rest, ckpt_path=path)
    assert len(rest.seen) > 10
    assert whole.seen[-len(rest.seen) :] == rest.seen
    for ours, theirs in zip(rest.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


@world_size(2, timeout_s=120, connect=False)
def test_each_rank_goes_on_with_its_own_randomness_and_sums(tmp_path):
    rank = int(os.environ["RANK"])
    path = str(tmp_path / "middle.ckpt")
    seed_everything(5, verbose=False)
    # From here on the ranks differ in what they draw, as augmentation on ranks should.
    whole = Net()
    first = trainer_for(2, callbacks=[SaveAt(path, 4), Differ()], accumulate_grad_batches=3)
    first.fit(whole)
    torch.manual_seed(1234 + rank)
    rest = Net()
    second = trainer_for(2, accumulate_grad_batches=3)
    second.fit(rest, ckpt_path=path)
    for ours, theirs in zip(rest.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert whole.seen[-len(rest.seen) :] == rest.seen
    assert len(rest.seen) == 2 * 5 + 20
    for name, value in first.callback_metrics.items():
        assert torch.equal(value, second.callback_metrics[name]), name
    state = torch.load(path, weights_only=True)["levin"]
    assert len(state["other_ranks"]) == 1
    other = load(io.BytesIO(state["other_ranks"][0].numpy().tobytes()))
    assert not torch.equal(torch.as_tensor(list(state["rng"]["torch"])), torch.as_tensor(list(other["rng"]["torch"])))


class Differ(Callback):
    """Lets every rank draw numbers of its own."""

    def on_train_start(self, trainer, pl_module):
        torch.manual_seed(77 + trainer.global_rank)


def train_until_saved(path: str, size: int, batch_idx: int, from_path: str | None = None, shuffle: bool = True):
    seed_everything(5, verbose=False)
    module = Net(shuffle=shuffle)
    trainer = trainer_for(size, callbacks=[SaveAt(path, batch_idx, stops=True, epoch=0)])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*when the checkpoint was saved.*|.*was saved by .* processes.*")
        with pytest.raises(SystemExit):
            trainer.fit(module, ckpt_path=from_path)
    return module.seen


def train_rest(path: str, size: int, shuffle: bool = True):
    seed_everything(5, verbose=False)
    module = Net(shuffle=shuffle)
    trainer = trainer_for(size, max_epochs=2)
    epochs, lasts = [], []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            lasts.append(trainer.is_last_batch)

        def on_train_epoch_end(self, trainer, pl_module):
            epochs.append(list(pl_module.seen))
            pl_module.seen.clear()
            assert lasts[-1]
            assert not any(lasts[:-1])
            lasts.clear()

    trainer.callbacks.append(Watch())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, ckpt_path=path)
    return epochs, [str(warning.message) for warning in caught]


def on(size: int, function, **kwargs):
    return run_ranks(function, size, {"size": size, **kwargs}, timeout_s=120, connect=False)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("shuffle", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_another_number_of_ranks_shares_what_is_left_of_the_epoch(before, after, shuffle, tmp_path):
    path = str(tmp_path / "middle.ckpt")
    seen = [index for part in on(before, train_until_saved, path=path, batch_idx=2, shuffle=shuffle) for index in part]
    assert len(seen) == 3 * 2 * before
    results = on(after, train_rest, path=path, shuffle=shuffle)
    told = [text for _, texts in results for text in texts]
    assert any(f"saved by {before} processes, received {after}" in text for text in told)
    left = [index for epochs, _ in results for index in epochs[0]]
    # Of a filler, the index is seen again; it counts for nothing.
    counts = Counter(seen)
    counts.update(set(left))
    assert counts == Counter(range(40))
    assert {index for epochs, _ in results for index in epochs[1]} == set(range(40))


def test_the_number_of_ranks_may_change_twice_in_one_epoch(tmp_path):
    first, second = str(tmp_path / "first.ckpt"), str(tmp_path / "second.ckpt")
    seen = [index for part in on(2, train_until_saved, path=first, batch_idx=2) for index in part]
    seen += [index for part in on(1, train_until_saved, path=second, batch_idx=5, from_path=first) for index in part]
    assert len(seen) == 3 * 4 + 3 * 2
    results = on(2, train_rest, path=second)
    counts = Counter(seen)
    counts.update({index for epochs, _ in results for index in epochs[0]})
    assert counts == Counter(range(40))


def packed(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


OF_A_RANK = ("rng", "validation_rng", "log_store", "metrics")


def test_what_one_process_saved_alone_is_its_own_and_the_others_share_the_rest():
    saved = {"data": 1, "window": {}, **dict.fromkeys(OF_A_RANK, 2), "alone_of": 2}
    parts = []
    for rank in range(2):
        with pytest.warns(UserWarning, match="was saved by one process alone"):
            parts.append(part_of_rank(saved, rank, 2))
    assert parts == [saved, {"data": 1, "window": {}, "alone_of": 2}]


def test_each_rank_takes_its_own_part_of_as_many():
    states = [{"rng": rank, "window": {"gradients": [torch.tensor(1.0 * rank)]}} for rank in range(3)]
    saved = {**states[0], "other_ranks": [packed(state) for state in states[1:]]}
    assert [part_of_rank(saved, rank, 3) for rank in range(3)] == states


@pytest.mark.parametrize("size", [1, 3])
def test_the_mean_of_a_window_is_that_of_before_with_another_number_of_ranks(size):
    def state(rank, gradients, weight):
        window = {"gradients": gradients, "weight": weight, "lacks": 1.0, "part_size": 7}
        return {"data": 5, **dict.fromkeys(OF_A_RANK, rank), "window": window}

    first = state(0, [torch.tensor(2.0), None, None, torch.tensor(5.0)], 3)
    other = state(1, [torch.tensor(4.0), torch.tensor(6.0), None, None], 5)
    for rank in range(size):
        with pytest.warns(UserWarning, match=f"was saved by 2 processes, received {size}"):
            found = part_of_rank({**first, "other_ranks": [packed(other)]}, rank, size)
        window = {"gradients": [3.0, 3.0, None, 2.5], "weight": 4.0, "lacks": size / 2, "part_size": 7}
        # Of those numbers that there are, no two ranks draw the same.
        assert found == {"data": 5, "window": window} | ({"rng": rank} if rank < 2 else {})


def test_a_window_that_one_rank_had_not_begun_is_that_of_the_first():
    first = {"window": {"gradients": [torch.tensor(2.0)], "weight": 3, "lacks": 1}, "rng": 0}
    with pytest.warns(UserWarning, match="was saved by 2 processes, received 1"):
        found = part_of_rank({**first, "other_ranks": [packed({"window": {"gradients": []}, "rng": 1})]}, 0, 1)
    assert found == first
    with pytest.warns(UserWarning, match="was saved by 2 processes, received 1"):
        assert part_of_rank({"rng": 0, "window": {}, "other_ranks": [packed(first)]}, 0, 1) == {"rng": 0, "window": {}}


class Failing(Net):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1 and batch_idx == 3:
            raise KeyError("broken on rank 1")
        return super().training_step(batch, batch_idx)


def test_a_checkpoint_of_a_failure_waits_for_nobody(tmp_path):
    trainer = trainer_for(
        2, strategy="ddp_fork", callbacks=[OnExceptionCheckpoint(tmp_path)], max_epochs=1, enable_checkpointing=True
    )
    with warnings.catch_warnings(), pytest.raises(KeyError, match="broken on rank 1"):
        warnings.filterwarnings("ignore", message=".*there is no last checkpoint available")
        trainer.fit(Failing())
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] in (2, 3)
    assert saved["levin"]["alone_of"] == 2
    with warnings.catch_warnings():
        # Forked processes inherit this.
        warnings.filterwarnings("ignore", message=".*was saved by one process alone")
        again = trainer_for(2, strategy="ddp_fork", max_epochs=2)
        again.fit(Net(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert (again.current_epoch, again.global_step) == (2, 20)
