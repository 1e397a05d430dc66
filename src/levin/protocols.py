"""What rooms below see of the objects above them: the Trainer as hooks get it, and the run as ranks and resume use it.

Both are written down here so that no file needs to import what stands above it, not even for types. ``levin.Trainer``
and ``levin.loops.run.Run`` fit by having these names; the type checker says so where one is passed on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, Protocol

if TYPE_CHECKING:
    import torch

    from levin.accelerators import Accelerator
    from levin.counters import EvaluationLoop, FitLoop, Loops
    from levin.engine import Engine
    from levin.hooks import Callback
    from levin.log_store import LogStore, Metrics
    from levin.loggers.logger import Logger
    from levin.loggers.unsent import Unsent
    from levin.precision.precision import Precision
    from levin.profilers.profiler import Profiler
    from levin.settings import Settings
    from levin.strategies.strategy import Strategy
    from levin.utilities.states import GradClipAlgorithmType, StopFlags, TrainerState
    from levin.utilities.types import LRSchedulerConfig, PathLike


class StageLoaders(Protocol):
    """The loaders of one stage."""

    combined: Any
    loaded_epoch: float


class Signals(Protocol):
    """What this process was told by signals during one call."""

    waits_for_batch: bool
    is_before_training: bool
    is_looping: bool
    wants_requeue: bool
    is_requeued: bool

    def is_repeated(self) -> bool:
        """Note a request to stop, and return whether there was another one before."""


class Run(Protocol):
    """One call of the Trainer, see :class:`levin.loops.run.Run`."""

    trainer: Any
    settings: Settings
    engine: Engine
    profiler: Profiler
    is_profiled: bool
    callbacks: list[Callback]
    loggers: list[Logger]
    unsent: Unsent
    loops: Loops
    state: TrainerState
    module: Any
    datamodule: Any
    metrics: Metrics
    told: StopFlags
    ckpt_path: Optional[PathLike]
    strategy: Strategy
    store: LogStore
    optimizers: list[torch.optim.Optimizer]
    configured_groups: list[list[list[str]]]
    schedulers: list[LRSchedulerConfig]
    eval_log_steps: dict[int, int]
    unequal_values: set[str]
    under_way: tuple[str, Any, tuple[Any, ...]]

    @property
    def signals(self) -> Signals:
        """What this process was told by signals."""

    @property
    def resume(self) -> Any:
        """The place in the data and in the run."""

    @property
    def loaders(self) -> Any:
        """The loaders of each stage."""

    @property
    def agreement(self) -> Any:
        """What all ranks have agreed on; None on one device."""

    @property
    def fn(self) -> str:
        """The method that runs."""

    @property
    def enable_validation(self) -> bool:
        """Whether validation runs inside fit."""

    @property
    def now_s(self) -> float:
        """The time in seconds, the same on every rank."""

    @property
    def current_epoch(self) -> int:
        """Completed epochs of training."""

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """All callbacks that save checkpoints."""

    def shown_metrics(self) -> dict[str, Any]:
        """Return the numbers that a progress bar shows."""

    def call(self, name: str, *args: Any, num_last: Optional[int] = None) -> Any:
        """Call a hook of callbacks and module."""

    def call_of(self, owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of a callback, module or data module outside the loops."""


class Trainer(Protocol):
    """The Trainer, as modules, data modules and callbacks see it; see :class:`levin.Trainer`."""

    accelerator: Accelerator
    accumulate_grad_batches: int
    barebones: bool
    callbacks: list[Callback]
    check_val_every_n_epoch: Optional[int]
    current_epoch: int
    datamodule: Any
    default_root_dir: str
    enable_validation: bool
    fast_dev_run: int | bool
    fit_loop: FitLoop
    global_rank: int
    global_step: int
    gradient_clip_algorithm: Optional[GradClipAlgorithmType]
    gradient_clip_val: Optional[int | float]
    is_filler: bool
    is_global_zero: bool
    is_last_batch: bool
    limit_train_batches: int | float
    limit_val_batches: int | float
    lightning_module: Any
    local_rank: int
    log_every_n_steps: int
    loggers: list[Logger]
    max_epochs: Optional[int]
    max_steps: int
    model: Optional[torch.nn.Module]
    num_predict_batches: list[int | float]
    num_sanity_val_batches: list[int | float]
    num_test_batches: list[int | float]
    num_training_batches: int | float
    num_val_batches: list[int | float]
    optimizers: list[torch.optim.Optimizer]
    precision: str
    precision_plugin: Precision
    predict_dataloaders: Any
    predict_loop: EvaluationLoop
    profiler: Profiler
    progress_bar_callback: Any
    run: Any
    sanity_checking: bool
    scaler: Any
    settings: Settings
    should_stop: bool
    state: TrainerState
    strategy: Strategy
    test_dataloaders: Any
    test_loop: EvaluationLoop
    train_dataloader: Any
    training: bool
    val_check_interval: int | float
    val_check_interval_seconds: Optional[float]
    val_dataloaders: Any
    validate_loop: EvaluationLoop
    world_size: int

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """All logged values."""

    @property
    def checkpoint_callback(self) -> Any:
        """The first callback that saves checkpoints, or None."""

    @property
    def ckpt_path(self) -> Optional[PathLike]:
        """The checkpoint that the run started from."""

    @property
    def estimated_stepping_batches(self) -> int | float:
        """Optimizer steps that a whole fit will take."""

    @property
    def evaluating(self) -> bool:
        """Whether validation, test or sanity check runs."""

    @property
    def log_dir(self) -> Optional[str]:
        """Folder of the first logger; the same on all ranks, so call it on all."""

    @property
    def logger(self) -> Optional[Logger]:
        """The first logger, or None."""

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        """The schedulers, with when they are stepped."""

    @property
    def num_devices(self) -> int:
        """Number of devices of this machine."""

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The values logged with ``prog_bar=True``."""

    def fit(self, model: Any, train_dataloaders: Any = None, val_dataloaders: Any = None) -> None:
        """Train ``model``."""

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on the first rank of each node."""

    def save_checkpoint(
        self, filepath: PathLike, weights_only: Optional[bool] = None, storage_options: Any = None
    ) -> None:
        """Save the run, so that fit goes on from here."""
