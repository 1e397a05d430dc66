"""When one of several processes hangs or goes, the others end within a deadline and say which one, where and why."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from levin import Callback, Fabric, Trainer
from levin.ranks import hang_watchdog as watch
from levin.strategies import DDPStrategy
from levin.strategies.control_group import ControlGroup
from tests.distributed import _free_port, world_size
from tests.strategies.small import QUIET, Small

SIZE = 3
DEADLINE_S = 200.0


class Faulty(Small):
    """Trains until something goes wrong on rank 1, in its third step."""

    def __init__(self, fault: str) -> None:
        super().__init__(size=48, batch_size=2)
        self.fault = fault

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1 and self.fault == "ends the epoch alone":
            return -1
        return None

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank == 1:
            if self.fault == "sleeps":
                time.sleep(1000)
            elif self.fault == "raises":
                raise KeyError("broken in the step")
            else:
                time.sleep(2.5 * self.trainer.run.watchdog.beat_s)  # so that it has said where it is
                os.kill(os.getpid(), {"stopped": signal.SIGSTOP, "killed": signal.SIGKILL}[self.fault])
        if self.fault == "ends the epoch alone":
            return self.net(batch[0]).mean()  # nothing is logged: the ranks next meet in groups that differ
        return super().training_step(batch, batch_idx)


class Alone(Small):
    """Has rank 0 make a call that needs all ranks."""

    def __init__(self, what: str, folder: str) -> None:
        super().__init__(size=24, batch_size=2)
        self.what, self.folder = what, folder

    def do(self, what: str) -> None:
        if self.what == what and self.global_rank == 0:
            self.trainer.save_checkpoint(os.path.join(self.folder, "alone.ckpt"))

    def training_step(self, batch, batch_idx):
        if self.what == "gathers in a step" and batch_idx == 2 and self.global_rank == 0:
            self.all_gather(torch.zeros(1))
        if self.what == "logs in a batch" and batch_idx == 2 and self.global_rank == 0:
            self.log("alone", 1.0, sync_dist=True)
        self.do("saves in a step")
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        self.do("saves after an epoch")

    def on_fit_end(self):
        self.do("saves after the run")


def loop_alone(fabric: Fabric, folder: str) -> None:
    """A loop of one's own, in which rank 0 saves alone."""
    module = fabric.setup_module(torch.nn.Linear(2, 1))
    for step in range(3):
        if step == 1 and fabric.is_global_zero:
            fabric.save(os.path.join(folder, "alone.ckpt"), {"module": module})
        fabric.backward(module(torch.ones(4, 2)).mean())


def train_alone(what: str, rank: int, size: int, folder: str) -> None:
    """Run one rank in which :class:`Alone` trains."""
    if what == "saves by Fabric":
        Fabric(accelerator="cpu", devices=size, strategy="ddp").launch(loop_alone, folder)
        return
    # As in a script, in which something may follow.
    multiprocessing.parent_process = lambda: None
    strategy = "fsdp" if "step" in what and hasattr(torch.cpu.Stream, "record_event") else "ddp"
    trainer = Trainer(**{**QUIET, "devices": size, "max_epochs": 1, "enable_checkpointing": False}, strategy=strategy)
    trainer.fit(Alone(what, folder))
    trainer.strategy.barrier()


def train(fault: str, rank: int, port: int, folder: str, size: int) -> None:
    """Run one rank, with what it prints in a file."""
    for number in (1, 2):
        os.dup2(os.open(os.path.join(folder, f"rank-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    watch.GRACE_S, watch.DEADLOCK_S = 0.5, 2.0
    if fault in ALONE:
        train_alone(fault, rank, size, folder)
        return
    # Short where it has to run out, and long where a slow machine must not be taken for a late rank.
    step_s = 2 if fault in ("sleeps", "stopped") else DEADLINE_S
    strategy = DDPStrategy(timeout=timedelta(seconds=DEADLINE_S), step_timeout=timedelta(seconds=step_s))
    trainer = Trainer(**{**QUIET, "devices": SIZE, "max_epochs": 2, "enable_checkpointing": False}, strategy=strategy)
    trainer.fit(Faulty(fault))


def run_with(fault: str, folder: Path, size: int = SIZE) -> tuple[list[multiprocessing.Process], list[str]]:
    """Return the processes and what they printed, once all have ended but the one that cannot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.nn.parallel", "pytest"])
    port = _free_port()
    ranks = [context.Process(target=train, args=(fault, rank, port, str(folder), size)) for rank in range(size)]
    deadline = time.monotonic() + DEADLINE_S
    for process in ranks:
        process.start()
    try:
        for rank, process in enumerate(ranks):
            if fault != "stopped" or rank != 1:
                process.join(max(0.1, deadline - time.monotonic()))
        texts = [(folder / f"rank-{rank}").read_text() for rank in range(size)]
        late = [rank for rank, process in enumerate(ranks) if process.is_alive() and (fault != "stopped" or rank != 1)]
        assert not late, f"ranks {late} still run\n" + "\n".join(texts)
        return ranks, texts
    finally:
        for process in ranks:
            process.kill()
            process.join()


# Torch 2.6 writes no collectives of Gloo down.
IS_RECORDED = hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json")
ALL_REDUCE, ALL_GATHER = (["in all_reduce"], ["in all_gather"]) if IS_RECORDED else ([], [])

EXPECTED = {
    "sleeps": ["Rank 1 is late, the others wait for it", "time.sleep(1000)", *ALL_REDUCE],
    "stopped": ["Rank 1 gives no sign of life", "stopped by a signal"],
    "killed": ["Rank 1 gives no sign of life", "it has ended"],
    "raises": ["Rank 1 failed first", "KeyError: 'broken in the step'"],
    # Found long before the timeout of a step.
    "ends the epoch alone": ["The ranks went different ways and wait for each other", *ALL_REDUCE, *ALL_GATHER],
}


@pytest.mark.timeout(500)
@pytest.mark.parametrize("fault", list(EXPECTED))
def test_the_others_end_and_name_the_rank_that_hangs_or_is_gone(tmp_path, fault):
    ranks, texts = run_with(fault, tmp_path)
    for rank in (0, 2):
        assert ranks[rank].exitcode not in (0, None)
        for text in [*EXPECTED[fault], "training batch 2, epoch 0, step 2"]:
            assert text in texts[rank], f"{text!r} is not in what rank {rank} printed:\n{texts[rank]}"
    if fault in ("sleeps", "ends the epoch alone"):
        # It is awake, so it hears of it and ends, too.
        assert ranks[1].exitcode == 1
        assert EXPECTED[fault][0] in texts[1]


# What rank 0 calls alone, and where rank 1 waits meanwhile.
ALONE = {
    "saves in a step": ("save_checkpoint", "trainer.fit("),
    "gathers in a step": ("self.all_gather(", "trainer.fit("),
    "saves after an epoch": ("save_checkpoint", "trainer.fit("),
    "saves after the run": ("save_checkpoint", "trainer.strategy.barrier()"),
    "saves by Fabric": ("fabric.save(", "fabric.backward("),
    "logs in a batch": ("self.log(", "trainer.fit("),
}


@pytest.mark.timeout(500)
@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow if "gathers" in what else ()) for what in ALONE]
)
def test_a_call_that_one_rank_makes_alone_is_named_on_all_ranks(tmp_path, what):
    started = time.monotonic()
    ranks, texts = run_with(what, tmp_path, size=2)
    assert time.monotonic() - started < DEADLINE_S / 4
    assert "RuntimeError: All ranks have" in texts[0] or "RuntimeError: The ranks went different ways" in texts[0]
    for rank, text in enumerate(texts):
        assert ranks[rank].exitcode == 1
        told = next(line for line in text.splitlines() if "All ranks have to make the same calls, received" in line)
        first, _, second = told.partition(" on rank 0; ")
        assert ALONE[what][0] in first, told
        assert ALONE[what][1] in second, told
        assert " on rank 1. Make them on all ranks" in second


@world_size(2)
def test_ranks_that_exchange_different_things_all_hear_of_it():
    control = ControlGroup(timedelta(seconds=30))
    rank = dist.get_rank()
    numbers = [float(rank), *map(float, range(40))]
    assert control.exchange(numbers) == [[0.0, *map(float, range(40))], [1.0, *map(float, range(40))]]
    assert control.exchange([rank, 5.0], "places") == [[0.0, 5.0], [1.0, 5.0]]
    call = r"`control\.exchange\(own, what\)` \(\S+, \S+\)"
    for own, what, told in (
        ([0.0] * (rank + 1), "one", f"{call} for one on ranks 0, 1"),
        ([1.0], f"thing {rank}", f"{call} for thing 0 on rank 0; {call} for thing 1 on rank 1"),
    ):
        with pytest.raises(RuntimeError, match=f"same calls, received {told}. Make them"):
            control.exchange(own, what)
    assert control.exchange([7.0]) == [[7.0], [7.0]]
    for num in (13, 14, 15):
        assert control.exchange([rank] * num) == [[0.0] * num, [1.0] * num]
    # Several may be under way, and are waited for in any order.
    first, second = control.begin([rank + 1.0]), control.begin([rank + 3.0])
    assert (second(), first()) == ([[3.0], [4.0]], [[1.0], [2.0]])
    assert control.exchange_objects({"rank": rank}, "objects") == [{"rank": 0}, {"rank": 1}]
    assert (control.share(rank), control.share(rank, src=1)) == (0, 1)
    collected = control.collect(torch.arange(3 * rank, dtype=torch.uint8))
    assert collected is None if rank else [part.tolist() for part in collected] == [[0, 1, 2]]
    # One of this process alone, and what another process would get of it.
    own = ControlGroup(timedelta(seconds=30), [rank])
    assert own.exchange([rank, 2.0]) == [[rank, 2.0]] and own.collect(torch.zeros(1, dtype=torch.uint8)) == []
    own.is_closed = True
    sent = pickle.loads(pickle.dumps(own))
    assert (sent._group, sent.is_closed, sent._ranks) == (None, False, [rank])
    # An exchange that is under way when the others are given up has the numbers of this process alone.
    ends = control.begin([rank])
    control.is_closed = True
    assert ends() == control.exchange([rank]) == [[rank]]


@world_size(2, connect=False, timeout_s=200.0)
def test_the_training_loop_does_nothing_for_it_and_timeouts_shorten_after_the_first_batch():
    threads: list[str] = []
    waited: list[timedelta] = []
    report = watch.Watchdog._report

    def told(self, *args, **kwargs):
        threads.append(threading.current_thread().name)
        return report(self, *args, **kwargs)

    def timeout() -> timedelta:
        return dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout

    class Looking(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                deadline = time.monotonic() + 60
                while timeout() != timedelta(seconds=77) and time.monotonic() < deadline:
                    time.sleep(0.05)
                waited.append(timeout())

    watch.Watchdog._report = told
    strategy = DDPStrategy(timeout=timedelta(seconds=99), step_timeout=timedelta(seconds=77))
    trainer = Trainer(
        **{**QUIET, "devices": 2, "max_epochs": 1, "enable_checkpointing": False},
        strategy=strategy,
        callbacks=[Looking()],
    )
    trainer.fit(Small(size=48, batch_size=2))
    assert waited == [timedelta(seconds=77)]
    assert timeout() == timedelta(seconds=99)
    # Once from the main thread: at the end it says that the run has ended well.
    assert [name for name in threads if name != "levin-watch"] == ["MainThread"]
    assert len(threads) > 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, timedelta(minutes=10)),
        ({"timeout": None}, timedelta(minutes=10)),
        ({"timeout": timedelta(hours=2)}, timedelta(hours=2)),
        ({"timeout": timedelta(hours=2), "step_timeout": timedelta(minutes=1)}, timedelta(minutes=1)),
    ],
)
def test_the_timeout_of_a_step(settings, expected):
    assert DDPStrategy(**settings).step_timeout == expected


@pytest.mark.parametrize("name", ["timeout", "step_timeout"])
@pytest.mark.parametrize("value", [timedelta(0), 30])
def test_a_timeout_is_a_time(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be a timedelta > 0, received"):
        DDPStrategy(**{name: value})
