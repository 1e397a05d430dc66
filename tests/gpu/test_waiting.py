"""The steps of a fit do not wait for the device, and need no more memory than the bare loop."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from levin import Callback
from levin.callbacks import ModelCheckpoint, TQDMProgressBar
from levin.checkpoint import AsyncCheckpointIO
from levin.loggers import CSVLogger, TensorBoardLogger
from levin.utilities import numbers
from tests.gpu.small import DEVICE, Net, loader, ready, trainer


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
def test_with_everything_on_only_the_reading_of_logged_values_waits(tmp_path, make_logger):
    syncs = Syncs(10, 190)
    runner = trainer(
        callbacks=[
            syncs,
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
    # Whoever is told the values of a step as numbers waits for that step: loggers every tenth, the bar when it is drawn.
    assert {place.rpartition(":")[0] for place in syncs.places} == {numbers.__file__}
    assert len(syncs.places) <= 2 * 180 / 10


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
