"""When one of several processes hangs or goes, the others end within a deadline and say which one, where and why."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from levin import Callback, Trainer
from levin.ranks import hang_watchdog as watch
from levin.strategies import DDPStrategy
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


def train(fault: str, rank: int, port: int, folder: str) -> None:
    """Run one rank, with what it prints in a file."""
    for number in (1, 2):
        os.dup2(os.open(os.path.join(folder, f"rank-{rank}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    watch.GRACE_S, watch.DEADLOCK_S = 0.5, 2.0
    # Short where it has to run out, and long where a slow machine must not be taken for a late rank.
    step_s = 2 if fault in ("sleeps", "stopped") else DEADLINE_S
    strategy = DDPStrategy(timeout=timedelta(seconds=DEADLINE_S), step_timeout=timedelta(seconds=step_s))
    trainer = Trainer(**{**QUIET, "devices": SIZE, "max_epochs": 2, "enable_checkpointing": False}, strategy=strategy)
    trainer.fit(Faulty(fault))


def run_with(fault: str, folder: Path) -> tuple[list[multiprocessing.Process], list[str]]:
    """Return the processes and what they printed, once all have ended but the one that cannot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.nn.parallel", "pytest"])
    port = _free_port()
    ranks = [context.Process(target=train, args=(fault, rank, port, str(folder))) for rank in range(SIZE)]
    deadline = time.monotonic() + DEADLINE_S
    for process in ranks:
        process.start()
    try:
        for rank, process in enumerate(ranks):
            if fault != "stopped" or rank != 1:
                process.join(max(0.1, deadline - time.monotonic()))
        texts = [(folder / f"rank-{rank}").read_text() for rank in range(SIZE)]
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
