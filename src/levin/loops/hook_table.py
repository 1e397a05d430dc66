"""The table of hooks that really exist, and the chain of batch-transfer hooks: made once per run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch

from levin.data.feed import OnDemand
from levin.hooks import Callback, CheckpointHooks, DataHooks, LightningModule, ModelHooks, Trainer
from levin.profilers.profiler import Timed
from levin.strategies.strategy import Strategy
from levin.utilities.move import move_data_to_device
from levin.utilities.overrides import has_own
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.timing import action_name
from levin.utilities.types import Batch, Function

Hooks = tuple[Function, ...]

STAGES = ("validation", "test", "predict")
RUN_HOOKS: tuple[str, ...] = (
    "on_fit_start",
    "on_fit_end",
    "on_sanity_check_start",
    "on_sanity_check_end",
    "on_train_start",
    "on_train_end",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",
    "on_train_batch_end",
    *(f"on_{stage}_{moment}" for stage in STAGES for moment in ("start", "end", "epoch_start", "epoch_end")),
    *(f"on_{stage}_batch_{moment}" for stage in STAGES for moment in ("start", "end")),
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
)
"""The hooks that a run calls on callbacks and module, in no particular order."""

_COMPOSED = frozenset(
    (
        *RUN_HOOKS,
        *(f"{stage}_step" for stage in ("training", *STAGES)),
        *("backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
        *("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"),
    )
)
"""What is looked up once, when a run is composed."""


class HookTable:
    """Hook name -> the bound methods that really exist, in calling order. Built once per run.

    Callbacks come first, in list order, then the module, which has no hooks of the sanity check; in ``on_train_epoch_end`` the monitoring callbacks
    (EarlyStopping, Checkpoint) follow the module, so that they see what it logs. The strategy's come last, but before
    the module's in ``on_train_batch_start``, whose answer the loop asks for.

    Args:
        trainer: First argument of every callback's hook.
        module: Second argument of every callback's hook; its own hooks follow the callbacks'.
        callbacks: In list order.
        profile: Wraps a hook so that it is timed: ``profile(action_name, function) -> function``; then hooks that do
            nothing are in the table, too. None: no timing.
        strategy: It may have hooks as well.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        callbacks: Sequence[Callback],
        profile: Optional[Timed] = None,
        strategy: Optional[Strategy] = None,
    ) -> None:
        self._module, self._callbacks, self._own = module, list(callbacks), _own_of(module)
        self._table: dict[str, Hooks] = {}
        self._showing: set[str] = set()
        for name in RUN_HOOKS:
            hooks = [
                (getattr(type(callback), "is_monitor", False), _callback_hook(callback, name, profile, trainer, module))
                for callback in callbacks
            ]
            own = _timed_hook(module, name, profile, has_hook(module, name)) if hasattr(ModelHooks, name) else None
            if name == "on_train_epoch_end":
                ordered = [hook for monitor, hook in hooks if not monitor]
                ordered += [own, *(hook for monitor, hook in hooks if monitor)]
            else:
                ordered = [*(hook for _, hook in hooks), own]
            if strategy is not None:
                is_own = getattr(type(strategy), name, None) is not getattr(Strategy, name, None)
                last = len(ordered) if name != "on_train_batch_start" else len(ordered) - 1
                ordered.insert(last, _timed_hook(strategy, name, profile, is_own))
            self._table[name] = tuple(hook for hook in ordered if hook is not None)

    def show_batches(self, stage: str) -> None:
        """Let the batch hooks of a stage get the batch itself where its step takes ``dataloader_iter``."""
        for name in (f"on_{stage}_batch_start", f"on_{stage}_batch_end"):
            if name not in self._showing:
                self._showing.add(name)
                self._table[name] = tuple(functools.partial(_call_with_batch, hook) for hook in self._table[name])

    def __getitem__(self, name: str) -> Hooks:
        return self._table[name]

    def warn_of_changes(self, callbacks: list[Callback]) -> None:
        """Say once what came, went or was replaced since the table was made, and is not taken up before the next call."""
        own = _own_of(self._module)
        if callbacks == self._callbacks and own == self._own:
            return
        names = {name for name in (*own, *self._own) if own.get(name) is not self._own.get(name)}
        names |= {type(each).__name__ for each in callbacks if each not in self._callbacks}
        names |= {type(each).__name__ for each in self._callbacks if each not in callbacks}
        self._callbacks, self._own = list(callbacks), own
        rank_zero_warn(
            f"{', '.join(sorted(names))} came, went or was replaced while a fit runs, which looks callbacks, steps and hooks "
            "up once: this counts from the next call on. Decide inside of the step or hook, or in a callback that is there "
            "from the beginning."
        )


def _own_of(module: LightningModule) -> dict[str, object]:
    return {name: value for name, value in vars(module).items() if name in _COMPOSED}


def _call_with_batch(hook: Callable[..., object], *args: object) -> object:
    return hook(*(arg.batch if isinstance(arg, OnDemand) else arg for arg in args))


def _callback_hook(
    callback: Callback, name: str, profile: Optional[Timed], *args: object
) -> Optional[Callable[..., object]]:
    is_own = has_own(name, callback, Callback)
    hook = _timed_hook(callback, name, profile, is_own)
    return None if hook is None else functools.partial(hook, *args)


def _timed_hook(owner: object, name: str, profile: Optional[Timed], is_own: bool) -> Optional[Callable[..., object]]:
    """Return the hook if it ``is_own``, no default that does nothing; a profiler measures those as well."""
    if profile is None:
        return getattr(owner, name) if is_own else None
    hook = getattr(owner, name, None)
    return None if hook is None else profile(action_name(owner, name), hook)


def has_hook(module: object, name: str) -> bool:
    """Return whether the user gave ``module`` a hook ``name`` of its own (in the class or on the instance)."""
    if getattr(module, name, None) is None:
        return False
    base = next((base for base in (ModelHooks, DataHooks, CheckpointHooks) if hasattr(base, name)), None)
    return base is not None and has_own(name, module, base)


def transfer_owners(owners: Sequence[object], measures_all: bool = False) -> dict[str, object]:
    """Return whose batch-transfer hooks run, by their names.

    Args:
        owners: Who may override them, most important first (the data module, then the module).
        measures_all: Whether a hook that nobody overrides counts as that of the last owner.
    """
    chosen: dict[str, object] = {}
    for name in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        having = [owner for owner in owners if has_own(name, owner, DataHooks)]
        if having or measures_all:
            chosen[name] = (having or owners[-1:])[0]
        if len(having) > 1:
            first, second = (type(owner).__name__ for owner in having)
            rank_zero_warn(
                f"`{name}` is defined by {first} and by {second}: that of {first} is used. Remove one of them."
            )
    return chosen


def transfer_hooks(
    owners: Sequence[object],
    profile: Optional[Timed] = None,
    strategy: Optional[Strategy] = None,
    move: Optional[Callable[[object, torch.device], object]] = None,
) -> Optional[Callable[[Batch, torch.device, int], Batch]]:
    """Return the chain of overridden batch-transfer hooks, or None when the default alone is needed.

    Args:
        owners: Who may override them, most important first (the data module, then the module).
        profile: As for :class:`HookTable`.
        strategy: Named in the report of the profiler.
        move: What moves a batch where nobody overrides ``transfer_batch_to_device``, if not the default.
    """
    chosen: dict[str, Any] = {}
    for name, owner in transfer_owners(owners, measures_all=profile is not None).items():
        hook = getattr(owner, name)
        chosen[name] = hook if profile is None else profile(action_name(owner, name), hook)
    if not chosen and move is None:
        return None
    move = move or move_data_to_device
    before = chosen.get("on_before_batch_transfer")
    transfer = chosen.get("transfer_batch_to_device")
    after = chosen.get("on_after_batch_transfer")

    def to_device(batch: Batch, device: torch.device, dataloader_idx: int) -> object:
        batch = move(batch, device) if transfer is None else transfer(batch, device, dataloader_idx)
        return batch if after is None else after(batch, dataloader_idx)

    if profile is not None:
        to_device = profile(action_name(strategy, "batch_to_device"), to_device)
    if before is None:
        return to_device
    return lambda batch, device, dataloader_idx: to_device(before(batch, dataloader_idx), device, dataloader_idx)
