"""EarlyStopping: ends training once a metric no longer improves."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor
from typing_extensions import override

from levin.callbacks.checkpoint_trigger import validates_once_per_epoch
from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.utilities.exceptions import did_you_mean, require_choice, require_number
from levin.utilities.rank_zero import log, rank_prefixed_message, rank_zero_warn
from levin.utilities.types import StateDict

_STATE = ("wait_count", "stopped_epoch", "best_score", "patience", "stopping_reason_message")


class EarlyStoppingReason(Enum):
    """Why an EarlyStopping callback asked to stop."""

    NOT_STOPPED = 0
    STOPPING_THRESHOLD = 1
    DIVERGENCE_THRESHOLD = 2
    PATIENCE_EXHAUSTED = 3
    NON_FINITE_METRIC = 4


class EarlyStopping(Callback):
    """Asks the Trainer to stop when a logged metric has not improved for a while.

    The metric is looked at after each training epoch, or after each validation if there are more or fewer of those.
    When any rank wants to stop, all do.

    Args:
        monitor: Logged metric.
        min_delta: By how much it must change to count as improved.
        patience: After how many looks in a row without improvement to stop.
        verbose: Whether to log a line for each improvement and for the stop.
        mode: ``"min"`` or ``"max"``: which way the metric improves.
        strict: Whether it is an error when the metric was not logged.
        check_finite: Whether to stop at once when the metric is NaN or infinite.
        stopping_threshold: Stop at once when the metric is better than this.
        divergence_threshold: Stop at once when the metric is worse than this.
        check_on_train_epoch_end: Whether to look after training epochs (True) or validations (False). By default the
            former, unless validation runs more than or less than once per epoch.
        log_rank_zero_only: Whether only rank 0 logs; by default each rank does, with its number in front.

    Raises:
        MisconfigurationException: ``mode`` is neither, or ``patience`` is no number.
        RuntimeError: During training, the metric is not there and ``strict`` is True.

    Example:
        >>> stopping = EarlyStopping(monitor="val_loss", patience=5, min_delta=0.001)
    """

    is_monitor = True
    is_on_all_ranks = True
    mode_dict: dict[str, Callable[[Tensor, Tensor | float], Tensor]] = {"min": torch.lt, "max": torch.gt}
    order_dict: dict[str, str] = {"min": "<", "max": ">"}

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "min",
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
        log_rank_zero_only: bool = False,
    ) -> None:
        super().__init__()
        require_choice("mode", mode, ("min", "max"))
        require_number("patience", patience)
        self.monitor: str = monitor
        # Signed, so that `monitor_op(current - min_delta, best_score)` says whether the metric improved.
        self.min_delta: float = min_delta if mode == "max" else -min_delta
        self.patience: int = patience
        self.verbose: bool = verbose
        self.mode: str = mode
        self.strict: bool = strict
        self.check_finite: bool = check_finite
        self.stopping_threshold: float | None = stopping_threshold
        self.divergence_threshold: float | None = divergence_threshold
        self.log_rank_zero_only: bool = log_rank_zero_only
        self._check_on_train_epoch_end: bool | None = check_on_train_epoch_end

        self.wait_count: int = 0
        self.stopped_epoch: int = 0
        self.best_score: Tensor = torch.tensor(math.inf if mode == "min" else -math.inf)
        self.stopping_reason: EarlyStoppingReason = EarlyStoppingReason.NOT_STOPPED
        self.stopping_reason_message: str | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.monitor, mode=self.mode)

    @property
    def monitor_op(self) -> Callable[[Tensor, Tensor | float], Tensor]:
        """``torch.lt`` or ``torch.gt``: whether a first score is better than a second."""
        return self.mode_dict[self.mode]

    @override
    def state_dict(self) -> StateDict:
        state = {name: getattr(self, name) for name in _STATE}
        return {**state, "stopping_reason": self.stopping_reason.value}

    @override
    def load_state_dict(self, state_dict: StateDict) -> None:
        # Files of Lightning before 0.10 hold less.
        vars(self).update({name: state_dict[name] for name in _STATE if name in state_dict})
        self.stopping_reason = EarlyStoppingReason(state_dict.get("stopping_reason", 0))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._checks_on_train_epoch_end(trainer) and not self._should_skip_check(trainer):
            self._run_early_stopping_check(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._should_skip_check(trainer) and not self._checks_on_train_epoch_end(trainer):
            self._run_early_stopping_check(trainer)

    def _checks_on_train_epoch_end(self, trainer: Trainer) -> bool:
        if self._check_on_train_epoch_end is not None:
            return self._check_on_train_epoch_end
        if not trainer.enable_validation:
            return True
        return validates_once_per_epoch(trainer)

    def _should_skip_check(self, trainer: Trainer) -> bool:
        return trainer.state.fn != "fit" or trainer.sanity_checking or bool(trainer.fast_dev_run)

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        metrics = trainer.callback_metrics
        is_here = self.monitor in metrics
        # A rank that had no batch has no value, and goes by those of the others.
        is_there = trainer.strategy.reduce_boolean_decision(is_here, all=False)
        if not is_there:
            self._report_missing(metrics)
            return
        should_stop, reason = False, None
        if is_here:
            current = torch.as_tensor(metrics[self.monitor]).detach().cpu().squeeze()
            should_stop, reason = self._evaluate_stopping_criteria(current)
        if trainer.strategy.reduce_boolean_decision(should_stop, all=False):
            trainer.should_stop = True
            self.stopped_epoch = trainer.current_epoch
        if reason and self.verbose:
            self._log_info(trainer, reason, self.log_rank_zero_only)

    def _report_missing(self, metrics: dict[str, object]) -> None:
        """Say that no rank has the metric.

        Raises:
            RuntimeError: ``strict`` is True.
        """
        message = (
            f"Early stopping conditioned on metric `{self.monitor}` which is not available. "
            f"Pass in or modify your `EarlyStopping` callback to use any of the following: `{'`, `'.join(metrics)}`."
            f"{did_you_mean(self.monitor, metrics)}"
        )
        if self.strict:
            raise RuntimeError(message)
        if self.verbose:
            rank_zero_warn(message, category=RuntimeWarning)

    def _evaluate_stopping_criteria(self, current: Tensor) -> tuple[bool, str | None]:
        """Return whether ``current`` is a reason to stop, and what there is to say about it."""
        order = self.order_dict[self.mode]
        worse = self.order_dict["max" if self.mode == "min" else "min"]
        value, best = current.item(), self.best_score.item()
        if self.check_finite and not math.isfinite(value):
            reason = EarlyStoppingReason.NON_FINITE_METRIC
            message = f"Monitored metric {self.monitor} = {value} is not finite. Previous best value was {best:.3f}."
        elif self.stopping_threshold is not None and self.monitor_op(current, self.stopping_threshold):
            reason = EarlyStoppingReason.STOPPING_THRESHOLD
            message = f"Stopping threshold reached: {self.monitor} = {value} {order} {self.stopping_threshold}."
        elif self.divergence_threshold is not None and self.monitor_op(-current, -self.divergence_threshold):
            reason = EarlyStoppingReason.DIVERGENCE_THRESHOLD
            message = f"Divergence threshold reached: {self.monitor} = {value} {worse} {self.divergence_threshold}."
        elif self.monitor_op(current - self.min_delta, self.best_score):
            message = self._improvement_message(current)
            self.best_score, self.wait_count = current, 0
            return False, message
        else:
            self.wait_count += 1
            if self.wait_count < self.patience:
                return False, None
            reason = EarlyStoppingReason.PATIENCE_EXHAUSTED
            message = (
                f"Monitored metric {self.monitor} did not improve in the last {self.wait_count} records. "
                f"Best score: {best:.3f}."
            )
        self.stopping_reason = reason
        self.stopping_reason_message = f"{message} Signaling Trainer to stop."
        return True, self.stopping_reason_message

    def _improvement_message(self, current: Tensor) -> str:
        if not torch.isfinite(self.best_score):
            return f"Metric {self.monitor} improved. New best score: {current.item():.3f}"
        change = abs(self.best_score - current).item()
        return (
            f"Metric {self.monitor} improved by {change:.3f} >= min_delta = {abs(self.min_delta)}. "
            f"New best score: {current.item():.3f}"
        )

    @staticmethod
    def _log_info(trainer: Trainer, message: str, log_rank_zero_only: bool) -> None:
        if not log_rank_zero_only or trainer.is_global_zero:
            log.info(rank_prefixed_message(message, trainer.global_rank if trainer.world_size > 1 else None))
