"""What users read and set on a Trainer: each property says where its value lives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Optional

import torch

from levin.callbacks.checkpoint import Checkpoint
from levin.callbacks.early_stopping import EarlyStopping
from levin.callbacks.progress.progress_bar import ProgressBar
from levin.log_store import Metrics
from levin.loops.logging import to_floats
from levin.loops.progress import EvaluationLoop, FitLoop
from levin.loops.stage_loaders import StageLoaders
from levin.module import LightningModule
from levin.ranks.signals import Signals
from levin.resume.resume_state import ResumeState
from levin.utilities.move import move_data_to_device
from levin.utilities.overrides import is_overridden
from levin.utilities.states import RunningStage, TrainerState, TrainerStatus

if TYPE_CHECKING:
    from levin.accelerators import Accelerator
    from levin.datamodule import LightningDataModule
    from levin.engine import Engine
    from levin.hooks import Callback
    from levin.loggers.logger import Logger
    from levin.loops.run import Run
    from levin.precision.precision import Precision
    from levin.profilers.profiler import Profiler
    from levin.ranks.hang_watchdog import Watchdog
    from levin.strategies.strategy import Strategy
    from levin.utilities.types import LRSchedulerConfig, PathLike


class TrainerProperties:
    """The state of a Trainer between and during its calls, and the view that users have of it.

    Args:
        fit_loop: The limits and counters of training.
    """

    # Settings, given by the Trainer's constructor.
    _engine: Engine
    _default_root_dir: str
    _val_check_seconds: Optional[float]
    accumulate_grad_batches: int
    callbacks: list[Callback]
    limit_val_batches: int | float
    loggers: list[Logger]
    profiler: Profiler

    def __init__(self, fit_loop: FitLoop) -> None:
        self.fit_loop = fit_loop
        self.validate_loop = EvaluationLoop()
        self.test_loop = EvaluationLoop()
        self.predict_loop = EvaluationLoop(has_last=False)
        self.state = TrainerState()
        self.should_stop: bool = False
        self.received_sigterm: bool = False
        self.datamodule: Optional[LightningDataModule] = None
        self._module: Optional[LightningModule] = None
        self._run: Optional[Run] = None
        self._watchdog: Optional[Watchdog] = None
        self._step: Any = None
        self._val_step: Any = None
        self._metrics = Metrics({}, {}, {})
        self._lightning_optimizers: list[Any] = []
        self._is_setting_up: bool = False
        self._predictions: list[list[Any]] = []
        self._returns_predictions: bool = True
        self._num_training_batches: int | float = math.inf
        self._num_sanity_val_batches: list[int | float] = []
        self._last_validation_time: float = 0.0
        self._warns_about_max_epochs: bool = False
        self._explained_minima: bool = False
        self._resume = ResumeState()
        self._signals = Signals()
        self._ckpt_path: Optional[PathLike] = None
        self._ckpt_path_is_set: bool = False
        self._train_loaders = StageLoaders("train")
        self._val_loaders = StageLoaders("val")
        self._test_loaders = StageLoaders("test")
        self._predict_loaders = StageLoaders("predict")
        fit_loop._data_source = self._train_loaders
        fit_loop.epoch_loop.val_loop._data_source = self.validate_loop._data_source = self._val_loaders
        self.test_loop._data_source = self._test_loaders
        self.predict_loop._data_source = self._predict_loaders

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the parts of a run, which are composed anew by the next call."""
        kept = {**self.__dict__, "_run": None, "_step": None, "_val_step": None, "_lightning_optimizers": []}
        return {**kept, "_resume": ResumeState()}

    # ---------------------------------------------------------------- parts

    @property
    def accelerator(self) -> Accelerator:
        """The hardware."""
        return self._engine.accelerator

    @property
    def strategy(self) -> Strategy:
        """How the module runs on it."""
        return self._engine.strategy

    @property
    def _accelerator_connector(self) -> Engine:
        """The engine, under the name by which extensions ask whether several processes run."""
        return self._engine

    @property
    def precision_plugin(self) -> Precision:
        """The precision."""
        return self.strategy.precision

    @property
    def precision(self) -> str:
        """The precision, as a string."""
        return self.precision_plugin.precision

    @property
    def scaler(self) -> Any:
        """The gradient scaler, or None."""
        return getattr(self.precision_plugin, "scaler", None)

    @property
    def global_rank(self) -> int:
        """Rank among all processes."""
        return self.strategy.global_rank

    @property
    def local_rank(self) -> int:
        """Rank among the processes of this machine."""
        return self.strategy.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this machine."""
        return self.strategy.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.strategy.world_size

    @property
    def num_nodes(self) -> int:
        """Number of machines."""
        return self._engine.num_nodes

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
    def is_global_zero(self) -> bool:
        """Whether this is the first process of all."""
        return self.strategy.is_global_zero

    @property
    def distributed_sampler_kwargs(self) -> Optional[dict[str, Any]]:
        """What a DistributedSampler needs; None on one device."""
        return self.strategy.distributed_sampler_kwargs

    @property
    def model(self) -> Optional[torch.nn.Module]:
        """The module as it runs, wrapped where the strategy wraps it."""
        return getattr(self.strategy, "model", None)

    @property
    def lightning_module(self) -> LightningModule:
        """The user's module."""
        return self._module  # type: ignore[return-value]  # None before the first run, as users expect

    @property
    def optimizers(self) -> list[Any]:
        """The torch optimizers of the present or last fit."""
        return getattr(self.strategy, "optimizers", None) or []

    @optimizers.setter
    def optimizers(self, optimizers: list[Any]) -> None:
        self.strategy.optimizers = optimizers

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers of the present or last fit, with when they are stepped."""
        return getattr(self.strategy, "lr_scheduler_configs", None) or []

    @property
    def logger(self) -> Optional[Logger]:
        """The first logger, or None."""
        return self.loggers[0] if self.loggers else None

    @logger.setter
    def logger(self, logger: Optional[Logger]) -> None:
        self.loggers = [logger] if logger else []

    @property
    def default_root_dir(self) -> str:
        """Folder for logs and checkpoints where no logger says otherwise."""
        return self._default_root_dir

    @property
    def log_dir(self) -> Optional[str]:
        """Folder of the first logger, else ``default_root_dir``; the same on all ranks, so call it on all."""
        logger = self.logger
        if logger is None:
            folder: Optional[str] = self.default_root_dir
        elif logger.log_dir is not None:
            folder = logger.log_dir
        else:
            folder = logger.save_dir
        return self.strategy.broadcast(folder)

    @property
    def checkpoint_callbacks(self) -> list[Checkpoint]:
        """All callbacks that save checkpoints."""
        return [callback for callback in self.callbacks if isinstance(callback, Checkpoint)]

    @property
    def checkpoint_callback(self) -> Any:
        """The first callback that saves checkpoints, or None."""
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        """All EarlyStopping callbacks."""
        return [callback for callback in self.callbacks if isinstance(callback, EarlyStopping)]

    @property
    def early_stopping_callback(self) -> Optional[EarlyStopping]:
        """The first EarlyStopping callback, or None."""
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def progress_bar_callback(self) -> Optional[ProgressBar]:
        """The progress bar, or None."""
        return next((callback for callback in self.callbacks if isinstance(callback, ProgressBar)), None)

    # ---------------------------------------------------------------- batches and limits

    @property
    def is_filler(self) -> bool:
        """Whether this rank has no batch of its own in this step: the present one is a batch again that counts for nothing."""
        return self._run is not None and bool(self._run.store.is_filler)

    @property
    def train_dataloader(self) -> Any:
        """The training loaders in the user's structure; None until they are loaded."""
        return self._train_loaders.user_loaders

    @property
    def val_dataloaders(self) -> Any:
        """The validation loaders; None until they are loaded."""
        return self._val_loaders.user_loaders

    @property
    def test_dataloaders(self) -> Any:
        """The test loaders; None until they are loaded."""
        return self._test_loaders.user_loaders

    @property
    def predict_dataloaders(self) -> Any:
        """The loaders to predict on; None until they are loaded."""
        return self._predict_loaders.user_loaders

    @property
    def num_training_batches(self) -> int | float:
        """Batches of a training epoch; inf when unknown."""
        return self._num_training_batches

    @property
    def num_sanity_val_batches(self) -> list[int | float]:
        """Batches of the sanity check, per loader."""
        return self._num_sanity_val_batches

    @property
    def num_val_batches(self) -> list[int | float]:
        """Batches of a validation, per loader."""
        return self._val_loaders.num_batches

    @property
    def num_test_batches(self) -> list[int | float]:
        """Batches of the test, per loader."""
        return self._test_loaders.num_batches

    @property
    def num_predict_batches(self) -> list[int | float]:
        """Batches to predict on, per loader."""
        return self._predict_loaders.num_batches

    @property
    def val_check_interval_seconds(self) -> Optional[float]:
        """Seconds between validations, when they go by the clock."""
        return self._val_check_seconds

    # ---------------------------------------------------------------- where a call is

    @property
    def training(self) -> bool:
        """Whether the training loop runs."""
        return self.state.stage == RunningStage.TRAINING

    @training.setter
    def training(self, value: bool) -> None:
        self._set_stage(RunningStage.TRAINING, value)

    @property
    def validating(self) -> bool:
        """Whether a validation runs."""
        return self.state.stage == RunningStage.VALIDATING

    @validating.setter
    def validating(self, value: bool) -> None:
        self._set_stage(RunningStage.VALIDATING, value)

    @property
    def testing(self) -> bool:
        """Whether a test runs."""
        return self.state.stage == RunningStage.TESTING

    @testing.setter
    def testing(self, value: bool) -> None:
        self._set_stage(RunningStage.TESTING, value)

    @property
    def predicting(self) -> bool:
        """Whether predictions run."""
        return self.state.stage == RunningStage.PREDICTING

    @predicting.setter
    def predicting(self, value: bool) -> None:
        self._set_stage(RunningStage.PREDICTING, value)

    @property
    def sanity_checking(self) -> bool:
        """Whether the validation before training runs."""
        return self.state.stage == RunningStage.SANITY_CHECKING

    @sanity_checking.setter
    def sanity_checking(self, value: bool) -> None:
        self._set_stage(RunningStage.SANITY_CHECKING, value)

    def _set_stage(self, stage: RunningStage, value: bool) -> None:
        if value:
            self.state.stage = stage
        elif self.state.stage == stage:
            self.state.stage = None

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or sanity check runs."""
        return self.state.stage is not None and self.state.stage.evaluating

    @property
    def interrupted(self) -> bool:
        """Whether the last call failed."""
        return self.state.status == TrainerStatus.INTERRUPTED

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self.fit_loop.epoch_loop.global_step

    @property
    def current_epoch(self) -> int:
        """Completed epochs."""
        return self.fit_loop.epoch_progress.current.completed

    @property
    def max_epochs(self) -> Optional[int]:
        """Epochs at most."""
        return self.fit_loop.max_epochs

    @property
    def min_epochs(self) -> Optional[int]:
        """Epochs at least."""
        return self.fit_loop.min_epochs

    @property
    def max_steps(self) -> int:
        """Optimizer steps at most."""
        return self.fit_loop.epoch_loop.max_steps

    @property
    def min_steps(self) -> Optional[int]:
        """Optimizer steps at least."""
        return self.fit_loop.epoch_loop.min_steps

    @property
    def is_last_batch(self) -> bool:
        """Whether the present batch is the last of its epoch."""
        return self.fit_loop.epoch_loop.batch_progress.is_last_batch

    @property
    def enable_validation(self) -> bool:
        """Whether validation runs inside fit: there is a loader, a step, and a limit above 0."""
        module = self._module
        return (
            self._val_loaders.is_defined()
            and module is not None
            and ("validation_step" in vars(module) or is_overridden("validation_step", module, LightningModule))
            and self.limit_val_batches > 0
        )

    # ---------------------------------------------------------------- metrics

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """All logged values: in training those of the step and the epoch, in evaluation those of the epoch."""
        self._refresh_metrics()
        found: dict[str, Any] = self._metrics.callback
        return found

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The values that went, or go, to the loggers."""
        self._refresh_metrics()
        found: dict[str, Any] = self._metrics.logged
        return found

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The values logged with ``prog_bar=True``, as floats; reading them waits for the device."""
        self._refresh_metrics()
        return to_floats(self._metrics.progress_bar)

    def _refresh_metrics(self) -> None:
        run = self._run
        # After a failure the values of the batch that failed are still there, and looked at when somebody asks.
        if run is not None and self.state.status in (TrainerStatus.RUNNING, TrainerStatus.INTERRUPTED):
            store = run.store
            if store.training and store.is_between_batches:
                # The values of the last step stay, those of the epoch come beside them.
                self._merge(store.read(on_step=True))
            self._merge(store.read(on_step=not store.is_between_batches))

    def _merge(self, metrics: Metrics) -> Metrics:
        """Take reduced values into the three dictionaries that users read."""
        self._metrics.callback.update(metrics.callback)
        self._metrics.logged.update(metrics.logged)
        self._metrics.progress_bar.update(metrics.progress_bar)
        return metrics

    def _reset_metrics(self) -> None:
        self._metrics = Metrics({}, {}, {})

    def _moved_metrics_to(self, device: torch.device) -> None:
        self._metrics = Metrics(*(move_data_to_device(values, device) for values in self._metrics))

    # ---------------------------------------------------------------- checkpoints

    @property
    def ckpt_path(self) -> Optional[PathLike]:
        """The checkpoint that the present or last run started from."""
        return self._ckpt_path

    @ckpt_path.setter
    def ckpt_path(self, path: Optional[PathLike]) -> None:
        self._ckpt_path = path
        self._ckpt_path_is_set = bool(path)
