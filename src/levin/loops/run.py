"""Run: what exists only while fit, validate, test or predict runs."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Optional, Protocol

import torch
from torch import Tensor

from levin.counters import Loops
from levin.data.feed import Feed
from levin.datamodule import LightningDataModule
from levin.engine import Engine
from levin.hooks import Callback, Trainer
from levin.log_store import LogStore, Metrics
from levin.loggers.logger import Logger
from levin.loggers.unsent import Unsent
from levin.loops.compiled import Compiler
from levin.loops.hook_table import HookTable
from levin.loops.stage_loaders import Loaders
from levin.module import LightningModule
from levin.optimizer import LightningOptimizer
from levin.profilers.profiler import Profiler, Timed, untimed
from levin.ranks.agreement import Agreement
from levin.ranks.hang_watchdog import Watchdog
from levin.ranks.same_everywhere import check_logged_name
from levin.ranks.signals import Signals
from levin.ranks.uneven import Uneven
from levin.resume.resume_state import ResumeState
from levin.settings import Settings
from levin.strategies.strategy import Strategy
from levin.utilities.move import move_data_to_device
from levin.utilities.numbers import Latest, to_numbers
from levin.utilities.overrides import has_own
from levin.utilities.states import RunningStage, StopFlags, TrainerFn, TrainerState, TrainerStatus
from levin.utilities.timing import action_name
from levin.utilities.types import Batch, Group, LRSchedulerConfig, PathLike, StateDict


class Step(Protocol):
    """What is done with one batch of training; composed once per run."""

    uneven: Optional[Uneven]

    def __call__(self, batch: object, batch_idx: int, is_last: bool) -> dict[str, object]:
        """Train on one batch; returns what ``on_train_batch_end`` gets."""

    def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
        """Run the backward pass, with the hooks around it."""

    def take_optimizers(self) -> None:
        """Step those of the run from now on."""

    def close_window(self) -> None:
        """Step on the gradients of an open accumulation window."""

    def state_dict(self) -> StateDict:
        """Return what is unfinished between two batches."""

    def load_state_dict(self, state: StateDict) -> None:
        """Take up :meth:`state_dict`."""


@dataclass
class Evaluation:
    """What a stage is evaluated with: made with its loaders, and used again in each epoch.

    Args:
        feed: Gives the batches.
        step: ``step(batch, batch_idx, dataloader_idx)`` calls the user's.
        store: What ``self.log`` writes into meanwhile; empty in between.
    """

    feed: Feed
    step: Callable[[object, int, int], object]
    store: LogStore


@dataclass(eq=False)
class Run:
    """One call of the Trainer: what it was given, and the parts that set-up composes of it.

    A run begins with its arguments. Set-up composes the rest, which is what other processes do anew: a run that is
    pickled, and one that is unpickled, has its arguments alone.

    Args:
        trainer: The first argument of callbacks' hooks, and nothing else: loops do not look into it.
        settings: What the user asked; changed settings take its place at once.
        engine: Where and how to compute.
        profiler: Measures the parts.
        callbacks: In calling order.
        loggers: In the order of the user.
        loops: Limits and counters, which outlive the run.
        state: Status, method and stage, which outlive the run.
        told: What this process alone was told: to stop, to end for a signal. See :attr:`flags`.
        module: The user's module, unwrapped.
        datamodule: The user's data module.
        loaders: Where the loaders of each stage come from.
        metrics: The values that users read, reduced.
        keeps_predictions: Whether ``predict`` returns them.
        ckpt_path: What the run starts from.
    """

    trainer: Trainer
    settings: Settings
    engine: Engine
    profiler: Profiler
    callbacks: list[Callback]
    loggers: list[Logger]
    loops: Loops
    state: TrainerState
    told: StopFlags
    module: LightningModule
    datamodule: Optional[LightningDataModule]
    loaders: Loaders
    metrics: Metrics = field(default_factory=lambda: Metrics({}, {}, {}))
    keeps_predictions: bool = True
    ckpt_path: Optional[PathLike] = None
    step: Step = field(init=False)  # there while training runs, and after it

    def __post_init__(self) -> None:
        self.strategy: Strategy = self.engine.strategy
        self.signals = Signals()
        self.resume = ResumeState()
        self.is_setting_up: bool = False
        # Composed in set-up.
        self.hooks = HookTable(self.trainer, self.module, ())
        self.transfer: Optional[Callable[[Batch, torch.device, int], Batch]] = None
        self.timed: Timed = untimed
        self.is_profiled: bool = False
        self.store: LogStore = new_store(self, training=False)
        self.optimizers: list[torch.optim.Optimizer] = []
        # What `configure_optimizers` gave to each of them, by the names of the parameters.
        self.configured_groups: list[list[list[str]]] = []
        self.lightning_optimizers: list[LightningOptimizer] = []
        self.schedulers: list[LRSchedulerConfig] = []
        self.watchdog: Optional[Watchdog] = None
        self.uneven: Optional[Uneven] = None
        self.agreement: Optional[Agreement] = None
        # What goes to loggers and bar as soon as the device has it.
        self.unsent = Unsent()
        self.shown = Latest()
        # How training and validation go on.
        self.compiler: Optional[Compiler] = None
        self.validation: Optional[Evaluation] = None
        self.last_validation_s: float = time.monotonic()
        self.eval_log_steps: dict[int, int] = {}
        self.has_explained_minima: bool = False
        self.time_shares: Any = None  # where its time goes, see loops/time_shares.py; on the first rank alone
        # Names of values that steered schedulers and were not the same on all ranks.
        self.unequal_values: set[str] = set()
        # Name of the hooks that are being called, those that are left, and their arguments.
        self.under_way: tuple[str, object, tuple[object, ...]] = ("", None, ())

    def __getstate__(self) -> dict[str, object]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}

    def __setstate__(self, arguments: dict[str, Any]) -> None:
        Run.__init__(self, **arguments)  # a run that has not begun

    @property
    def fn(self) -> TrainerFn:
        """The method that runs: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``."""
        return TrainerFn(self.state.fn)

    @property
    def flags(self) -> Agreement | StopFlags:
        """``should_stop`` and ``received_sigterm``, as all ranks know them: what loops act on."""
        return self.told if self.agreement is None else self.agreement

    @property
    def now_s(self) -> float:
        """The time in seconds since some moment, the same on every rank."""
        return time.monotonic() if self.agreement is None else self.agreement.time_s

    @property
    def current_epoch(self) -> int:
        """Completed epochs of training."""
        return self.loops.fit.epoch_progress.current.completed

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self.loops.fit.epoch_loop.global_step

    @property
    def is_filler(self) -> bool:
        """Whether this rank has no batch of its own in this step, see :mod:`levin.ranks.uneven`."""
        return bool(self.store.is_filler)

    @property
    def is_sanity_checking(self) -> bool:
        """Whether the validation before training runs."""
        return self.state.stage == RunningStage.SANITY_CHECKING

    @property
    def checkpoint_callbacks(self) -> list[Any]:
        """All callbacks that save checkpoints."""
        return [callback for callback in self.callbacks if getattr(type(callback), "saves_checkpoints", False)]

    @property
    def enable_validation(self) -> bool:
        """Whether validation runs inside fit: there is a loader, a step, and a limit above 0."""
        module = self.module
        return (
            self.loaders.val.is_defined()
            and has_own("validation_step", module, LightningModule)
            and self.settings.limit_val_batches > 0
        )

    @property
    def validates_in_epoch(self) -> bool:
        """Whether validation may run in the present epoch at all."""
        every = self.settings.check_val_every_n_epoch
        return every is None or (self.current_epoch + 1) % every == 0

    # ---------------------------------------------------------------- hooks

    def call(self, name: str, *args: object, num_last: Optional[int] = None) -> object:
        """Call the hook ``name`` of callbacks and module, with ``self.log`` knowing where it is called.

        Args:
            name: Of the hook.
            args: What the hooks get.
            num_last: How many are called, counted from the last one; by default all.

        Returns:
            What the last of them returned, which is the module's hook where it has one.
        """
        hooks = self.hooks[name] if num_last is None else self.hooks[name][-num_last:]
        if not hooks:
            return None
        store = self.store
        previous, store.hook = store.hook, name
        left = iter(hooks)
        # One that raises leaves it as it is, so that a checkpoint saved then knows where that was.
        outer, self.under_way = self.under_way, (name, left, args)
        answer = None
        try:
            for hook in left:
                answer = hook(*args)
        finally:
            store.hook = previous
        self.under_way = outer
        return answer

    def call_own(self, name: str, function: Optional[Callable[..., object]], *args: object, **kwargs: object) -> object:
        """Call one function of the module as the hook ``name``; None, which the user may have put there, does nothing."""
        if function is None:
            return None
        if self.is_profiled and name != "backward":  # measured as that of the strategy
            function = self.timed(action_name(self.module, name), function)
        store = self.store
        previous, store.hook = store.hook, name
        try:
            return function(*args, **kwargs)
        finally:
            store.hook = previous

    def call_of(self, owner: object, name: str, *args: object, **kwargs: object) -> object:
        """Call a method that callback, module or data module have in any case, a few times per run, outside the loops."""
        method = getattr(owner, name)
        if method is None:
            return None
        with self.profiler.profile(action_name(owner, name)):
            return method(*args, **kwargs)

    def stop_watchdog(self) -> None:
        """Note that this process has ended its run; those that still wait are told."""
        if self.watchdog is not None:
            self.watchdog.end_run()

    # ---------------------------------------------------------------- logged values

    def activate(self, store: LogStore) -> LogStore:
        """Let ``self.log`` write into ``store``; returns the one before."""
        previous, self.store = self.store, store
        return previous

    def take_logs(self) -> None:
        """Let ``self.log`` of the module and its children write into the store of this run, whichever that is then."""
        if not self.settings.barebones:
            _let_log(self.module, self)

    def refuse_logs(self) -> None:
        """Let ``self.log`` of the module and its children have no place to write to: no run is there."""
        _let_log(self.module, None)

    def merge(self, metrics: Metrics) -> Metrics:
        """Take reduced values into the three dictionaries that users read."""
        self.metrics.callback.update(metrics.callback)
        self.metrics.logged.update(metrics.logged)
        self.metrics.progress_bar.update(metrics.progress_bar)
        return metrics

    def read_metrics(self) -> Metrics:
        """Return the values that users read, with those that were logged since they were last reduced."""
        store = self.store
        # After a failure the values of the batch that failed are still there, and looked at when somebody asks.
        if self.state.status in (TrainerStatus.RUNNING, TrainerStatus.INTERRUPTED):
            if store.training and store.is_between_batches:
                # The values of the last step stay, those of the epoch come beside them.
                self.merge(store.read(on_step=True))
            self.merge(store.read(on_step=not store.is_between_batches))
        return self.metrics

    def shown_metrics(self) -> dict[str, object]:
        """Return the numbers that a progress bar shows; between two batches without waiting, so that they may be older."""
        metrics = self.read_metrics().progress_bar
        return to_numbers(metrics) if self.store.is_between_batches else self.shown.of(metrics)

    def reset_metrics(self) -> None:
        """Begin with no values; dictionaries that users have stay as they are."""
        self.metrics = Metrics({}, {}, {})

    def move_metrics(self, device: torch.device) -> None:
        """Move all values to ``device``."""
        self.metrics = Metrics(*(move_data_to_device(values, device) for values in self.metrics))


def new_store(run: Run, training: bool) -> LogStore:
    """Return an empty log store for a loop of ``run``."""
    strategy, module = run.strategy, run.module

    def modules() -> dict[str, object]:
        return dict(module.named_modules(remove_duplicate=False))

    def sync(value: Tensor, reduction: str, group: Group) -> Tensor:
        group = strategy.data_parallel.group if group is None else group
        reduced: Tensor = strategy.reduce(value.to(strategy.root_device), group=group, reduce_op=reduction)
        return reduced

    by_ranks = sync if strategy.is_distributed else None
    num_ranks, check = strategy.data_parallel.size, partial(check_logged_name, strategy)
    return LogStore(training, modules, by_ranks, lambda: bool(run.loggers), num_ranks, check)


def find_log_dir(loggers: list[Logger], root: str, strategy: Strategy) -> Optional[str]:
    """Return the folder of the first logger, else ``root``; the same on all ranks, which all call this."""
    folder: Optional[str] = root
    if loggers:
        folder = loggers[0].save_dir if loggers[0].log_dir is None else loggers[0].log_dir
    agreed: Optional[str] = strategy.broadcast(folder)
    return agreed


def _let_log(module: torch.nn.Module, run: Optional[Run]) -> None:
    for child in module.modules():
        if "_logging_run" in child.__dict__:
            child.__dict__["_logging_run"] = run


def step_arguments(module: LightningModule, name: str, num_dataloaders: int) -> int:
    """Return how many of (batch, batch_idx, dataloader_idx) the step ``name`` of ``module`` takes.

    Raises:
        RuntimeError: The signature does not fit the number of loaders.
        TypeError: It has no place for the batch.
    """
    signature = inspect.signature(getattr(module, name))
    parameters = list(signature.parameters.values())
    names = [parameter.name for parameter in parameters]
    if name == "training_step" and "optimizer_idx" in names:
        raise RuntimeError(
            f"`{name}` has an argument `optimizer_idx`, which is not supported. Use manual optimization for several optimizers."
        )
    if "dataloader_iter" in names:
        return 1
    is_variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    takes_index = is_variadic or "dataloader_idx" in names
    if name != "training_step":
        if num_dataloaders > 1 and not takes_index:
            raise RuntimeError(
                f"You provided {num_dataloaders} loaders, but `{name}` takes no `dataloader_idx`, received {names}. "
                f"Write `def {name}(self, batch, batch_idx, dataloader_idx)`."
            )
        if num_dataloaders == 1 and "dataloader_idx" in names:
            if signature.parameters["dataloader_idx"].default is inspect.Parameter.empty:
                raise RuntimeError(
                    f"You provided one loader, but `{name}` requires a `dataloader_idx`. "
                    "Give it a default (`dataloader_idx=0`) or leave it out."
                )
        if num_dataloaders > 1:
            return 3
    if not parameters:
        raise TypeError(
            f"`{name}` must take at least the batch, received a signature without arguments. "
            f"Write `def {name}(self, batch, batch_idx)`."
        )
    return 2 if is_variadic or len(by_position) > 1 else 1
