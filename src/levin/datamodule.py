"""LightningDataModule: what users subclass to say what data there is."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterable, Mapping
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from levin.hooks import DataHooks
from levin.hparams import HyperparametersMixin
from levin.loading import load_from_checkpoint, restricted_classmethod
from levin.utilities.overrides import is_overridden

if TYPE_CHECKING:
    from levin.protocols import Trainer
    from levin.utilities.types import _MAP_LOCATION_TYPE, StateDict

Self = TypeVar("Self", bound="LightningDataModule")
Datasets = Dataset[Any] | Iterable[Dataset[Any]] | Mapping[str, Dataset[Any]]

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")
_TITLES = ("Train", "Validation", "Test", "Predict")


class LightningDataModule(DataHooks, HyperparametersMixin):
    """Data and all that is done to it: download, split, transforms, loaders. Works with and without a Trainer.

    Override what you need: ``prepare_data`` (once per node), ``setup(stage)`` and ``teardown(stage)`` (every process,
    every call of the trainer), ``train_dataloader``, ``val_dataloader``, ``test_dataloader``, ``predict_dataloader``,
    the hooks around the transfer of a batch to its device, and ``state_dict`` with ``load_state_dict``.

    Example:
        >>> class Numbers(LightningDataModule):
        ...     def __init__(self, size=8):
        ...         super().__init__()
        ...         self.save_hyperparameters()
        ...
        ...     def setup(self, stage):
        ...         self.numbers = torch.arange(self.hparams.size)
        ...
        ...     def train_dataloader(self):
        ...         return DataLoader(self.numbers, batch_size=4)
    """

    CHECKPOINT_HYPER_PARAMS_KEY: str = "datamodule_hyper_parameters"
    CHECKPOINT_HYPER_PARAMS_NAME: str = "datamodule_hparams_name"
    CHECKPOINT_HYPER_PARAMS_TYPE: str = "datamodule_hparams_type"
    name: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.trainer: Trainer | None = None

    @classmethod
    def from_datasets(
        cls: type[Self],
        train_dataset: Datasets | None = None,
        val_dataset: Datasets | None = None,
        test_dataset: Datasets | None = None,
        predict_dataset: Datasets | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        **datamodule_kwargs: Any,
    ) -> Self:
        """Return a data module with one loader per data set.

        Args:
            train_dataset: Data set, or a list or dict of data sets, for training. It is shuffled unless iterable.
            val_dataset: The same for validation.
            test_dataset: The same for the test.
            predict_dataset: The same for predictions.
            batch_size: Samples per batch.
            num_workers: Processes that load the data; 0 loads in the main process.
            datamodule_kwargs: Arguments of ``__init__``, which also gets ``batch_size`` and ``num_workers`` if it
                takes them.

        Raises:
            TypeError: ``__init__`` does not take one of ``datamodule_kwargs``.

        Example:
            >>> numbers = torch.utils.data.TensorDataset(torch.arange(8))
            >>> data = LightningDataModule.from_datasets(train_dataset=numbers, batch_size=4)
            >>> len(data.train_dataloader())
            2
        """
        parameters = inspect.signature(cls.__init__).parameters
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        sizes = {"batch_size": batch_size, "num_workers": num_workers}
        accepted = {key: value for key, value in sizes.items() if takes_all or key in parameters}
        datamodule = cls(**{**accepted, **datamodule_kwargs})
        datasets = (train_dataset, val_dataset, test_dataset, predict_dataset)
        for hook, given in zip(_LOADERS, datasets, strict=True):
            if given is None:
                continue
            if isinstance(given, Mapping):
                given = dict(given)
            elif isinstance(given, Iterable) and not isinstance(given, Dataset):
                given = list(given)
            is_shuffled = hook == "train_dataloader"
            # A partial, not a closure: strategies that start processes send the data module to them.
            setattr(datamodule, hook, functools.partial(_loaders, given, is_shuffled, batch_size, num_workers))
        return datamodule

    def state_dict(self) -> StateDict:
        """Return what a checkpoint keeps of this data module."""
        return {}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take back what :meth:`state_dict` returned."""

    def on_exception(self, exception: BaseException) -> None:
        """Clean up after an exception in the trainer."""

    @restricted_classmethod
    def load_from_checkpoint(
        cls: type[Self],
        checkpoint_path: str | os.PathLike[str] | IO[bytes],
        map_location: _MAP_LOCATION_TYPE = None,
        hparams_file: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Return the data module that a checkpoint describes, with its state.

        Args:
            checkpoint_path: Path, URL or open binary file.
            map_location: Where tensors go, as for ``torch.load``.
            hparams_file: A ``.yaml``, ``.yml`` or ``.csv`` file whose hyper-parameters replace those in the checkpoint.
            weights_only: Whether only tensors and plain values may be read, so that no code of the file can run.
            kwargs: Arguments of ``__init__``, which replace the saved ones.

        Raises:
            TypeError: It is called on an instance, or an argument of ``__init__`` is missing.

        Example:
            >>> data = LightningDataModule.load_from_checkpoint("last.ckpt", batch_size=32)  # doctest: +SKIP
        """
        return load_from_checkpoint(
            cls,
            checkpoint_path,
            map_location=map_location,
            hparams_file=hparams_file,
            weights_only=weights_only,
            **kwargs,
        )

    def __str__(self) -> str:
        """Return one line per kind of loader, with the sizes of the data sets."""
        lines = [
            f"{{{title} dataloader: {self._describe(hook)}}}" for title, hook in zip(_TITLES, _LOADERS, strict=True)
        ]
        return "\n".join(lines)

    def _describe(self, hook: str) -> str:
        if not is_overridden(hook, self, DataHooks):
            return "None"
        try:
            loaders = getattr(self, hook)()
        except AttributeError:
            # A hook that uses what `setup` makes, before `setup`.
            return "None"
        return describe_sizes(loaders)


def describe_sizes(loaders: Any) -> str:
    """Return the size of the data set behind a loader, or of those behind each loader of a collection.

    Example:
        >>> describe_sizes({"a": DataLoader([1, 2]), "b": DataLoader([1])})
        'a: size=2, b: size=1'
    """
    if loaders is None:
        return "None"
    if isinstance(loaders, Mapping):
        return ", ".join(f"{key}: {describe_sizes(loader)}" for key, loader in loaders.items())
    if isinstance(loaders, (list, tuple)):
        return ", ".join(f"{index}: {describe_sizes(loader)}" for index, loader in enumerate(loaders))
    dataset = getattr(loaders, "dataset", loaders)
    try:
        return f"size={len(dataset)}"
    except (TypeError, NotImplementedError):
        return "size=unknown"


def _loaders(datasets: object, is_shuffled: bool, batch_size: int, num_workers: int) -> object:
    if isinstance(datasets, dict):
        return {key: _loader(value, is_shuffled, batch_size, num_workers) for key, value in datasets.items()}
    if isinstance(datasets, list):
        return [_loader(value, is_shuffled, batch_size, num_workers) for value in datasets]
    return _loader(datasets, is_shuffled, batch_size, num_workers)


def _loader(dataset: Any, is_shuffled: bool, batch_size: int, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=is_shuffled and not isinstance(dataset, IterableDataset),
        num_workers=num_workers,
        # Without an accelerator there is nothing to pin for, and torch warns.
        pin_memory=torch.accelerator.is_available(),
    )
