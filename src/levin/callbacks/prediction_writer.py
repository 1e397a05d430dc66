"""BasePredictionWriter: for predictions that go to files instead of memory."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal

import torch
from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import require_choice
from levin.utilities.move import move_data_to_device
from levin.utilities.types import Batch

_CPU = torch.device("cpu")


class WriteInterval(str, Enum):
    """When a BasePredictionWriter writes; each member equals its name in lower case."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    def __str__(self) -> str:
        return str(self.value)

    @property
    def on_batch(self) -> bool:
        """Whether after each batch."""
        return self is not WriteInterval.EPOCH

    @property
    def on_epoch(self) -> bool:
        """Whether after all of them."""
        return self is not WriteInterval.BATCH


class BasePredictionWriter(Callback):
    """Derive from it and write predictions yourself, after each batch or after all of them.

    Every rank sees the predictions of its own batches.

    Args:
        write_interval: ``"batch"`` calls :meth:`write_on_batch_end`, ``"epoch"`` :meth:`write_on_epoch_end`,
            ``"batch_and_epoch"`` both.

    Raises:
        MisconfigurationException: ``write_interval`` is something else.

    Example:
        >>> class SaveEachBatch(BasePredictionWriter):
        ...     def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        ...         torch.save(prediction, f"rank{trainer.global_rank}-{dataloader_idx}-{batch_idx}.pt")
        >>> writer = SaveEachBatch(write_interval="batch")
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        require_choice("write_interval", write_interval, ("batch", "epoch", "batch_and_epoch"))
        self.interval = WriteInterval(write_interval)
        self._predictions: list[list[object]] = []

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the predictions of one batch.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            prediction: What ``predict_step`` returned.
            batch_indices: Where the batch's samples are in the dataset.
            batch: The batch.
            batch_idx: Its index.
            dataloader_idx: Index of its loader.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `write_on_batch_end` to write after each batch.")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any],
    ) -> None:
        """Write all predictions.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            predictions: One prediction per batch, on the CPU; with several loaders a list of those for each.
            batch_indices: For each loader and batch, where its samples are in the dataset.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `write_on_epoch_end` to write after all batches.")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._predictions = []

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.interval.on_epoch:
            while len(self._predictions) <= dataloader_idx:
                self._predictions.append([])
            self._predictions[dataloader_idx].append(move_data_to_device(outputs, _CPU))
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.interval.on_epoch:
            return
        indices = trainer.predict_loop.epoch_batch_indices
        predictions: list[Any] = self._predictions
        if len(indices) == 1:
            predictions = self._predictions[0] if self._predictions else []
        self.write_on_epoch_end(trainer, pl_module, predictions, indices)
        self._predictions = []
