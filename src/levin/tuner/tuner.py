"""Tuner: the searches for their own sake, before a run."""

from __future__ import annotations

from typing import Any, Optional

from levin.datamodule import LightningDataModule
from levin.hooks import Callback
from levin.module import LightningModule
from levin.trainer import Trainer
from levin.tuner.finders import BatchSizeFinder, LearningRateFinder
from levin.tuner.learning_rate import LRFinder
from levin.utilities.exceptions import MisconfigurationException

_LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}


class Tuner:
    """Searches for a learning rate and a batch size.

    Args:
        trainer: The Trainer that will train with what is found.

    Example:
        >>> tuner = Tuner(trainer)  # doctest: +SKIP
        >>> tuner.lr_find(model).suggestion()  # doctest: +SKIP
        0.0034
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Trainer = trainer

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
        dataloaders: object = None,
        datamodule: Optional[LightningDataModule] = None,
        method: str = "fit",
        min_lr: float = 1e-8,
        max_lr: float = 1,
        num_training: int = 100,
        mode: str = "exponential",
        early_stop_threshold: Optional[float] = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> Optional[LRFinder]:
        """Train a few steps with growing learning rates, and set the one at which the loss falls most steeply.

        Args:
            model: The module, with one optimizer.
            train_dataloaders: As in ``Trainer.fit``.
            val_dataloaders: As in ``Trainer.fit``; not used.
            dataloaders: None: that is for other methods than ``fit``.
            datamodule: As in ``Trainer.fit``.
            method: ``"fit"``.
            min_lr: The first rate to try.
            max_lr: The last rate to try.
            num_training: Number of rates.
            mode: How they grow: ``"exponential"`` or ``"linear"``.
            early_stop_threshold: Stop when the loss is so many times the best one; None for never.
            update_attr: Whether to set the attribute to what is suggested.
            attr_name: Name of the attribute of the module or its hyper-parameters; by default ``lr`` or
                ``learning_rate``.

        Returns:
            What was found; None with ``fast_dev_run``.

        Raises:
            MisconfigurationException: Another method, an unknown mode, no such attribute, or a Trainer that has a
                LearningRateFinder.
        """
        if method != "fit":
            raise MisconfigurationException(f"method must be 'fit' to search for a learning rate, received {method!r}.")
        finder = LearningRateFinder(min_lr, max_lr, num_training, mode, early_stop_threshold, update_attr, attr_name)
        self._search(finder, "fit", model, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return finder.optimal_lr

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
        dataloaders: object = None,
        datamodule: Optional[LightningDataModule] = None,
        method: str = "fit",
        mode: str = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> Optional[int]:
        """Search for the largest batch size that fits into memory, and set it.

        Args:
            model: The module.
            train_dataloaders: A data module, or None: the loaders must come from hooks.
            val_dataloaders: None.
            dataloaders: A data module, or None.
            datamodule: As in ``Trainer.fit``.
            method: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
            mode: ``"power"`` doubles until the memory is full; ``"binsearch"`` looks in between then.
            steps_per_trial: Steps with each size.
            init_val: The size to begin with.
            max_trials: Sizes that fit at most.
            batch_arg_name: Name of the attribute of module or data module or of the hyper-parameters of either.
            margin: Share of the size to leave free, where the mode is ``"binsearch"``.
            max_val: The largest size to try.

        Returns:
            The size; None with ``fast_dev_run``.

        Raises:
            MisconfigurationException: As in :class:`~levin.tuner.BatchSizeFinder`, or a Trainer that has one.
            ValueError: Several processes run.
        """
        if method not in ("fit", *_LIMITS):
            raise MisconfigurationException(f"method must be one of {['fit', *_LIMITS]}, received {method!r}.")
        finder = BatchSizeFinder(mode, steps_per_trial, init_val, max_trials, batch_arg_name, margin, max_val)
        self._search(finder, method, model, train_dataloaders, val_dataloaders, dataloaders, datamodule)
        return None if self._trainer.fast_dev_run else finder.optimal_batch_size

    def _search(
        self,
        finder: Callback,
        method: str,
        model: LightningModule,
        train: object,
        val: object,
        dataloaders: object,
        datamodule: Optional[LightningDataModule],
    ) -> None:
        trainer = self._trainer
        if any(isinstance(callback, type(finder)) for callback in trainer.callbacks):
            raise MisconfigurationException(
                f"The Trainer has a {type(finder).__name__} already, which searches when it runs. Remove one of them."
            )
        if method == "fit" and dataloaders is not None:
            raise MisconfigurationException("With method='fit', pass train_dataloaders, received dataloaders.")
        if method != "fit" and (train is not None or val is not None):
            raise MisconfigurationException(
                f"With method={method!r}, pass dataloaders, received train_dataloaders or val_dataloaders."
            )
        callbacks, loggers, settings = trainer.callbacks, trainer.loggers, trainer.settings
        limits = trainer.max_epochs, trainer.min_epochs
        trainer.callbacks, trainer.loggers = [finder], []
        try:
            if method == "fit":
                trainer.callbacks.append(_Nothing())
                trainer.fit(model, train, val, datamodule=datamodule)
            else:
                setattr(trainer, _LIMITS[method], 1)
                silent = {} if method == "predict" else {"verbose": False}
                getattr(trainer, method)(model, dataloaders, datamodule=datamodule, **silent)
        finally:
            trainer.callbacks, trainer.loggers, trainer.settings = callbacks, loggers, settings
            trainer.fit_loop.max_epochs, trainer.fit_loop.min_epochs = limits


class _Nothing(Callback):
    """Lets a fit end as soon as the search before it is over, and begin with the weights that the module has."""

    resumes_by_itself = False

    def on_fit_start(self, trainer: Any, pl_module: object) -> None:
        trainer.limit_train_batches = trainer.num_sanity_val_steps = 0
