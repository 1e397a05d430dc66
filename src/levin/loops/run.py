"""Run: what exists only while fit, validate, test or predict runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Optional

import torch
from torch import Tensor

from levin.log_store import LogStore

if TYPE_CHECKING:
    from levin.hooks import HookTable
    from levin.module import LightningModule
    from levin.ranks.agreement import Agreement
    from levin.ranks.uneven import Uneven
    from levin.strategies.strategy import Strategy
    from levin.trainer import Trainer
    from levin.utilities.types import LRSchedulerConfig


@dataclass
class Run:
    """The parts of one run, composed before its first batch.

    Args:
        trainer: Settings and counters.
        module: The user's module, unwrapped.
        strategy: Where and how it runs.
        hooks: Hook name -> what to call.
        transfer: The chain of overridden batch-transfer hooks, or None.
        timed: Wraps a function so that the profiler times it under a name; returns it unchanged without a profiler.
        store: The log store that ``self.log`` writes into at the moment.
        optimizers: Of the strategy, as they are stepped.
        schedulers: With when they are stepped.
        eval_log_steps: Loader index -> batches evaluated in this run, which is the x-axis of their step values.
        agreement: What all ranks have agreed on; None on one device.
        uneven: Knows of training steps for which not all ranks have a batch; None on one device.
        under_way: Name of the hooks that are being called, those that are left, and their arguments.
    """

    trainer: Trainer
    module: LightningModule
    strategy: Strategy
    hooks: HookTable
    transfer: Optional[Callable[[Any, torch.device, int], Any]]
    timed: Callable[[str, Callable[..., Any]], Callable[..., Any]]
    store: LogStore
    optimizers: list[Any]
    schedulers: list[LRSchedulerConfig]
    eval_log_steps: dict[int, int] = field(default_factory=dict)
    uneven: Optional[Uneven] = None
    agreement: Optional[Agreement] = None
    under_way: tuple[str, Any, tuple[Any, ...]] = ("", None, ())

    is_profiled: ClassVar[bool] = False
    """Whether a profiler measures the parts of the run."""

    @property
    def flags(self) -> Agreement | Trainer:
        """Who knows ``should_stop`` and ``received_sigterm``: all ranks together, or the Trainer alone."""
        return self.trainer if self.agreement is None else self.agreement

    def call(self, name: str, *args: Any, num_last: Optional[int] = None) -> Any:
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

    def call_own(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call one function of the module as the hook ``name``."""
        store = self.store
        previous, store.hook = store.hook, name
        try:
            return function(*args, **kwargs)
        finally:
            store.hook = previous

    def activate(self, store: LogStore) -> LogStore:
        """Let ``self.log`` write into ``store``; returns the one before."""
        previous, self.store = self.store, store
        if not self.trainer.barebones:
            for module in self.module.modules():
                if "_log_store" in module.__dict__:
                    module.__dict__["_log_store"] = store
        return previous


def new_store(trainer: Trainer, module: LightningModule, training: bool) -> LogStore:
    """Return an empty log store for a loop of ``trainer``."""
    strategy = trainer.strategy
    found: dict[str, Any] = {}

    def modules() -> dict[str, Any]:
        if not found:
            found.update(module.named_modules(remove_duplicate=False))
        return found

    def sync(value: Tensor, reduction: str, group: Any) -> Tensor:
        reduced: Tensor = strategy.reduce(value.to(strategy.root_device), group=group, reduce_op=reduction)
        return reduced

    return LogStore(training, modules, sync if strategy.is_distributed else None, bool(trainer.loggers))


def detach_log_store(module: torch.nn.Module) -> None:
    """Let ``self.log`` of the module and its children have no place to write to: no run is there."""
    for child in module.modules():
        if "_log_store" in child.__dict__:
            child.__dict__["_log_store"] = None


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
