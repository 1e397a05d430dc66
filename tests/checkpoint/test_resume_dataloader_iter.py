"""Steps that take ``dataloader_iter`` and are interrupted in the middle of an epoch."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from levin import Callback, LightningModule, Trainer
from levin.callbacks import OnExceptionCheckpoint
from tests.data.loaders_for_tests import Augmented, as_is

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings(
        "ignore:This DataLoader will create", "ignore:.*does not have many workers",
        "ignore:The checkpoint holds states of callbacks", "ignore:DataLoader cannot say where it is",
        "ignore:.*there is no last checkpoint",
    ),
]  # fmt: skip


class Stop(Exception):
    pass


class Model(LightningModule):
    """Takes ``takes[0]`` batches in its first step, ``takes[1]`` in the next one, and so on in turn."""

    def __init__(self, takes: tuple[int, ...], fails_at: tuple[int, int] | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 1))
        self.takes, self.fails_at, self.seen = takes, fails_at, []

    def training_step(self, dataloader_iter):
        batches = []
        for number in range(self.takes[self.global_step % len(self.takes)]):
            if self.fails_at == (self.global_step, number):
                raise Stop
            batch, batch_idx, _ = next(dataloader_iter)
            self.seen.append((self.current_epoch, self.global_step, batch_idx, batch))
            batches.append(torch.tensor(batch, dtype=torch.float32))
        loss = self.net(torch.cat(batches)).pow(2).mean()
        self.log("loss", loss, on_epoch=True, batch_size=2)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Ahead(Model):
    """Fetches each batch one step before it trains on it."""

    def __init__(self, saves: bool) -> None:
        super().__init__((1,))
        self.saves, self.kept = saves, None

    def training_step(self, dataloader_iter):
        batch = self.kept if self.kept is not None else next(dataloader_iter)
        self.kept = next(dataloader_iter)
        return super().training_step(iter([batch]))

    def on_train_epoch_end(self):
        self.kept = None

    def on_save_checkpoint(self, checkpoint):
        if self.saves:
            checkpoint["kept"] = self.kept

    def on_load_checkpoint(self, checkpoint):
        self.kept = checkpoint.get("kept")


class Save(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Stop


class Rows(IterableDataset):
    def __iter__(self):
        return ([float(number), number + 1.0, number + 2.0] for number in range(24))


def loader(kind: str, num_workers: int, sources: str = "tpo") -> DataLoader[Any]:
    torch.manual_seed(2)
    random.seed(2)
    if kind == "stream":
        return DataLoader(Rows(), batch_size=2, collate_fn=as_is, num_workers=num_workers)
    data = Augmented("" if kind == "stateful" else sources, size=24)  # torchdata keeps no states of a data set
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(data, batch_size=2, shuffle=True, collate_fn=as_is, num_workers=num_workers)
    return DataLoader(data, batch_size=2, shuffle=True, collate_fn=as_is, num_workers=num_workers)


def fit(model: Model, data: DataLoader[Any], folder: Path, *callbacks: Callback, ckpt_path: Any = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, OnExceptionCheckpoint) for callback in callbacks), default_root_dir=str(folder), callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def assert_goes_on(unbroken: Model, resumed: Model) -> None:
    assert resumed.seen == [entry for entry in unbroken.seen if entry[:2] >= resumed.seen[0][:2]]
    expected = unbroken.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())


CASES = [
    ("map", 0),
    ("map", 2),
    pytest.param("stream", 0),
    pytest.param("stream", 2, marks=pytest.mark.slow),
    ("stateful", 0),
]


@pytest.mark.parametrize("takes", [(1,), (2,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(("kind", "num_workers"), CASES)
def test_the_run_goes_on_after_the_batches_that_were_taken(tmp_path, kind, num_workers, takes):
    models = [Model(takes) for _ in range(3)]
    unbroken = fit(models[0], loader(kind, num_workers), tmp_path)
    with pytest.raises(Stop):
        fit(models[1], loader(kind, num_workers), tmp_path, Save(tmp_path / "stopped.ckpt", step=3))
    resumed = fit(models[2], loader(kind, num_workers), tmp_path, ckpt_path=tmp_path / "stopped.ckpt")
    assert_goes_on(models[0], models[2])
    assert resumed.callback_metrics == unbroken.callback_metrics


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_a_step_repeats_all_batches_of_the_step(tmp_path, num_workers):
    models = [Model((2,)), Model((2,), fails_at=(3, 1)), Model((2,))]
    fit(models[0], loader("map", num_workers, sources=""), tmp_path)
    with pytest.raises(Stop):
        fit(models[1], loader("map", num_workers, sources=""), tmp_path, OnExceptionCheckpoint(tmp_path))
    fit(models[2], loader("map", num_workers, sources=""), tmp_path, ckpt_path=tmp_path / "on_exception.ckpt")
    assert_goes_on(models[0], models[2])


def test_a_step_that_fetches_ahead_is_warned_of_unless_it_does_so_in_no_checkpoint(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        fit(Ahead(saves=False), loader("map", 0), tmp_path)
    with (
        pytest.raises(Stop),
        pytest.warns(UserWarning, match="took 2 batches .* each of the others 1, as steps do that"),
    ):
        fit(Ahead(saves=False), loader("map", 0), tmp_path, Save(tmp_path / "stopped.ckpt", step=3))


@pytest.mark.filterwarnings("ignore:The first step took")
def test_what_a_module_keeps_and_saves_itself_is_exact(tmp_path):
    models = [Ahead(saves=True) for _ in range(3)]
    fit(models[0], loader("map", 0), tmp_path)
    with pytest.raises(Stop):
        fit(models[1], loader("map", 0), tmp_path, Save(tmp_path / "stopped.ckpt", step=3))
    fit(models[2], loader("map", 0), tmp_path, ckpt_path=tmp_path / "stopped.ckpt")
    assert_goes_on(models[0], models[2])
