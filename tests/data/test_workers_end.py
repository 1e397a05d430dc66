"""Nothing of a loader runs on after the call that used it, and nothing of the user's process stays changed."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from levin import LightningModule, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


class Numbers(Dataset):
    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == self.fails_at:
            raise OSError("no such sample")
        return torch.ones(1)


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.given = 0

    def __iter__(self):
        for self.given in range(8):
            yield torch.ones(1)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


class Model(LightningModule):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fails = fails

    def training_step(self, batch, batch_idx):
        if self.fails and batch_idx == 1:
            raise KeyError("meant")
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_idx):
        if self.fails and batch_idx == 1:
            raise KeyError("meant")

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, max_epochs=2, **kwargs,
    )  # fmt: skip


def run(stage: str, model: Model, loader: DataLoader, **kwargs: Any) -> None:
    if stage == "fit":
        trainer(**kwargs).fit(model, loader, loader)
    else:
        getattr(trainer(**kwargs), stage)(model, loader)


def workers_left() -> list[Any]:
    return multiprocessing.active_children()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_workers_do_not_outlive_a_call(stage, persistent):
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, persistent_workers=persistent)
    run(stage, Model(), loader)
    assert not workers_left()
    # Another call has its own.
    run(stage, Model(), loader)
    assert not workers_left()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("data", [Numbers, Stream])
def test_workers_do_not_outlive_an_epoch_that_ended_at_a_limit(data, persistent):
    loader = DataLoader(data(), batch_size=2, num_workers=1, persistent_workers=persistent)
    run("fit", Model(), loader, limit_train_batches=2, limit_val_batches=1)
    assert not workers_left()


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_workers_do_not_outlive_an_exception(stage, persistent):
    loader = DataLoader(Numbers(), batch_size=2, num_workers=1, persistent_workers=persistent)
    with pytest.raises(KeyError, match="meant") as raised:
        run(stage, Model(fails=True), loader)
    assert not workers_left()
    assert raised.tb is not None  # while somebody holds what was raised


@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_do_not_outlive_an_exception_of_their_own(stage, persistent):
    loader = DataLoader(Numbers(fails_at=5), batch_size=2, num_workers=1, persistent_workers=persistent)
    with pytest.raises(OSError, match="no such sample") as raised:
        run(stage, Model(), loader)
    assert not workers_left()
    assert raised.tb is not None


@pytest.mark.parametrize("limit", [2, 4])
@pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
def test_workers_of_a_loader_with_a_state_do_not_outlive_a_call(stage, limit):
    loader = StatefulDataLoader(Numbers(), batch_size=2, num_workers=1)
    limits = {
        f"limit_{name}_batches": limit
        for name in (["train", "val"] if stage == "fit" else [stage.removesuffix("idate")])
    }
    run(stage, Model(), loader, **limits)
    assert not workers_left()
    if stage != "predict":  # which builds a loader of its own
        assert loader.state_dict()["_snapshot"]["_snapshot_step"] == limit
    with pytest.raises(KeyError, match="meant") as raised:
        run(stage, Model(fails=True), loader)
    assert not workers_left()
    assert raised.tb is not None


class OwnLoader(DataLoader):
    def __init__(self, size: int, **kwargs: Any) -> None:
        super().__init__(Numbers(), **kwargs)


def test_fits_in_threads_leave_the_classes_of_loaders_as_they_were():
    before = {kind: kind.__init__ for kind in (DataLoader, BatchSampler, OwnLoader)}
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    class Asked(Model):
        def __init__(self, turn: int) -> None:
            super().__init__()
            self.turn = turn

        def train_dataloader(self):
            barrier.wait(30)
            loader = OwnLoader(8, batch_size=2)
            # They leave in another order than they came in.
            for turn in range(4):
                if turn == self.turn:
                    return loader
                threading.Event().wait(0.05)
            return loader

        def val_dataloader(self):
            return DataLoader(Numbers(), batch_size=2)

    def train(turn: int) -> None:
        try:
            trainer().fit(Asked(turn))
        except BaseException as error:  # noqa: BLE001  (told by the main thread)
            errors.append(error)

    threads = [threading.Thread(target=train, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    assert {kind: kind.__init__ for kind in before} == before
