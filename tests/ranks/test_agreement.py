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
from levin.ranks.agreement import Agreement, agreed_value
from levin.ranks.clock import AgreedClock
from levin.ranks.location import locate
from levin.strategies import DDPStrategy
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


def test_what_another_rank_was_told_is_heard_and_kept():
    told = SimpleNamespace(should_stop=False, received_sigterm=False)
    others, compared = [0.0, 0.0, 0.0, 0.0, 3.0, 4.0], []
    alike = SimpleNamespace(numbers=lambda: [1.0, 2.0], compare=lambda *shown: compared.append(shown))
    own = Agreement(told, lambda numbers: lambda: [numbers, others], lambda: None, alike)
    assert (own.should_stop, own.received_sigterm, own.time_s) == (False, False, 0.0)
    own.sync()
    assert (own.should_stop, own.received_sigterm, told.should_stop) == (False, False, False)
    assert compared == [((1.0, 3.0), (2.0, 4.0))]
    others[:2] = 1.0, 1.0
    own.sync()
    # A signal is that of one process: the others do what it asks for without having received it.
    assert (own.should_stop, own.received_sigterm) == (True, True)
    assert (told.should_stop, told.received_sigterm) == (True, False)
    others[:3], told.should_stop = (0.0, 0.0, 1.0), False
    with pytest.raises(RuntimeError, match="Saving in the background failed on rank 1, which tells why"):
        own.sync()
    assert (own.should_stop, own.received_sigterm) == (False, True)
    assert len(compared) == 2


@pytest.mark.parametrize(("seconds", "before", "calls"), [(0.5, 9, 2), (0.501, 9, 1), (0.0, 100, 200), (0.25, 1, 2)])
def test_the_distance_of_exchanges_follows_the_time_of_a_call_and_doubles_at_most(seconds, before, calls):
    assert agreement.calls_until_sync(seconds, before) == calls


def test_a_value_that_steers_all_ranks_is_their_mean_where_they_differ():
    rows, strategy = [], DDPStrategy()
    strategy.control = SimpleNamespace(exchange=lambda own, what: asked.append((own, what)) or rows)
    run, asked = SimpleNamespace(agreement=object(), strategy=strategy, unequal_values=set()), []
    value, nan = torch.tensor(2.0, dtype=torch.float64), float("nan")
    for rows[:], own in (([[1, 2.0], [1, 2.0]], value), ([[1, nan], [1, nan]], nan), ([[0, 0.0], [0, 0.0]], None)):
        assert agreed_value(run, "loss", own) is own
    assert asked == [([1.0, 2.0], "loss"), ([1.0, pytest.approx(nan, nan_ok=True)], "loss"), ([0.0, 0.0], "loss")]
    rows[:] = [1, 2.0], [1, 5.0], [1, 5.0]
    with pytest.warns(UserWarning) as caught:
        found = [agreed_value(run, "loss", value), agreed_value(run, "loss", value)]
    assert found == [4.0, 4.0] and found[0].dtype == torch.float64
    assert [str(warning.message) for warning in caught] == [
        "'loss' is not the same on all ranks, received [2.0, 5.0, 5.0]. Their mean 4.0 is used, so that all ranks do the same. "
        "Log it with self.log('loss', ..., sync_dist=True)."
    ]
    # One that has none takes that of the others.
    rows[:] = [0, 0.0], [1, 3.0]
    with pytest.warns(UserWarning, match=r"'other' is not the same on all ranks, received \[3.0\]"):
        assert agreed_value(run, "other", None) == 3.0
    assert run.unequal_values == {"loss", "other"}
    run.agreement = None
    assert agreed_value(run, "loss", value) is value


def test_a_clock_goes_off_by_the_time_that_ranks_agreed_on(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    trainer = SimpleNamespace(run=None)
    clock = AgreedClock(5.0, trainer)
    assert not clock.is_due(trainer)
    trainer.run = SimpleNamespace(now_s=104.9)
    assert not clock.is_due(trainer)
    trainer.run.now_s = 105.0
    assert clock.is_due(trainer)
    clock.restart(trainer)
    trainer.run.now_s = 109.0
    assert not clock.is_due(trainer)


@pytest.mark.parametrize(
    ("fn", "stage", "hook", "expected"),
    [
        ("fit", None, "training_step", (0, "the end of the run")),
        ("fit", "train", None, (7, "training batch 3, epoch 2, step 9")),
        ("fit", "train", "training_step", (7, "training_step of training batch 3, epoch 2, step 9")),
        ("fit", "validate", None, (7, "validate batch 4, step 9")),
        ("validate", "validate", None, (11, "validate batch 0")),
        ("test", "test", "test_step", (12, "test_step of test batch 1")),
        ("predict", "predict", None, (13, "predict batch 2")),
    ],
)
def test_where_a_run_is_is_told_in_words(fn, stage, hook, expected):
    def loop(completed, ready):
        progress = SimpleNamespace(total=SimpleNamespace(completed=completed), current=SimpleNamespace(ready=ready))
        return SimpleNamespace(batch_progress=progress)

    training = loop(7, 4)
    training.val_loop, training.global_step, training.batch_idx = loop(20, 5), 9, 3
    loops = {"validate": loop(11, 0), "test": loop(12, 2), "predict": loop(13, 3)}
    run = SimpleNamespace(
        fn=fn, state=SimpleNamespace(stage=stage), store=SimpleNamespace(hook=hook), current_epoch=2,
        loops=SimpleNamespace(fit=SimpleNamespace(epoch_loop=training), **loops),
    )  # fmt: skip
    assert locate(run) == expected
    training.batch_idx = -1
    assert fn != "fit" or stage != "train" or "training batch 0, epoch 2" in locate(run).text


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
