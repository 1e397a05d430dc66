"""Small models and data sets to try a Trainer with, as tests and examples do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from levin.utilities.lazy import lazy_face

if TYPE_CHECKING:
    from levin.demos.boring_classes import BoringDataModule as BoringDataModule
    from levin.demos.boring_classes import BoringModel as BoringModel
    from levin.demos.boring_classes import DemoModel as DemoModel
    from levin.demos.lstm import LightningLSTM as LightningLSTM
    from levin.demos.lstm import SequenceSampler as SequenceSampler
    from levin.demos.lstm import SimpleLSTM as SimpleLSTM
    from levin.demos.mnist_datamodule import MNISTDataModule as MNISTDataModule
    from levin.demos.transformer import LightningTransformer as LightningTransformer
    from levin.demos.transformer import Transformer as Transformer
    from levin.demos.transformer import WikiText2 as WikiText2

_HOMES = {
    "levin.demos.boring_classes": "BoringDataModule BoringModel DemoModel",
    "levin.demos.lstm": "LightningLSTM SequenceSampler SimpleLSTM",
    "levin.demos.mnist_datamodule": "MNISTDataModule",
    "levin.demos.transformer": "LightningTransformer Transformer WikiText2",
}

__getattr__, __dir__ = lazy_face(__name__, _HOMES)
__all__ = __dir__()
