"""Small models and data sets to try a Trainer with, as tests and examples do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
    from levin.demos.lstm import LightningLSTM, SequenceSampler, SimpleLSTM
    from levin.demos.mnist_datamodule import MNISTDataModule
    from levin.demos.transformer import LightningTransformer, Transformer, WikiText2

_HOMES = {
    "BoringDataModule": "levin.demos.boring_classes",
    "BoringModel": "levin.demos.boring_classes",
    "DemoModel": "levin.demos.boring_classes",
    "LightningLSTM": "levin.demos.lstm",
    "LightningTransformer": "levin.demos.transformer",
    "MNISTDataModule": "levin.demos.mnist_datamodule",
    "SequenceSampler": "levin.demos.lstm",
    "SimpleLSTM": "levin.demos.lstm",
    "Transformer": "levin.demos.transformer",
    "WikiText2": "levin.demos.transformer",
}

__all__ = [
    "BoringDataModule",
    "BoringModel",
    "DemoModel",
    "LightningLSTM",
    "LightningTransformer",
    "MNISTDataModule",
    "SequenceSampler",
    "SimpleLSTM",
    "Transformer",
    "WikiText2",
]

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
