"""Random schedules of what may happen on several ranks, and a pool of processes that runs them, each with a deadline.

A schedule says how many batches each rank has, and what goes wrong, on which rank and when. All of it follows from a seed.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import time
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from levin import Callback, LightningModule, Trainer
from levin.ranks import hang_watchdog as watch
from levin.strategies import DDPStrategy
from levin.utilities.process_group import disconnect_processes
from tests.distributed import _free_port
from tests.strategies.small import QUIET

LARGEST = 4
DEADLINE_S = 150.0
EVENTS = ("nothing", "stop", "stop", "raise", "raise", "skip", "all_raise", "sigterm")
PLACES = (
    "training_step",
    "on_train_batch_end",
    "loader",
    "validation_step",
    "on_train_epoch_end",
    "on_validation_epoch_end",
)


@dataclass(frozen=True)
class Schedule:
    """What happens in one run.

    Args:
        seed: What all of it follows from.
        lengths: Training batches of each rank.
        val_lengths: Validation batches of each rank; empty for no validation.
        kind: ``"stream"`` (length unknown), ``"sized"`` (known) or ``"loader"`` (a DataLoader over a stream).
        rule: The strategy's rule for uneven data.
        event: What goes wrong; see ``EVENTS``.
        rank: On which rank.
        batch: In which of its training batches, counted over all epochs; may never come.
        place: Where it raises.
    """

    seed: int
    lengths: tuple[int, ...]
    val_lengths: tuple[int, ...]
    kind: str
    rule: str
    epochs: int
    window: int
    is_manual: bool
    logs: bool
    max_steps: int
    event: str
    rank: int
    batch: int
    place: str

    @classmethod
    def drawn(cls, seed: int) -> Schedule:
        """Return the schedule of a seed."""
        chance = random.Random(seed)
        size = chance.randint(2, LARGEST)
        is_even = chance.random() < 0.2
        lengths = tuple([chance.randint(1, 6)] * size if is_even else [chance.randint(0, 6) for _ in range(size)])
        if not any(lengths):
            lengths = (1, *lengths[1:])
        is_manual = chance.random() < 0.2
        return cls(
            seed=seed,
            lengths=lengths,
            val_lengths=tuple(chance.randint(1, 3) for _ in range(size)) if chance.random() < 0.5 else (),
            kind=chance.choice(["stream", "sized", "loader"]),
            rule=chance.choice(["longest", "longest", "shortest"]),
            epochs=chance.randint(1, 3),
            window=1 if is_manual else chance.choice([1, 1, 2, 3]),
            is_manual=is_manual,
            logs=chance.random() < 0.5,
            max_steps=chance.choice([-1, -1, chance.randint(1, 8)]),
            event=chance.choice(EVENTS),
            rank=chance.randrange(size),
            batch=chance.randrange(6),
            place=chance.choice(PLACES),
        )

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.lengths)


class Planned(Exception):
    """What a schedule raises."""


class Numbers(IterableDataset):
    """A number of batches, of which one may raise."""

    def __init__(self, length: int, before_batch: Any) -> None:
        self.length, self.before_batch = length, before_batch

    def __iter__(self):
        for index in range(self.length):
            self.before_batch()
            yield torch.full((2, 3), float(index + 1))


class Sized:
    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return self.numbers.length

    def __iter__(self):
        return iter(self.numbers)


def loader_of(kind: str, length: int, before_batch: Any = lambda: None) -> Any:
    numbers = Numbers(length, before_batch)
    if kind == "sized":
        return Sized(numbers)
    return DataLoader(numbers, batch_size=None) if kind == "loader" else numbers


class Planner:
    """Lets the schedule's event happen."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.schedule, self.rank = schedule, rank
        self.has_happened = False

    def at(self, place: str, trainer: Trainer) -> None:
        schedule = self.schedule
        if self.has_happened or trainer.fit_loop.total_batch_idx < schedule.batch:
            return
        if schedule.event in ("raise", "all_raise") and place == schedule.place:
            if schedule.event == "all_raise" or self.rank == schedule.rank:
                self.has_happened = True
                raise Planned(place)
        if self.rank != schedule.rank or place != "on_train_batch_end":
            return
        if schedule.event == "stop":
            self.has_happened = True
            trainer.should_stop = True
        elif schedule.event == "sigterm":
            self.has_happened = True
            trainer.received_sigterm = True


class Happening(Callback):
    def __init__(self, planner: Planner) -> None:
        self.planner = planner

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        schedule = self.planner.schedule
        # On one rank alone it is a mistake of the user's that ends in an error: the others do not know.
        if schedule.event == "skip" and batch_idx == schedule.batch % 4:
            self.planner.has_happened = True
            return -1
        return None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.planner.at("on_train_batch_end", trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self.planner.at("on_train_epoch_end", trainer)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.planner.at("on_validation_epoch_end", trainer)


class Net(LightningModule):
    def __init__(self, schedule: Schedule, planner: Planner) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.schedule, self.planner = schedule, planner
        self.automatic_optimization = not schedule.is_manual
        self.net = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        self.planner.at("training_step", self.trainer)
        loss = self.net(batch).pow(2).mean()
        if self.schedule.logs:
            self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        self.planner.at("validation_step", self.trainer)
        self.log("val_loss", self.net(batch).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.001)


def run(schedule: Schedule, rank: int, port: int) -> dict[str, Any]:
    """Run one rank of a schedule and return how it ended."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    planner = Planner(schedule, rank)
    strategy = DDPStrategy(
        timeout=timedelta(seconds=DEADLINE_S / 2), step_timeout=timedelta(seconds=DEADLINE_S / 3), uneven=schedule.rule
    )
    trainer = Trainer(
        **{**QUIET, "devices": schedule.size, "enable_checkpointing": False, "max_epochs": schedule.epochs},
        strategy=strategy, max_steps=schedule.max_steps, callbacks=[Happening(planner)],
        accumulate_grad_batches=schedule.window, use_distributed_sampler=False,
    )  # fmt: skip
    module = Net(schedule, planner)
    train = loader_of(schedule.kind, schedule.lengths[rank], lambda: planner.at("loader", trainer))
    val = loader_of(schedule.kind, schedule.val_lengths[rank]) if schedule.val_lengths else None
    report: dict[str, Any] = {"error": "", "text": ""}
    try:
        trainer.fit(module, train, val)
    except BaseException as error:
        report = {"error": type(error).__name__, "text": traceback.format_exc()}
    report.update(
        step=trainer.global_step, epoch=trainer.current_epoch, has_happened=planner.has_happened,
        weights=[p.detach().tolist() for p in module.parameters()],
    )  # fmt: skip
    return report


def work(pipe: Any) -> None:
    """Run schedules until there are no more."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    logging.disable(logging.CRITICAL)
    watch.GRACE_S = 5.0
    while (job := pipe.recv()) is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = run(*job)
        # A process that has failed ends, and with it its connections; that is how the others notice.
        disconnect_processes()
        gc.collect()
        pipe.send(report)


class Pool:
    """Processes that run the ranks of one schedule after the other. One that hangs is replaced."""

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.nn.parallel", "pytest"])
        self._workers: list[Any] = [None] * LARGEST

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: Any) -> None:
        for index in range(LARGEST):
            self._end(index)

    def _end(self, index: int) -> None:
        if self._workers[index] is not None:
            process, pipe = self._workers[index]
            process.kill()
            process.join()
            pipe.close()
            self._workers[index] = None

    def _worker(self, index: int) -> Any:
        if self._workers[index] is None:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers[index] = (process, ours)
        return self._workers[index]

    def run(self, schedule: Schedule) -> list[dict[str, Any]]:
        """Return how each rank ended; ``error`` is ``"hangs"`` for one that did not within the deadline."""
        port = _free_port()
        pipes: dict[Any, int] = {}
        for rank in range(schedule.size):
            _, pipe = self._worker(rank)
            pipe.send((schedule, rank, port))
            pipes[pipe] = rank
        reports: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + DEADLINE_S
        while pipes:
            ready = wait(list(pipes), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pipes.pop(pipe)
                try:
                    reports[rank] = pipe.recv()
                except (EOFError, ConnectionError):
                    reports[rank] = {"error": "died", "text": "the process ended"}
                    self._end(rank)
        for rank in pipes.values():
            reports[rank] = {"error": "hangs", "text": f"still running after {DEADLINE_S} s"}
            self._end(rank)
        return [reports[rank] for rank in range(schedule.size)]


def what_is_wrong(schedule: Schedule, reports: list[dict[str, Any]]) -> str | None:
    """Return in which way the ranks did not end as they should, None when they did."""
    errors = [report["error"] for report in reports]
    if "hangs" in errors or "died" in errors:
        return "a rank hangs, or did not end by an error"
    happened = [rank for rank, report in enumerate(reports) if report["has_happened"]]
    if schedule.event in ("raise", "all_raise") and happened:
        if any(errors[rank] != "Planned" for rank in happened) or "" in errors:
            return "one raised, and not all ended with an error"
        others = [report for report in reports if report["error"] != "Planned"]
        if any("failed first" not in report["text"] for report in others):
            return "the others do not say which rank failed first"
        return None
    if schedule.event == "sigterm" and happened:
        if set(errors) - {"SIGTERMException", ""} or len(set(errors)) > 1:
            return "one was told to end, and not all ended for it"
    elif any(errors):
        return "an error that nothing asked for"
    for name in ("step", "epoch", "weights"):
        if any(report[name] != reports[0][name] for report in reports):
            return f"the ranks ended with different {name}s"
    return None


def describe(schedule: Schedule, wrong: str, reports: list[dict[str, Any]]) -> str:
    """Return all that is needed to look for the reason."""
    lines = [f"seed {schedule.seed}: {wrong}", str(schedule)]
    for rank, report in enumerate(reports):
        lines.append(
            f"--- rank {rank}: { {key: value for key, value in report.items() if key not in ('text', 'weights')} }"
        )
        lines.append(report["text"][-1500:])
    return "\n".join(lines)
