"""Trainer: checks the arguments, builds the engine, and hands each call to a run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

import torch

from levin.accelerators import Accelerator
from levin.callbacks.checkpoint import Checkpoint
from levin.callbacks.defaults import default_callbacks, default_loggers
from levin.callbacks.early_stopping import EarlyStopping
from levin.callbacks.progress.progress_bar import ProgressBar
from levin.counters import EvaluationLoop, FitLoop, Loops
from levin.datamodule import LightningDataModule
from levin.engine import Engine, Plugins, build_engine, describe_devices, use_deterministic
from levin.hooks import Callback
from levin.loggers.logger import Logger
from levin.loops.dataloaders import load_training
from levin.loops.run import Run, find_log_dir
from levin.module import LightningModule
from levin.precision.choose import PrecisionInput
from levin.precision.precision import Precision
from levin.profilers.choose import resolve_profiler
from levin.profilers.profiler import Profiler
from levin.resume.checkpoint_tree import save_checkpoint
from levin.settings import Settings, check_settings, defaults_from_environment
from levin.strategies.strategy import Strategy
from levin.trainer import entry, spawned_run
from levin.trainer.properties import callbacks_of, first_of, lent, lent_anew, of_run, part, setting, shared, stage
from levin.utilities.numbers import to_numbers
from levin.utilities.properties import reads
from levin.utilities.states import GradClipAlgorithmType, RunningStage, StopFlags, TrainerFn, TrainerState
from levin.utilities.types import Kwargs, LRSchedulerConfig, PathLike, StateDict

if TYPE_CHECKING:
    from levin.explain.text import Explanation

Limit = Union[int, float]


class Trainer:
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
        limit_test_batches, limit_predict_batches: The same for test and predict, per loader.
        overfit_batches: Train and validate on so many batches, or such a fraction, without shuffling.
        val_check_interval: Validate after such a fraction of an epoch (float), every so many batches (int) or so much time.
        check_val_every_n_epoch: Validate every so many epochs; None counts batches across epochs.
        num_sanity_val_steps: Validation batches to try before training; -1 for all.
        log_every_n_steps: Log every so many steps; 0 for never.
        enable_checkpointing: Whether to save checkpoints.
        enable_progress_bar: Whether to show a progress bar.
        enable_model_summary: Whether to print a summary of the model.
        accumulate_grad_batches: Batches whose gradients are averaged into one step; ``"auto"``: one, split where it does not fit.
        gradient_clip_val: Largest norm, or value, of the gradients.
        gradient_clip_algorithm: ``"norm"`` (default) or ``"value"``.
        deterministic: Whether to use deterministic algorithms only; ``"warn"`` to warn where there is none.
        benchmark: Sets ``torch.backends.cudnn.benchmark``.
        inference_mode: Whether evaluation outside fit uses ``torch.inference_mode`` rather than ``no_grad``.
        use_distributed_sampler: Whether to split the data between ranks.
        profiler: ``"simple"``, ``"advanced"``, ``"pytorch"``, ``"xla"`` or a Profiler.
        detect_anomaly: Whether autograd looks for NaNs and their origin.
        compile: Whether to ``torch.compile`` the steps; also a mode, a dict of options, or ``"blocks"`` for repeated blocks.
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

    # Parts: set before a call, or while one runs.
    settings: Settings = shared("settings", "The checked arguments.")
    callbacks: list[Callback] = shared("callbacks", "All callbacks, in calling order.")
    loggers: list[Logger] = shared("loggers", "All loggers.")
    profiler: Profiler = shared("profiler", "The profiler.")
    datamodule: Optional[LightningDataModule] = shared("datamodule", "The data module of the present or last call.")
    # Arguments
    accumulate_grad_batches: int = setting("accumulate_grad_batches")
    barebones: bool = setting("barebones")
    check_val_every_n_epoch: Optional[int] = setting("check_val_every_n_epoch")
    default_root_dir: str = setting("default_root_dir")
    _default_root_dir: str = default_root_dir  # nemo sets it by this name
    enable_autolog_hparams: bool = setting("enable_autolog_hparams")
    fast_dev_run: Union[int, bool] = setting("fast_dev_run")
    gradient_clip_algorithm: Optional[GradClipAlgorithmType] = setting("gradient_clip_algorithm")
    gradient_clip_val: Optional[Limit] = setting("gradient_clip_val")
    limit_train_batches: Limit = setting("limit_train_batches")
    limit_val_batches: Limit = setting("limit_val_batches")
    limit_test_batches: Limit = setting("limit_test_batches")
    limit_predict_batches: Limit = setting("limit_predict_batches")
    log_every_n_steps: int = setting("log_every_n_steps")
    num_sanity_val_steps: Limit = setting("num_sanity_val_steps")
    overfit_batches: Limit = setting("overfit_batches")
    reload_dataloaders_every_n_epochs: int = setting("reload_dataloaders_every_n_epochs")
    val_check_interval: Limit = setting("val_check_interval")
    val_check_interval_seconds: Optional[float] = reads("settings.val_check_seconds", "Seconds between validations.")
    # The engine
    accelerator: Accelerator = reads("_engine.accelerator", "The hardware.")
    strategy: Strategy = reads("_engine.strategy", "How the module runs on it.")
    precision_plugin: Precision = reads("strategy.precision", "The precision.")
    scaler: Any = reads("precision_plugin.scaler", "The gradient scaler, or None.")
    precision: str = reads("precision_plugin.precision", "The precision, as a string.")
    model: Optional[torch.nn.Module] = reads("strategy.model", "The module as it runs, wrapped or not.")
    global_rank: int = reads("strategy.global_rank", "Rank among all processes.")
    local_rank: int = reads("strategy.local_rank", "Rank among the processes of this machine.")
    node_rank: int = reads("strategy.node_rank", "Index of this machine.")
    world_size: int = reads("strategy.world_size", "Number of processes.")
    num_nodes: int = reads("_engine.num_nodes", "Number of machines.")
    is_global_zero: bool = reads("strategy.is_global_zero", "Whether this is the first process of all.")
    distributed_sampler_kwargs: Optional[Kwargs] = reads(
        "strategy.distributed_sampler_kwargs", "What a DistributedSampler needs; None on one device."
    )
    # Under these names extensions read the engine, and what is shown for them alone.
    _accelerator_connector: Engine = reads("_engine", "The engine.")
    _active_loop: Any = lent_anew("active_loop")
    _evaluation_loop: Any = lent_anew("evaluation_loop")
    _callback_connector: Any = lent("_CallbackConnector")
    _checkpoint_connector: Any = lent("_CheckpointConnector")
    _results: None = None
    # Callbacks by kind
    checkpoint_callbacks: list[Checkpoint] = callbacks_of(Checkpoint, "All callbacks that save checkpoints.")
    checkpoint_callback: Any = first_of("checkpoint_callbacks", "The first callback that saves checkpoints, or None.")
    early_stopping_callbacks: list[EarlyStopping] = callbacks_of(EarlyStopping, "All EarlyStopping callbacks.")
    early_stopping_callback: Optional[EarlyStopping] = first_of(
        "early_stopping_callbacks", "The first EarlyStopping callback, or None."
    )
    _progress_bars: list[ProgressBar] = callbacks_of(ProgressBar, "All progress bars.")
    progress_bar_callback: Optional[ProgressBar] = first_of("_progress_bars", "The progress bar, or None.")
    # Loops: limits and counters, which go on from one call to the next.
    fit_loop: FitLoop = reads("loops.fit", "Limits and counters of training.")
    validate_loop: EvaluationLoop = part("loops.validate", "Counters of ``validate``.")
    test_loop: EvaluationLoop = part("loops.test", "Counters of ``test``.")
    predict_loop: EvaluationLoop = reads("loops.predict", "Counters of ``predict``.")
    current_epoch: int = reads("loops.fit.epoch_progress.current.completed", "Completed epochs.")
    global_step: int = reads("loops.fit.epoch_loop.global_step", "Optimizer steps taken.")
    max_epochs: Optional[int] = reads("loops.fit.max_epochs", "Epochs at most.")
    min_epochs: Optional[int] = reads("loops.fit.min_epochs", "Epochs at least.")
    max_steps: int = reads("loops.fit.epoch_loop.max_steps", "Optimizer steps at most.")
    min_steps: Optional[int] = reads("loops.fit.epoch_loop.min_steps", "Optimizer steps at least.")
    num_training_batches: Limit = reads("loops.fit.max_batches", "Batches of a training epoch; inf when unknown.")
    num_sanity_val_batches: list[Limit] = reads("loops.fit.num_sanity_val_batches", "Batches of the sanity check.")
    num_val_batches: list[Limit] = reads("loops.validate.max_batches", "Batches of a validation, per loader.")
    num_test_batches: list[Limit] = reads("loops.test.max_batches", "Batches of the test, per loader.")
    num_predict_batches: list[Limit] = reads("loops.predict.max_batches", "Batches to predict on, per loader.")
    val_check_batch: Optional[Limit] = part("loops.fit.val_check_batch", "Batches between validations, once known.")
    is_last_batch: bool = reads("loops.fit.epoch_loop.batch_progress.is_last_batch", "Whether it is the epoch's last.")
    optimizers: list[torch.optim.Optimizer] = part(
        "strategy.optimizers", "The torch optimizers of the present or last fit."
    )
    lr_scheduler_configs: list[LRSchedulerConfig] = reads(
        "strategy.lr_scheduler_configs", "The schedulers of the present or last fit, with when they are stepped."
    )
    # Where a call is
    should_stop: bool = part(
        "_flags.should_stop", "Whether training shall end; set it to end training after this batch."
    )
    received_sigterm: bool = part("_flags.received_sigterm", "Whether this process was asked to terminate.")
    training: bool = stage(RunningStage.TRAINING, "Whether the training loop runs.")
    validating: bool = stage(RunningStage.VALIDATING, "Whether a validation runs.")
    testing: bool = stage(RunningStage.TESTING, "Whether a test runs.")
    predicting: bool = stage(RunningStage.PREDICTING, "Whether predictions run.")
    sanity_checking: bool = stage(RunningStage.SANITY_CHECKING, "Whether the validation before training runs.")
    # The present or last run
    lightning_module: Any = property(entry.module_of, doc="The user's module; None before the first call.")
    enable_validation: bool = of_run("enable_validation", False, "Whether validation runs inside fit.")
    is_filler: bool = of_run(
        "is_filler", False,
        "Whether this rank has no batch of its own in this step: it has a batch again, which counts for nothing.",
    )  # fmt: skip
    train_dataloader: Any = of_run("loaders.train.user_loaders", None, "The training loaders; None until loaded.")
    val_dataloaders: Any = of_run("loaders.val.user_loaders", None, "The validation loaders; None until loaded.")
    test_dataloaders: Any = of_run("loaders.test.user_loaders", None, "The test loaders; None until loaded.")
    predict_dataloaders: Any = of_run("loaders.predict.user_loaders", None, "The loaders of ``predict``.")

    @defaults_from_environment
    def __init__(
        self,
        *,
        accelerator: Union[str, Accelerator] = "auto",
        strategy: Union[str, Strategy] = "auto",
        devices: Union[list[int], str, int] = "auto",
        num_nodes: int = 1,
        precision: Optional[PrecisionInput] = None,
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
        accumulate_grad_batches: Union[int, Literal["auto"]] = 1,
        gradient_clip_val: Optional[Union[int, float]] = None,
        gradient_clip_algorithm: Optional[str] = None,
        deterministic: Optional[Union[bool, Literal["warn"]]] = None,
        benchmark: Optional[bool] = None,
        inference_mode: bool = True,
        use_distributed_sampler: bool = True,
        profiler: Optional[Union[Profiler, str]] = None,
        detect_anomaly: bool = False,
        compile: Optional[Union[bool, str, dict[str, Any]]] = None,
        barebones: bool = False,
        plugins: Plugins = None,
        sync_batchnorm: bool = False,
        reload_dataloaders_every_n_epochs: int = 0,
        default_root_dir: Optional[PathLike] = None,
        enable_autolog_hparams: bool = True,
        model_registry: Optional[str] = None,
        suggest_integrations: bool = True,
    ) -> None:
        arguments = dict(locals())
        self.run: Optional[Run] = None
        self.settings = settings = check_settings(arguments)
        self.loops = Loops(FitLoop(settings.min_epochs, settings.max_epochs, settings.min_steps, settings.max_steps))
        self.state = TrainerState()
        self._flags = StopFlags()
        self._given_ckpt_path: Optional[PathLike] = None
        self._engine = build_engine(
            accelerator=accelerator, strategy=strategy, devices=devices, num_nodes=num_nodes, precision=precision,
            plugins=plugins, sync_batchnorm=sync_batchnorm,
        )  # fmt: skip
        use_deterministic(deterministic, benchmark)
        describe_devices(self._engine)
        self.profiler = resolve_profiler(profiler)
        self.datamodule = None
        self.loggers = default_loggers(settings.logger, settings.default_root_dir, is_dry=bool(fast_dev_run))
        self.callbacks = default_callbacks(
            callbacks, max_time=max_time, enable_checkpointing=settings.enable_checkpointing,
            enable_progress_bar=settings.enable_progress_bar, enable_model_summary=settings.enable_model_summary,
        )  # fmt: skip

    # ---------------------------------------------------------------- the four methods, and saving

    def fit(
        self,
        model: LightningModule,
        train_dataloaders: object = None,
        val_dataloaders: object = None,
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
        loaders = {"train": train_dataloaders, "val": val_dataloaders}
        run = entry.begin(self, TrainerFn.FITTING, model, datamodule, loaders)
        entry.execute(self, run, ckpt_path, weights_only, model_given=True)

    def validate(
        self,
        model: Optional[LightningModule] = None,
        dataloaders: object = None,
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
        loaders = {"val": dataloaders}
        return entry.evaluate(self, TrainerFn.VALIDATING, model, datamodule, loaders, ckpt_path, weights_only, verbose)

    def test(
        self,
        model: Optional[LightningModule] = None,
        dataloaders: object = None,
        ckpt_path: Optional[PathLike] = None,
        verbose: bool = True,
        datamodule: Optional[LightningDataModule] = None,
        weights_only: Optional[bool] = None,
    ) -> list[dict[str, float]]:
        """Run the test. Arguments and result as in :meth:`validate`."""
        loaders = {"test": dataloaders}
        return entry.evaluate(self, TrainerFn.TESTING, model, datamodule, loaders, ckpt_path, weights_only, verbose)

    def predict(
        self,
        model: Optional[LightningModule] = None,
        dataloaders: object = None,
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
        run = entry.begin(self, TrainerFn.PREDICTING, model, datamodule, {"predict": dataloaders})
        run.keeps_predictions = entry.keeps_predictions(self.strategy, return_predictions)
        outputs: Optional[list[Any]] = entry.execute(self, run, ckpt_path, weights_only, model is not None)
        return outputs

    def explain(self, *args: Any, fn: str = "fit", **kwargs: Any) -> Explanation:
        """Say what a method with these arguments would do: its loop, flat, with file and line of all that it calls.

        It is read out of the run that set-up composes, so the hooks of set-up (``prepare_data``, ``setup``,
        ``configure_optimizers``) and those that give loaders are called. No batch is drawn, no checkpoint read, and
        nothing is logged or saved.

        Args:
            args, kwargs: The arguments of the method.
            fn: Which one: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``; ValueError for another.

        Example:
            >>> print(trainer.explain(model, datamodule=data, fn="test"))  # doctest: +SKIP
        """
        method = entry.method_named(fn)
        given = inspect.signature(getattr(Trainer, method)).bind(self, *args, **kwargs)
        return entry.explain(self, method, given.arguments)

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
        self, filepath: PathLike, weights_only: Optional[bool] = None, storage_options: object = None
    ) -> None:
        """Save the run, so that ``fit(ckpt_path=filepath)`` goes on from here.

        Args:
            filepath: Path or URL.
            weights_only: Whether to save only what inference needs.
            storage_options: Passed to the CheckpointIO.

        Raises:
            AttributeError: No model was attached yet.
        """
        run = entry.saved_run(self) if self.run is None or self.state.status != "running" else self.run
        save_checkpoint(run, filepath, weights_only, storage_options)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that a whole fit will take, as far as known. Loads the training data if needed."""
        if self.max_epochs == -1:
            return math.inf if self.max_steps == -1 else int(self.max_steps)
        if self.run is not None:
            load_training(self.run)
        batches = self.num_training_batches
        if batches == math.inf:
            return int(self.max_steps)
        steps: int | float = math.ceil(batches / self.accumulate_grad_batches) * max(self.max_epochs or 1, 1)
        return min(self.max_steps, steps) if self.max_steps != -1 else steps

    # ---------------------------------------------------------------- asked for by launchers and modules

    def collect_results(self) -> StateDict:
        """Return what the Trainer in the process that started this one shall know of the run."""
        assert self.run is not None
        return spawned_run.collect_results(self.run)

    def restore_results(self, results: dict[str, object]) -> None:
        """Take up the results of a run in another process."""
        assert self.run is not None
        spawned_run.restore_results(self.run, results)

    # ---------------------------------------------------------------- what users read

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices of this machine."""
        devices = self._engine.parallel_devices or [self.strategy.root_device]
        return [device.index if device.index is not None else i for i, device in enumerate(devices)]

    @property
    def num_devices(self) -> int:
        """Number of devices of this machine."""
        return len(self.device_ids)

    @property
    def logger(self) -> Optional[Logger]:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Optional[Logger]) -> None:
        self.loggers = [logger] if logger else []

    @property
    def log_dir(self) -> Optional[str]:
        """Folder of the first logger, else ``default_root_dir``; the same on all ranks, so call it on all."""
        return find_log_dir(self.loggers, self.default_root_dir, self.strategy)

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or sanity check runs."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last call failed."""
        return self.state.status == "interrupted"

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """All logged values: in training those of the step and the epoch, in evaluation those of the epoch."""
        return {} if self.run is None else self.run.read_metrics().callback

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The values that went, or go, to the loggers."""
        return {} if self.run is None else self.run.read_metrics().logged

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The values logged with ``prog_bar=True``, as floats; reading them waits for the device."""
        return {} if self.run is None else to_numbers(self.run.read_metrics().progress_bar)

    @property
    def ckpt_path(self) -> Optional[PathLike]:
        """The checkpoint that the present or last run started from; one that is set is what the next call starts from."""
        return self._given_ckpt_path or (None if self.run is None else self.run.ckpt_path)

    @ckpt_path.setter
    def ckpt_path(self, path: Optional[PathLike]) -> None:
        self._given_ckpt_path = path
        if self.run is not None:
            self.run.ckpt_path = path
