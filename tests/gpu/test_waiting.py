"""The steps of a fit do not wait for the device, and need no more memory than the bare loop."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from levin import Callback
from levin.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from levin.checkpoint import AsyncCheckpointIO
from levin.loggers import CSVLogger, TensorBoardLogger
from tests.gpu.small import DEVICE, Net, loader, ready, trainer, values


class Syncs(Callback):
    """Notes where the host waits for the device, from the start of one batch to that of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.places: list[str] = []
        self._catching = warnings.catch_warnings(record=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            self._caught = self._catching.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if batch_idx == self.last:
            torch.cuda.set_sync_debug_mode("default")
            self._catching.__exit__(None, None, None)
            self.places = [
                f"{warning.filename}:{warning.lineno}"
                for warning in self._caught
                if "called a synchronizing" in str(warning.message)
            ]


def test_syncs_are_noticed():
    class Waiting(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            loss.item()
            return loss

    syncs = Syncs(2, 6)
    trainer(callbacks=syncs).fit(Waiting(), loader())
    assert len(syncs.places) == 4
    assert all(__file__ in place for place in syncs.places)


@pytest.mark.parametrize("kwargs", [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"precision": "64-true"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("accumulate", [1, 4])
def test_no_step_waits(kwargs, accumulate):
    syncs = Syncs(10, 90)
    trainer(callbacks=syncs, accumulate_grad_batches=accumulate, gradient_clip_val=1.0, **kwargs).fit(
        Net(), loader(400, pin_memory=True)
    )
    assert syncs.places == []


@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger])
def test_with_everything_on_no_step_waits(tmp_path, make_logger):
    syncs = Syncs(10, 190)
    runner = trainer(
        callbacks=[
            syncs,
            LearningRateMonitor(),
            TQDMProgressBar(),
            ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=25, save_top_k=-1),
        ],
        plugins=AsyncCheckpointIO(),
        logger=make_logger(tmp_path),
        log_every_n_steps=10,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        enable_progress_bar=True,
        enable_checkpointing=True,
    )
    runner.fit(Net(), loader(800, pin_memory=True))
    assert syncs.places == []


class Forbidding(Callback):
    """From its second batch on, an epoch ends in an error where the host waits for the device."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_epoch_end(self, trainer, pl_module):
        torch.cuda.set_sync_debug_mode("default")


def test_loggers_get_every_row_though_no_step_waits(tmp_path):
    module, logger = Net(), CSVLogger(tmp_path)
    # Their sizes differ, and so what they weigh in a mean.
    batches = [torch.randn(1 + i % 4, 8).pin_memory() for i in range(100)]
    runner = trainer(
        callbacks=[Forbidding(), LearningRateMonitor(), TQDMProgressBar()], logger=logger, log_every_n_steps=5, max_epochs=2,
        gradient_clip_val=1.0, enable_progress_bar=True,
    )  # fmt: skip
    runner.fit(module, ready(batches))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    logged = {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    losses = values(module)
    assert logged == {step: pytest.approx(losses[step]) for step in range(4, 200, 5)}
    # The rate of a step comes before its loss.
    assert [int(row["step"]) for row in rows] == sorted(int(row["step"]) for row in rows)
    weights = torch.tensor([1.0 + i % 4 for i in range(100)])
    mean = (torch.tensor(losses[:100]) * weights).sum() / weights.sum()
    assert [float(row["both_epoch"]) for row in rows if row["both_epoch"]][0] == pytest.approx(mean.item(), rel=1e-5)


class Behind(Net):
    """A step that the host has left long before the device has done it."""

    def training_step(self, batch, batch_idx):
        torch.cuda._sleep(20_000_000)
        return super().training_step(batch, batch_idx)


def test_a_logging_step_does_not_wait_for_the_device(tmp_path):
    seen = []

    class Rows(CSVLogger):
        def log_metrics(self, metrics, step=None):
            seen.append((step, runner.fit_loop.total_batch_idx, metrics["loss"] if "loss" in metrics else None))
            super().log_metrics(metrics, step)

    module = Behind()
    runner = trainer(logger=Rows(tmp_path), log_every_n_steps=4)
    runner.fit(module, loader(80, pin_memory=True))
    losses = values(module)
    steps = [(step, loss) for step, _, loss in seen if loss is not None]
    assert steps == [(step, pytest.approx(losses[step])) for step in (3, 7, 11, 15, 19)]
    assert seen[0][1] > seen[0][0]


class Wide(nn.Sequential):
    def __init__(self) -> None:
        layers = [layer for _ in range(4) for layer in (nn.Linear(1024, 1024), nn.ReLU())]
        super().__init__(*layers)


def test_peak_memory_is_that_of_the_bare_loop():
    batches = [torch.randn(4096, 1024) for _ in range(4)]

    def bare() -> None:
        net = Wide().to(DEVICE)
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(2):
            for batch in batches:
                loss = net(batch.to(DEVICE, non_blocking=True)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    class Module(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = Wide()

    def ours() -> None:
        trainer(max_epochs=2).fit(Module(), ready(batches))

    peaks = []
    for call in (bare, ours):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        call()
        peaks.append(torch.cuda.max_memory_allocated() - start)
    one_batch = batches[0].numel() * 4
    # One batch more is there while it is moved ahead of its step.
    assert peaks[1] <= peaks[0] * 1.02 + one_batch


def test_memory_is_given_back_after_a_fit():
    trainer().fit(Net(), loader())
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        trainer(max_epochs=1).fit(Net(hidden=4096), loader())
    assert torch.cuda.memory_allocated() - before < 2**20
