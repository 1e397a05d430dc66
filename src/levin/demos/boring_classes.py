"""The smallest modules and data that exercise everything: what test suites of packages are written with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Union

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, StepLR
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from typing_extensions import override

from levin.datamodule import LightningDataModule
from levin.module import LightningModule
from levin.utilities.types import STEP_OUTPUT, Batch


class RandomDataset(Dataset[Tensor]):
    """Rows of random numbers.

    Args:
        size: Numbers in a row.
        length: Number of rows.
    """

    def __init__(self, size: int, length: int) -> None:
        self.len: int = length
        self.data: Tensor = torch.randn(length, size)

    def __getitem__(self, index: int) -> Tensor:
        return self.data[index]

    def __len__(self) -> int:
        return self.len


class RandomDictDataset(Dataset[dict[str, Tensor]]):
    """Dicts with a random row ``a``, and ``b`` that is larger by two; arguments as of :class:`RandomDataset`."""

    def __init__(self, size: int, length: int) -> None:
        self.len: int = length
        self.data: Tensor = torch.randn(length, size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"a": self.data[index], "b": self.data[index] + 2}

    def __len__(self) -> int:
        return self.len


class RandomIterableDataset(IterableDataset[Tensor]):
    """A stream of random rows that does not say how long it is.

    Args:
        size: Numbers in a row.
        count: Number of rows.
    """

    def __init__(self, size: int, count: int) -> None:
        self.count: int = count
        self.size: int = size

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            yield torch.randn(self.size)


class RandomIterableDatasetWithLen(RandomIterableDataset):
    """A stream of random rows with a length."""

    def __len__(self) -> int:
        return self.count


class BoringModel(LightningModule):
    """One linear layer from 32 numbers to 2, with every step and every loader.

    Example:
        >>> from levin import Trainer
        >>> trainer = Trainer(fast_dev_run=True)  # doctest: +SKIP
        >>> trainer.fit(BoringModel())  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)

    @override
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output

    def loss(self, preds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean squared distance of ``preds`` from ``labels``, from ones where there are none."""
        return nn.functional.mse_loss(preds, torch.ones_like(preds) if labels is None else labels)

    def step(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        return self.loss(self(batch))

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return {"loss": self.step(batch)}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return {"x": self.step(batch)}

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        return {"y": self.step(batch)}

    @override
    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [StepLR(optimizer, step_size=1)]

    @override
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(RandomDataset(32, 64))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class ManualOptimBoringModel(BoringModel):
    """:class:`BoringModel` that steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        optimizer: Any = self.optimizers()
        loss = self.step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


_MADE_FOR = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""Stage -> the loaders whose data is made when it begins."""

Loaders = Union[DataLoader[Tensor], list[DataLoader[Tensor]]]


class _DataOfEachStage(LightningDataModule):
    """Keeps what :meth:`make` returns for a loader under ``attribute``, with the loader's name in it."""

    attribute = "random_{}"

    def make(self, name: str) -> object:
        """Return the data for the loader of that name."""
        raise NotImplementedError

    def loader(self, name: str) -> Loaders:
        """Return the loader of that name."""
        return DataLoader(getattr(self, self.attribute.format(name)))

    @override
    def setup(self, stage: str) -> None:
        for name in _MADE_FOR[str(stage)]:
            setattr(self, self.attribute.format(name), self.make(name))

    @override
    def train_dataloader(self) -> Loaders:
        return self.loader("train")

    @override
    def val_dataloader(self) -> Loaders:
        return self.loader("val")

    @override
    def test_dataloader(self) -> Loaders:
        return self.loader("test")

    @override
    def predict_dataloader(self) -> Loaders:
        return self.loader("predict")


class BoringDataModule(_DataOfEachStage):
    """Four stretches of 64 random rows, one for each stage, out of one data set."""

    def __init__(self) -> None:
        super().__init__()
        self.random_full: Dataset[Tensor] = RandomDataset(32, 64 * 4)

    @override
    def make(self, name: str) -> object:
        start = 64 * ("train", "val", "test", "predict").index(name)
        return Subset(self.random_full, indices=range(start, start + 64))


class BoringDataModuleNoLen(_DataOfEachStage):
    """Streams of random rows that do not say how long they are."""

    @override
    def make(self, name: str) -> object:
        return RandomIterableDataset(32, {"train": 512, "val": 128, "test": 256, "predict": 64}[name])


class IterableBoringDataModule(_DataOfEachStage):
    """Two loaders for each stage: rows with a length, and a stream without one."""

    attribute = "{}_datasets"

    @override
    def make(self, name: str) -> object:
        length = {"train": 16, "val": 32, "test": 64, "predict": 128}[name]
        return [RandomDataset(4, length), RandomIterableDataset(4, length)]

    @override
    def loader(self, name: str) -> Loaders:
        return [DataLoader(dataset) for dataset in getattr(self, self.attribute.format(name))]


class DemoModel(LightningModule):
    """A layer with two hyper-parameters, for command lines.

    Args:
        out_dim: Numbers that the layer gives.
        learning_rate: Of Adam.
    """

    def __init__(self, out_dim: int = 10, learning_rate: float = 0.02) -> None:
        super().__init__()
        self.l1 = nn.Linear(32, out_dim)
        self.learning_rate: float = learning_rate

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    @override
    def training_step(self, batch: Batch, batch_nb: int) -> STEP_OUTPUT:
        total: Tensor = self(batch).sum()
        return total

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)


class Net(nn.Module):
    """Two convolutions and two layers: logarithms of the probabilities of ten classes, for images of 28 x 28."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logarithms of probabilities, shape (batch, 10)."""
        x = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        x = self.dropout1(nn.functional.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(torch.relu(self.fc1(x)))
        return torch.log_softmax(self.fc2(x), dim=1)
