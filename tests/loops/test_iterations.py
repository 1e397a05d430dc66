"""Each epoch iterates each loader once, whatever it is: ``iter`` of a loader may open a shard, or shuffle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.data.combined import CombinedLoader

SIZE = 3


class Counted:
    """Gives batches, and counts how often somebody began with it."""

    num_iterations = 0

    def batches(self) -> list[torch.Tensor]:
        # Every iteration has data of its own, as shards do.
        return [torch.full((2, 1), 100.0 * self.num_iterations + i) for i in range(SIZE)]


class OwnIterator(Counted):
    """Is its own iterator, and begins anew in every ``iter``."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.num_iterations += 1
        self.left = self.batches()
        return self

    def __next__(self) -> torch.Tensor:
        if not self.left:
            raise StopIteration
        return self.left.pop(0)


class SizedOwnIterator(OwnIterator):
    def __len__(self) -> int:
        return SIZE


class StatefulOwnIterator(SizedOwnIterator):
    def state_dict(self) -> dict[str, int]:
        return {"num_iterations": self.num_iterations}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_iterations = state["num_iterations"]


class OtherIterator(Counted):
    """Gives an iterator of another class, of which ``iter`` begins anew as well."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.num_iterations += 1
        return OtherIterator.Items(self)

    class Items:
        def __init__(self, owner: Counted) -> None:
            self.owner, self.left = owner, owner.batches()

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.owner.num_iterations += 1
            self.left = self.owner.batches()
            return self

        def __next__(self) -> torch.Tensor:
            if not self.left:
                raise StopIteration
            return self.left.pop(0)


class Generating(Counted):
    def __iter__(self) -> Iterator[torch.Tensor]:
        self.num_iterations += 1
        yield from self.batches()


class SizedGenerating(Generating):
    def __len__(self) -> int:
        return SIZE


class CountingLoader(DataLoader, Counted):
    def __init__(self, dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(torch.arange(2.0 * SIZE).reshape(-1, 1), **({"batch_size": 2} | kwargs))

    def __iter__(self) -> Any:
        self.num_iterations += 1
        return super().__iter__()


class CountingSampler(Counted):
    def __iter__(self) -> Iterator[int]:
        self.num_iterations += 1
        return iter(range(2 * SIZE))

    def __len__(self) -> int:
        return 2 * SIZE


class Batches:
    """As many batches as asked for; a list of tensors would be a collection of loaders."""

    def __init__(self, number: int = SIZE) -> None:
        self.number = number

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.ones(2, 1)] * self.number)

    def __len__(self) -> int:
        return self.number


KINDS = [
    OwnIterator, SizedOwnIterator, StatefulOwnIterator, OtherIterator, Generating, SizedGenerating, CountingLoader,
]  # fmt: skip
COLLECTIONS = {
    "one": lambda loader: loader,
    "list": lambda loader: [loader, Batches()],
    "min_size": lambda loader: CombinedLoader({"a": loader, "b": Batches()}, "min_size"),
    "max_size": lambda loader: CombinedLoader({"a": loader, "b": Batches()}, "max_size"),
    "cycle": lambda loader: CombinedLoader({"a": loader, "b": Batches()}, "max_size_cycle"),
}


class Seen(LightningModule):
    """Keeps the numbers of the batches of the loader in question."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list[float]] = {}

    def take(self, stage: str, batch: Any, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, dict):
            batch = batch["a"]
        elif isinstance(batch, list):
            batch = batch[0]
        if dataloader_idx == 0 and batch is not None:
            self.seen.setdefault(stage, []).append(batch[0, 0].item())
        return self.layer(torch.ones(1, 1)).sum()

    def training_step(self, batch, batch_idx):
        return self.take("train", batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.take("val", batch, dataloader_idx)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.take("test", batch, dataloader_idx)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.take("predict", batch, dataloader_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **kwargs,
    )  # fmt: skip


def in_epochs(loader: Counted, num_epochs: int) -> list[float]:
    if isinstance(loader, DataLoader):
        return [0.0, 2.0, 4.0] * num_epochs
    return [100.0 * (epoch + 1) + i for epoch in range(num_epochs) for i in range(SIZE)]


@pytest.mark.parametrize("collection", COLLECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_epoch_iterates_its_loader_once(kind, collection):
    loader, module = kind(), Seen()
    trainer(max_epochs=2).fit(module, COLLECTIONS[collection](loader), Batches())
    # A joint loader that cycles is begun again when it comes to its end before the others know theirs.
    extra = collection in ("list", "cycle")
    assert loader.num_iterations == 2 or (extra and loader.num_iterations <= 4)
    assert module.seen["train"][:SIZE] == in_epochs(loader, 1)
    assert extra or module.seen["train"] == in_epochs(loader, 2)


@pytest.mark.parametrize("collection", [name for name in COLLECTIONS if name != "cycle"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_an_evaluation_iterates_its_loader_once(stage, kind, collection):
    if stage == "predict" and collection not in ("one", "list"):
        pytest.skip("predict takes one loader after the other")
    loader, module = kind(), Seen()
    loaders = COLLECTIONS[collection](loader)
    if stage == "fit":
        trainer(max_epochs=2).fit(module, Batches(2), loaders)
    else:
        getattr(trainer(), stage)(module, loaders)
    num_epochs = 2 if stage == "fit" else 1
    # To predict, a DataLoader is made again, with batches that know their indices.
    if not (stage == "predict" and kind is CountingLoader):
        assert loader.num_iterations == num_epochs
    assert module.seen["val" if stage in ("fit", "validate") else stage] == in_epochs(loader, num_epochs)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_epoch_asks_a_sampler_as_often_as_pytorch_does(num_workers):
    def loader(sampler: CountingSampler) -> DataLoader:
        return DataLoader(torch.zeros(2 * SIZE, 1), batch_size=2, sampler=sampler, num_workers=num_workers)

    ours, theirs = CountingSampler(), CountingSampler()
    list(loader(theirs))
    trainer(max_epochs=1).fit(Seen(), loader(ours), Batches())
    assert ours.num_iterations == theirs.num_iterations
