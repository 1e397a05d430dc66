"""Trainer: checks the arguments, builds the engine and a run, and hands the run to a loop."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch

from levin.callbacks.defaults import default_callbacks, default_loggers
from levin.datamodule import LightningDataModule
from levin.engine import build_engine, describe_devices
from levin.loops.dataloaders import load_training
from levin.loops.progress import FitLoop
from levin.module import LightningModule
from levin.profilers.choose import resolve_profiler
from levin.resume import checkpoint_tree as tree
from levin.settings import (
    check_barebones,
    check_counts,
    check_flags,
    check_limit,
    defaults_from_environment,
    parse_duration,
)
from levin.trainer import entry, spawned_run
from levin.trainer.properties import TrainerProperties
from levin.utilities.exceptions import MisconfigurationException, value_error
from levin.utilities.filesystem import is_local
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.states import GradClipAlgorithmType, TrainerFn

if TYPE_CHECKING:
    from levin.accelerators import Accelerator
    from levin.hooks import Callback
    from levin.loggers.logger import Logger
    from levin.profilers.profiler import Profiler
    from levin.strategies.strategy import Strategy
    from levin.utilities.types import PathLike


class Trainer(TrainerProperties):
    """Trains, validates, tests and predicts with a LightningModule.

    Args:
        accelerator: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, ``"auto"`` or an Accelerator.
        strategy: Name of a strategy, ``"auto"`` or a Strategy.
        devices: How many devices, which ones (a list), ``"auto"`` or -1 for all.
        num_nodes: Machines.
        precision: ``"32-true"`` (default), ``"64-true"``, ``"16-mixed"``, ``"bf16-mixed"``, ``"16-true"``, ``"bf16-true"``.
        logger: One or several loggers; True for TensorBoard (or CSV) under ``default_root_dir``; False for none.
        callbacks: One or several callbacks.
        fast_dev_run: Run so many batches of each loop (True: 1) with loggers and checkpoints off.
        max_epochs: Epochs at most; -1 for no limit.
        min_epochs: Epochs at least, whoever asks to stop.
        max_steps: Optimizer steps at most; -1 for no limit.
        min_steps: Optimizer steps at least, whoever asks to stop.
        max_time: Time at most, as ``"DD:HH:MM:SS"``, timedelta or dict.
        limit_train_batches: Batches of an epoch (int), or their fraction (float).
        limit_val_batches: The same for validation, per loader.
        limit_test_batches: The same for test, per loader.
        limit_predict_batches: The same for predict, per loader.
        overfit_batches: Train and validate on so many batches, or such a fraction, without shuffling.
        val_check_interval: Validate after such a fraction of an epoch (float), every so many batches (int) or so much time.
        check_val_every_n_epoch: Validate every so many epochs; None counts batches across epochs.
        num_sanity_val_steps: Validation batches to try before training; -1 for all.
        log_every_n_steps: Log every so many steps; 0 for never.
        enable_checkpointing: Whether to save checkpoints.
        enable_progress_bar: Whether to show a progress bar.
        enable_model_summary: Whether to print a summary of the model.
        accumulate_grad_batches: Batches whose gradients are averaged into one step.
        gradient_clip_val: Largest norm, or value, of the gradients.
        gradient_clip_algorithm: ``"norm"`` (default) or ``"value"``.
        deterministic: Whether to use deterministic algorithms only; ``"warn"`` to warn where there is none.
        benchmark: Sets ``torch.backends.cudnn.benchmark``.
        inference_mode: Whether evaluation outside fit uses ``torch.inference_mode`` rather than ``no_grad``.
        use_distributed_sampler: Whether to split the data between ranks.
        profiler: ``"simple"``, ``"advanced"``, ``"pytorch"``, ``"xla"`` or a Profiler.
        detect_anomaly: Whether autograd looks for NaNs and their origin.
        barebones: Switch off everything that costs time.
        plugins: Precision, CheckpointIO, ClusterEnvironment or LayerSync of your own.
        sync_batchnorm: Whether batch norms share their statistics between ranks.
        reload_dataloaders_every_n_epochs: Ask for the loaders again every so many epochs.
        default_root_dir: Folder for logs and checkpoints; the working directory by default.
        enable_autolog_hparams: Whether to log hyper-parameters at the start of a run.
        model_registry: Name in a model registry, which ``ckpt_path="registry"`` stands for.
        suggest_integrations: Accepted for compatibility.

    Raises:
        MisconfigurationException: A value that cannot be meant, with the way out (a ValueError).

    Example:
        >>> trainer = Trainer(max_epochs=10)  # doctest: +SKIP
        >>> trainer.fit(model, datamodule=datamodule)  # doctest: +SKIP
    """

    @defaults_from_environment
    def __init__(
        self,
        *,
        accelerator: Union[str, Accelerator] = "auto",
        strategy: Union[str, Strategy] = "auto",
        devices: Union[list[int], str, int] = "auto",
        num_nodes: int = 1,
        precision: Optional[Union[str, int]] = None,
        logger: Optional[Union[Logger, Iterable[Logger], bool]] = None,
        callbacks: Optional[Union[list[Callback], Callback]] = None,
        fast_dev_run: Union[int, bool] = False,
        max_epochs: Optional[int] = None,
        min_epochs: Optional[int] = None,
        max_steps: int = -1,
        min_steps: Optional[int] = None,
        max_time: Optional[Union[str, timedelta, dict[str, int]]] = None,
        limit_train_batches: Optional[Union[int, float]] = None,
        limit_val_batches: Optional[Union[int, float]] = None,
        limit_test_batches: Optional[Union[int, float]] = None,
        limit_predict_batches: Optional[Union[int, float]] = None,
        overfit_batches: Union[int, float] = 0.0,
        val_check_interval: Optional[Union[int, float, str, timedelta, dict[str, int]]] = None,
        check_val_every_n_epoch: Optional[int] = 1,
        num_sanity_val_steps: Optional[int] = None,
        log_every_n_steps: Optional[int] = None,
        enable_checkpointing: Optional[bool] = None,
        enable_progress_bar: Optional[bool] = None,
        enable_model_summary: Optional[bool] = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: Optional[Union[int, float]] = None,
        gradient_clip_algorithm: Optional[str] = None,
        deterministic: Optional[Union[bool, Literal["warn"]]] = None,
        benchmark: Optional[bool] = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Optional[Union[Profiler, str]] = None,
        detect_anomaly: bool = False,
        barebones: bool = False,
        plugins: Optional[Any] = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: Optional[PathLike] = None,
        enable_autolog_hparams: bool = True,
        model_registry: Optional[str] = None,
        suggest_integrations: bool = True,
    ) -> None:
        if barebones:
            check_barebones(
                dict(
                    enable_checkpointing=enable_checkpointing, logger=logger, enable_progress_bar=enable_progress_bar,
                    log_every_n_steps=log_every_n_steps, enable_model_summary=enable_model_summary,
                    num_sanity_val_steps=num_sanity_val_steps, fast_dev_run=fast_dev_run,
                    detect_anomaly=detect_anomaly, profiler=profiler,
                )
            )  # fmt: skip
        logger = not barebones if logger is None else logger
        enable_checkpointing = not barebones if enable_checkpointing is None else enable_checkpointing
        enable_progress_bar = not barebones if enable_progress_bar is None else enable_progress_bar
        enable_model_summary = not barebones if enable_model_summary is None else enable_model_summary
        num_sanity_val_steps = (0 if barebones else 2) if num_sanity_val_steps is None else num_sanity_val_steps
        log_every_n_steps = (0 if barebones else 50) if log_every_n_steps is None else log_every_n_steps
        if type(max_steps) is float and max_steps == int(max_steps):
            max_steps = int(max_steps)  # people write 1e5
        check_counts(
            dict(
                max_epochs=max_epochs, min_epochs=min_epochs, max_steps=max_steps, min_steps=min_steps, num_nodes=num_nodes,
                accumulate_grad_batches=accumulate_grad_batches, log_every_n_steps=log_every_n_steps,
                num_sanity_val_steps=num_sanity_val_steps, check_val_every_n_epoch=check_val_every_n_epoch,
                reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            )
        )  # fmt: skip
        check_flags(
            dict(
                barebones=barebones, enable_checkpointing=enable_checkpointing, enable_progress_bar=enable_progress_bar,
                enable_model_summary=enable_model_summary, benchmark=benchmark, inference_mode=inference_mode,
                use_distributed_sampler=use_distributed_sampler, detect_anomaly=detect_anomaly,
                sync_batchnorm=sync_batchnorm, enable_autolog_hparams=enable_autolog_hparams,
                suggest_integrations=suggest_integrations,
            )
        )  # fmt: skip
        super().__init__(FitLoop(min_epochs, max_epochs, min_steps, max_steps))

        # Limits
        if not isinstance(fast_dev_run, int) or fast_dev_run < 0:
            raise value_error("fast_dev_run", fast_dev_run, "must be a bool or an int >= 0", "Use True for one batch.")
        self.barebones: bool = barebones
        self.limit_train_batches = check_limit(limit_train_batches, "limit_train_batches")
        self.limit_val_batches = check_limit(limit_val_batches, "limit_val_batches")
        self.limit_test_batches = check_limit(limit_test_batches, "limit_test_batches")
        self.limit_predict_batches = check_limit(limit_predict_batches, "limit_predict_batches")
        self.overfit_batches = check_limit(overfit_batches, "overfit_batches")
        if self.overfit_batches:
            self.limit_train_batches = self.limit_val_batches = self.overfit_batches
        self.num_sanity_val_steps: int | float = math.inf if num_sanity_val_steps == -1 else num_sanity_val_steps
        self.log_every_n_steps: int = log_every_n_steps
        self.check_val_every_n_epoch: Optional[int] = check_val_every_n_epoch
        self.val_check_batch: Optional[int | float] = None
        self._take_val_check_interval(val_check_interval)
        self.reload_dataloaders_every_n_epochs: int = reload_dataloaders_every_n_epochs
        self.fast_dev_run: int | bool = True if fast_dev_run is True or fast_dev_run == 1 else fast_dev_run
        if fast_dev_run:
            self._take_fast_dev_run(int(fast_dev_run))

        # The step
        if gradient_clip_val is not None and (
            isinstance(gradient_clip_val, bool) or not isinstance(gradient_clip_val, (int, float))
        ):
            raise TypeError(f"gradient_clip_val must be an int or a float, received {gradient_clip_val!r}.")
        if gradient_clip_algorithm is not None:
            gradient_clip_algorithm = str(gradient_clip_algorithm).lower()
            if gradient_clip_algorithm not in ("norm", "value"):
                raise value_error("gradient_clip_algorithm", gradient_clip_algorithm, "must be 'norm' or 'value'")
        self.gradient_clip_val = gradient_clip_val
        self.gradient_clip_algorithm: Optional[GradClipAlgorithmType] = (
            None if gradient_clip_algorithm is None else GradClipAlgorithmType(gradient_clip_algorithm)
        )
        self.accumulate_grad_batches: int = accumulate_grad_batches
        self._detect_anomaly: bool = detect_anomaly
        if detect_anomaly:
            rank_zero_info(
                "You have turned on `Trainer(detect_anomaly=True)`, which slows training down a lot. Use it to find a NaN."
            )
        self._inference_mode: bool = inference_mode
        self._use_distributed_sampler: bool = use_distributed_sampler

        # The engine
        if deterministic not in (None, True, False, "warn"):
            raise value_error("deterministic", deterministic, "must be True, False or 'warn'")
        self._engine = build_engine(
            accelerator=accelerator, strategy=strategy, devices=devices, num_nodes=num_nodes, precision=precision,
            plugins=plugins, sync_batchnorm=sync_batchnorm,
        )  # fmt: skip
        if deterministic is not None:
            torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            benchmark = False if benchmark is None else benchmark
        if benchmark is not None:
            torch.backends.cudnn.benchmark = benchmark
        describe_devices(self._engine)
        self.profiler: Profiler = resolve_profiler(profiler)

        # Folders, loggers, callbacks
        root = os.getcwd() if default_root_dir is None else os.fspath(default_root_dir)
        self._default_root_dir: str = os.path.expanduser(root) if is_local(root) else root
        self.enable_autolog_hparams: bool = enable_autolog_hparams
        # A version behind a colon is that of a model, not of the place that models are kept in.
        self._model_registry: Optional[str] = model_registry.split(":")[0] if model_registry else None
        self.loggers: list[Logger] = default_loggers(logger, self._default_root_dir, is_dry=bool(fast_dev_run))
        self.callbacks: list[Callback] = default_callbacks(
            callbacks, max_time=max_time, enable_checkpointing=enable_checkpointing,
            enable_progress_bar=enable_progress_bar, enable_model_summary=enable_model_summary,
        )  # fmt: skip
        if max_epochs is None and max_steps == -1 and not fast_dev_run:
            self._warns_about_max_epochs = not any(type(c).__name__ == "Timer" for c in self.callbacks)
        self._max_time = max_time

    def _take_val_check_interval(self, value: Any) -> None:
        duration = parse_duration(value, "val_check_interval")
        self._val_check_seconds: Optional[float] = None if duration is None else duration.total_seconds()
        interval = 1.0 if value is None or duration is not None else value
        # Packages give min(interval, max_steps); without a step there is nothing to validate after.
        is_unused = interval == 0 == self.max_steps
        if isinstance(interval, bool) or not isinstance(interval, (int, float)) or (interval <= 0 and not is_unused):
            raise value_error("val_check_interval", value, "must be an int >= 1, a float in (0.0, 1.0] or a duration")
        if isinstance(interval, float) and interval > 1.0:
            if interval != int(interval):
                raise value_error(
                    "val_check_interval", value, "must be an int >= 1, a float in (0.0, 1.0] or a duration"
                )
            interval = int(interval)
        if (
            self.check_val_every_n_epoch is None
            and isinstance(interval, float)
            and value is not None
            and duration is None
        ):
            raise MisconfigurationException(
                f"val_check_interval must be an int with check_val_every_n_epoch=None, received {value}. "
                "Give the number of training batches between validations."
            )
        self.val_check_interval: int | float = interval

    def _take_fast_dev_run(self, batches: int) -> None:
        rank_zero_info(
            f"Running in `fast_dev_run` mode: will run the requested loop using {batches} batch(es). "
            "Logging and checkpointing is suppressed."
        )
        if not self.overfit_batches:
            self.limit_train_batches = self.limit_val_batches = batches
        self.limit_test_batches = self.limit_predict_batches = batches
        self.fit_loop.max_epochs = 1
        self.fit_loop.epoch_loop.max_steps = batches
        self.num_sanity_val_steps = 0
        self.val_check_interval = 1.0
        self._val_check_seconds = None
        self.check_val_every_n_epoch = 1

    # ---------------------------------------------------------------- the four methods, and saving

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        ckpt_path: Optional[PathLike] = None,
        weights_only: Optional[bool] = None,
    ) -> None:
        """Train ``model``.

        Args:
            model: The module.
            train_dataloaders: A loader, a collection of loaders, or a LightningDataModule.
            val_dataloaders: A loader or a collection of loaders.
            datamodule: Gives the loaders instead.
            ckpt_path: Path or URL of the checkpoint to go on from; ``"last"``, ``"best"``, ``"hpc"`` or ``"auto"``.
            weights_only: False allows the checkpoint to run code while it is read. Only for files you trust.
        """
        self.should_stop = False
        entry.begin(self, TrainerFn.FITTING, model, datamodule, {"train": train_dataloaders, "val": val_dataloaders})
        entry.execute(self, ckpt_path, weights_only, model_given=True)

    def validate(
        self,
        model: Optional[LightningModule] = None,
        dataloaders: Any = None,
        ckpt_path: Optional[PathLike] = None,
        verbose: bool = True,
        datamodule: Optional[LightningDataModule] = None,
        weights_only: Optional[bool] = None,
    ) -> list[dict[str, float]]:
        """Run one validation.

        Args:
            model: The module; by default the one of the last run.
            dataloaders: A loader, a collection of loaders, or a LightningDataModule.
            ckpt_path: Weights to load first; as in :meth:`fit`.
            verbose: Whether to print a table of the results.
            datamodule: Gives the loaders instead.
            weights_only: As in :meth:`fit`.

        Returns:
            The logged epoch values, one dict per loader.
        """
        entry.begin(self, TrainerFn.VALIDATING, model, datamodule, {"val": dataloaders})
        return entry.show_results(self, entry.execute(self, ckpt_path, weights_only, model is not None), verbose)

    def test(
        self,
        model: Optional[LightningModule] = None,
        dataloaders: Any = None,
        ckpt_path: Optional[PathLike] = None,
        verbose: bool = True,
        datamodule: Optional[LightningDataModule] = None,
        weights_only: Optional[bool] = None,
    ) -> list[dict[str, float]]:
        """Run the test. Arguments and result as in :meth:`validate`."""
        entry.begin(self, TrainerFn.TESTING, model, datamodule, {"test": dataloaders})
        return entry.show_results(self, entry.execute(self, ckpt_path, weights_only, model is not None), verbose)

    def predict(
        self,
        model: Optional[LightningModule] = None,
        dataloaders: Any = None,
        datamodule: Optional[LightningDataModule] = None,
        return_predictions: Optional[bool] = None,
        ckpt_path: Optional[PathLike] = None,
        weights_only: Optional[bool] = None,
    ) -> Optional[list[Any]]:
        """Predict on every batch.

        Args:
            model: The module; by default the one of the last run.
            dataloaders: A loader, a list of loaders, or a LightningDataModule.
            datamodule: Gives the loaders instead.
            return_predictions: Whether to return the outputs; True by default where one process runs.
            ckpt_path: Weights to load first; as in :meth:`fit`.
            weights_only: As in :meth:`fit`.

        Returns:
            The outputs per batch, on the CPU; a list of such lists with several loaders; None if not kept.
        """
        entry.begin(self, TrainerFn.PREDICTING, model, datamodule, {"predict": dataloaders})
        self._returns_predictions = entry.keeps_predictions(self, return_predictions)
        result: Optional[list[Any]] = entry.execute(self, ckpt_path, weights_only, model is not None)
        return result

    @contextmanager
    def init_module(self, empty_init: Optional[bool] = None) -> Iterator[None]:
        """Create modules inside on the right device and in the right dtype.

        Args:
            empty_init: Whether to skip the initialization of weights that are loaded anyway.
        """
        with self.strategy.module_init_context(empty_init=empty_init):
            yield

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each node."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def save_checkpoint(
        self, filepath: PathLike, weights_only: Optional[bool] = None, storage_options: Any = None
    ) -> None:
        """Save the run, so that ``fit(ckpt_path=filepath)`` goes on from here.

        Args:
            filepath: Path or URL.
            weights_only: Whether to save only what inference needs.
            storage_options: Passed to the CheckpointIO.

        Raises:
            AttributeError: No model was attached yet.
        """
        if self._module is None:
            raise AttributeError(
                "Saving a checkpoint is only possible after a model was attached, received none. Call `fit` first."
            )
        with self.profiler.profile("save_checkpoint"):
            checkpoint = tree.collect(self, weights_only=bool(weights_only))
            self.strategy.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
            self.strategy.barrier("Trainer.save_checkpoint")

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that a whole fit will take, as far as known. Loads the training data if needed."""
        if self.max_epochs == -1:
            return math.inf if self.max_steps == -1 else int(self.max_steps)
        load_training(self)
        batches = self._num_training_batches
        if batches == math.inf:
            return int(self.max_steps)
        steps: int | float = math.ceil(batches / self.accumulate_grad_batches) * max(self.max_epochs or 1, 1)
        return min(self.max_steps, steps) if self.max_steps != -1 else steps

    # ---------------------------------------------------------------- asked for by launchers and modules

    def collect_results(self) -> dict[str, Any]:
        """Return what the Trainer in the process that started this one shall know of the run."""
        return spawned_run.collect_results(self)

    def restore_results(self, results: dict[str, Any]) -> None:
        """Take up the results of a run in another process."""
        spawned_run.restore_results(self, results)

    def _manual_backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        self._step.backward(loss, *args, **kwargs)
