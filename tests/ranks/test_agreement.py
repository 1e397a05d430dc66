"""Ranks that are told different things do the same, at the same batch, and talk about it seldom."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from levin import Callback, Trainer
from levin.callbacks import ModelCheckpoint, Timer
from levin.checkpoint import AsyncCheckpointIO, TorchCheckpointIO
from levin.ranks import agreement
from levin.ranks.agreement import Agreement
from levin.strategies.collectives import num_collectives
from levin.utilities.exceptions import SIGTERMException
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small, loader


def ranked(**kwargs) -> Trainer:
    return Trainer(
        **{**QUIET, "devices": 2, "strategy": "ddp", "enable_checkpointing": False, "max_epochs": 50, **kwargs}
    )


class At(Callback):
    """Does something on one rank, the third time that a hook runs."""

    def __init__(self, hook: str, rank: int, action) -> None:
        self.num_calls = 0

        def run(trainer, *args, **kwargs) -> None:
            self.num_calls += 1
            if self.num_calls == 3 and trainer.global_rank == rank:
                action(trainer)

        setattr(self, hook, run)


def stop(trainer) -> None:
    trainer.should_stop = True


def send_sigterm(trainer) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


HOOKS = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@world_size(2, timeout_s=120, connect=False)
def test_one_rank_that_is_told_to_stop_stops_all(rank):
    for hook in HOOKS:
        trainer = ranked(callbacks=[At(hook, rank, stop)])
        trainer.fit(Small(batch_size=1))
        steps = trainer.strategy.all_gather(torch.tensor(trainer.global_step))
        assert steps[0] == steps[1], hook
        assert 0 < steps[0] < 50, hook
        assert trainer.should_stop


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
@world_size(2, timeout_s=120, connect=False)
def test_a_signal_to_one_rank_ends_all(rank):
    for hook in HOOKS:
        trainer = ranked(callbacks=[At(hook, rank, send_sigterm)])
        with pytest.raises(SIGTERMException):
            trainer.fit(Small(batch_size=1))
        assert trainer.interrupted
        steps = trainer.strategy.all_gather(torch.tensor(trainer.global_step))
        assert steps[0] == steps[1], hook
    for hook in ("on_test_batch_end", "on_predict_batch_end"):
        trainer = ranked(callbacks=[At(hook, rank, send_sigterm)])
        run = trainer.test if "test" in hook else trainer.predict
        with pytest.raises(SIGTERMException):
            run(Small(), loader(1))


@world_size(2, timeout_s=120, connect=False)
def test_ranks_with_different_numbers_of_batches_hear_of_a_stop_too():
    class Uneven(Small):
        def train_dataloader(self):
            return loader(1 if self.global_rank else 4)

        val_dataloader = train_dataloader

    for hook in HOOKS:
        trainer = ranked(callbacks=[At(hook, 1, stop)], use_distributed_sampler=False)
        trainer.fit(Uneven())
        steps = trainer.strategy.all_gather(torch.tensor(trainer.global_step))
        assert steps[0] == steps[1], hook
        assert 0 < steps[0] <= 64, hook


@world_size(2, timeout_s=120, connect=False)
def test_a_step_costs_one_collective_and_exchanges_are_rare():
    # However slow the machine: the ranks talk at doubling distances, until a quarter of a second lies between.
    agreement.PERIOD_S = 1e6
    counts = []

    class Count(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            counts.append(num_collectives())

    trainer = ranked(
        max_epochs=1, callbacks=[Count(), Timer("00:01:00:00")], limit_val_batches=0, accumulate_grad_batches=2
    )
    control = trainer.strategy.control
    exchanges, begin = [], control.begin

    def counted(numbers, *args):
        exchanges.append(len(counts))
        return begin(numbers, *args)

    control.begin = counted
    trainer.fit(Small(batch_size=1, size=512))
    assert len(counts) == 256
    # One reduction of the gradients for every window; the first two rebuild DDP's buckets.
    steps = [after - before for before, after in zip(counts, counts[1:], strict=False)][6:]
    assert set(zip(steps[::2], steps[1::2], strict=False)) == {(0, 1)}
    during = [number for number in exchanges if 0 < number < 256]
    assert during == [1, 5, 13, 29, 61, 125, 253]


def test_exchanges_follow_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    moments = []

    def begin(numbers):
        moments.append(now[0])
        rows = [numbers, [0.0, 0.0, 0.0, now[0] + 5.0, 0.0]]
        return lambda: rows

    trainer = SimpleNamespace(should_stop=False, received_sigterm=False)
    own = Agreement(trainer, begin, lambda: None)
    for _ in range(10_000):
        now[0] += 0.001
        own.maybe_sync()
    gaps = [after - before for before, after in zip(moments, moments[1:], strict=False)]
    assert len(moments) < 60
    assert max(gaps) == pytest.approx(0.25, abs=0.01)
    # The time is that of the rank whose clock is ahead, on all ranks.
    assert own.time_s == pytest.approx(moments[-1] + 5.0)
    # Slow steps: told at each of them.
    moments.clear()
    for _ in range(600):
        now[0] += 1.0
        own.maybe_sync()
    assert len(moments) > 300


def test_no_step_waits_for_an_exchange_that_has_just_begun(monkeypatch):
    monkeypatch.setattr(agreement, "PERIOD_S", 1e6)
    told, events, failures = SimpleNamespace(should_stop=False, received_sigterm=False), [], []

    def begin(numbers):
        events.append("begin")
        stops = float(events.count("begin") == 3)

        def rows():
            events.append("wait")
            return [numbers, [stops, *numbers[1:]]]

        return rows

    def check():
        if failures:
            raise failures.pop()

    own = Agreement(told, begin, check)
    own.sync()
    stopped = []
    for _ in range(6):
        own.maybe_sync()
        events.append("step")
        stopped.append(own.should_stop)
    assert " ".join(events) == "begin wait begin step wait step step step begin step wait step"
    assert stopped == [False] * 5 + [True]
    # A failure is raised when all know of it.
    failures.append(OSError("no space left"))
    for _ in range(7):
        own.maybe_sync()
    assert not failures
    with pytest.raises(OSError, match="no space left"):
        own.maybe_sync()


class Broken(TorchCheckpointIO):
    def save_checkpoint(self, checkpoint, path, storage_options=None):
        raise OSError("no space left")


@world_size(2, timeout_s=120, connect=False)
def test_a_save_that_fails_on_rank_zero_fails_on_all(tmp_path):
    rank = int(os.environ["RANK"])
    for plugin in (Broken(), AsyncCheckpointIO(Broken())):
        error, message = (OSError, "no space left") if rank == 0 else (RuntimeError, "failed on rank 0")
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
        trainer = ranked(plugins=[plugin], callbacks=[saving], enable_checkpointing=True)
        with pytest.raises(error, match=message):
            trainer.fit(Small(batch_size=1))
        trainer.strategy.barrier()
        assert list(tmp_path.iterdir()) == []
