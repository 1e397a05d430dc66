"""LearningRateMonitor: logs learning rates, momenta and weight decays while they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim import Optimizer
from typing_extensions import override

from levin.callbacks.logging_steps import is_logging_step, log_values, require_logger
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import MisconfigurationException, require_choice
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import Batch, LRSchedulerConfig, ParamGroup


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer, its name in the logs, and the interval at which its scheduler changes it.

    Args:
        name: Name without the suffix for a parameter group.
        optimizer: The optimizer.
        interval: ``"step"``, ``"epoch"`` or, without a scheduler, None.
    """

    name: str
    optimizer: Optimizer
    interval: str | None


def named_optimizers(
    optimizers: Sequence[Optimizer], configs: Iterable[LRSchedulerConfig], prefix: str = ""
) -> list[NamedOptimizer]:
    """Return the optimizers under the names of their schedulers, or ``lr-<class>``, numbered from the second on.

    Args:
        optimizers: The optimizers of the run.
        configs: Its schedulers; they come first.
        prefix: Put in front of every name.
    """
    named: list[tuple[Optimizer, str | None, str | None]] = [
        (config.scheduler.optimizer, config.name, config.interval) for config in configs
    ]
    scheduled = {id(optimizer) for optimizer, _, _ in named}
    named += [(optimizer, None, None) for optimizer in optimizers if id(optimizer) not in scheduled]
    entries: list[NamedOptimizer] = []
    count: Counter[type[Optimizer]] = Counter()
    for optimizer, name, interval in named:
        kind = type(optimizer)
        if name is None:
            name = f"lr-{kind.__name__}" + (f"-{count[kind]}" if count[kind] else "")
            count[kind] += 1
        entries.append(NamedOptimizer(prefix + name, optimizer, interval))
    return entries


def group_suffix(groups: Sequence[ParamGroup], index: int) -> str:
    """Return what a parameter group adds to the name of its optimizer: its own name, or its number if there are more."""
    if "name" in groups[index]:
        return f"/{groups[index]['name']}"
    return f"/pg{index + 1}" if len(groups) > 1 else ""


def momentum_of(optimizer: Optimizer, group: ParamGroup) -> float:
    """Return the momentum, or the first of the betas, of a parameter group; 0 if it has neither."""
    value = group["betas"][0] if "betas" in optimizer.defaults else group.get("momentum", 0)
    return float(value)


class LearningRateMonitor(Callback):
    """Logs the learning rate of each optimizer and parameter group.

    The names are ``lr-SGD``, ``lr-Adam-1`` for the second Adam, ``lr-SGD/pg2`` for a second parameter group,
    ``lr-SGD/backbone`` for one with a ``name``; a scheduler's ``name`` takes the place of ``lr-SGD``.

    Args:
        logging_interval: ``"step"`` or ``"epoch"``; by default the interval of each scheduler.
        log_momentum: Whether to log the momentum, or first beta, under ``<name>-momentum`` too.
        log_weight_decay: Whether to log the weight decay under ``<name>-weight_decay`` too.
        log_key_prefix: Text in front of every name, for example ``"optim/"``.

    Raises:
        MisconfigurationException: ``logging_interval`` is something else; during fit, the Trainer has no logger or an
            optimizer has two parameter groups of the same name.

    Example:
        >>> monitor = LearningRateMonitor(logging_interval="step", log_momentum=True)
    """

    def __init__(
        self,
        logging_interval: Literal["step", "epoch"] | None = None,
        log_momentum: bool = False,
        log_weight_decay: bool = False,
        log_key_prefix: str | None = None,
    ) -> None:
        require_choice("logging_interval", logging_interval, ("step", "epoch", None))
        self.logging_interval: Literal["step", "epoch"] | None = logging_interval
        self.log_momentum: bool = log_momentum
        self.log_weight_decay: bool = log_weight_decay
        self.log_key_prefix: str | None = log_key_prefix
        self.lrs: dict[str, list[float]] = {}
        self.last_momentum_values: dict[str, float | None] = {}
        self.last_weight_decay_values: dict[str, float | None] = {}
        self._entries: list[NamedOptimizer] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_logger(trainer, self)
        self._entries = named_optimizers(trainer.optimizers, trainer.lr_scheduler_configs, self.log_key_prefix or "")
        self.lrs = {}
        self.last_momentum_values, self.last_weight_decay_values = {}, {}
        has_momentum = all({"momentum", "betas"} & entry.optimizer.defaults.keys() for entry in self._entries)
        if self.log_momentum and not has_momentum:
            rank_zero_warn(
                "log_momentum=True, but some optimizers do not have momentum. It is logged as 0.",
                category=RuntimeWarning,
            )
        for entry in self._entries:
            groups = entry.optimizer.param_groups
            names = [entry.name + group_suffix(groups, i) for i in range(len(groups))]
            _check_group_names(entry.name, groups)
            self.lrs.update({name: [] for name in names})
            self.last_momentum_values.update(dict.fromkeys(f"{name}-momentum" for name in names))
            self.last_weight_decay_values.update(dict.fromkeys(f"{name}-weight_decay" for name in names))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self.logging_interval != "epoch" and is_logging_step(trainer):
            self._log(trainer, "step")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.logging_interval != "step":
            self._log(trainer, "epoch")

    def _log(self, trainer: Trainer, interval: str) -> None:
        is_any = self.logging_interval is not None
        stats: dict[str, float] = {}
        for entry in self._entries:
            if is_any or entry.interval in (None, interval):
                stats.update(self._read(entry))
        if stats:
            log_values(trainer, stats)
            device = trainer.strategy.root_device
            trainer.callback_metrics.update(
                {name: torch.full((), value, dtype=torch.float32, device=device) for name, value in stats.items()}
            )

    def _read(self, entry: NamedOptimizer) -> dict[str, float]:
        """Return the present values of an optimizer and remember them."""
        groups = entry.optimizer.param_groups
        if len(groups) > 1 and entry.name in self.lrs:
            # A group was added since the last time: what went without a number is now the first group.
            self.lrs[entry.name + group_suffix(groups, 0)] = self.lrs.pop(entry.name)
        stats: dict[str, float] = {}
        for index, group in enumerate(groups):
            if "lr" not in group:
                continue
            name = entry.name + group_suffix(groups, index)
            stats[name] = float(group["lr"])
            self.lrs.setdefault(name, []).append(stats[name])
            if self.log_momentum:
                value = stats[f"{name}-momentum"] = momentum_of(entry.optimizer, group)
                self.last_momentum_values[f"{name}-momentum"] = value
            if self.log_weight_decay:
                value = stats[f"{name}-weight_decay"] = float(group.get("weight_decay", 0))
                self.last_weight_decay_values[f"{name}-weight_decay"] = value
        return stats


def _check_group_names(name: str, groups: Sequence[ParamGroup]) -> None:
    count = Counter(group["name"] for group in groups if "name" in group)
    repeated = {group_name for group_name, number in count.items() if number > 1}
    if repeated:
        raise MisconfigurationException(
            "A single `Optimizer` cannot have multiple parameter groups with identical `name` values, "
            f"received {sorted(repeated)} more than once in {name}. Give each group a name of its own."
        )
