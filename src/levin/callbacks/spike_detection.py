"""SpikeDetection: stops training when the loss jumps, and notes the batches to leave out."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from levin.hooks import Callback
from levin.module import LightningModule
from levin.protocols import Trainer
from levin.strategies import Strategy
from levin.utilities.exceptions import require_choice, value_error
from levin.utilities.types import STEP_OUTPUT, Batch, StateDict

_FILE = "skip_batches.json"
_STATE = ("last_val", "mode", "warmup", "atol", "rtol", "bad_batches")


class TrainingSpikeException(RuntimeError):
    """The loss jumped.

    Args:
        batch_idx: Index of the batch in its epoch.
    """

    def __init__(self, batch_idx: int) -> None:
        super().__init__(f"Training spike detected in batch {batch_idx}")
        self.batch_idx: int = batch_idx


class SpikeDetector:
    """Compares each loss with the running mean of the last ones; see :class:`SpikeDetection`, which a Trainer calls."""

    def __init__(
        self,
        mode: Literal["min", "max"] = "min",
        window: int = 10,
        warmup: int = 1,
        atol: float | None = None,
        rtol: float | None = 2.0,
        exclude_batches_path: str | os.PathLike[str] | None = None,
        finite_only: bool = True,
    ) -> None:
        super().__init__()
        require_choice("mode", mode, ("min", "max"))
        if not isinstance(window, int) or window < 1:
            raise value_error("window", window, "must be >= 1")
        self.mode: str = mode
        self.warmup: int = warmup
        self.atol: float | None = atol
        self.rtol: float | None = rtol
        self.finite_only: bool = finite_only
        self.exclude_batches_path: str | None = None if exclude_batches_path is None else str(exclude_batches_path)
        self.last_val: float = math.inf if mode == "min" else -math.inf
        self.bad_batches: list[int] = []
        self._window: deque[float] = deque(maxlen=window)

    def look_at(self, loss: Tensor | float, batch_idx: int, strategy: Strategy) -> None:
        """Take note of a loss, in all processes together.

        Args:
            loss: A number, or a tensor with one element.
            batch_idx: Index of the batch in its epoch.
            strategy: Of the run.

        Raises:
            TrainingSpikeException: It is a spike in one of them.
        """
        value = float(torch.as_tensor(loss).detach())
        is_looking = batch_idx >= self.warmup
        is_spike = is_looking and self.is_spike(value)
        if is_looking and strategy.reduce_boolean_decision(is_spike, all=False):
            self.bad_batches.extend(index for index in (batch_idx - 1, batch_idx) if index >= 0)
            if strategy.is_global_zero:
                self._write()
            strategy.barrier()
            raise TrainingSpikeException(batch_idx)
        if math.isfinite(value):
            self._window.append(value)
            self.last_val = value

    def is_spike(self, value: float) -> bool:
        """Return whether a loss is a spike after those seen so far.

        Args:
            value: The loss.
        """
        if not math.isfinite(value):
            return self.finite_only
        has_improved = value <= self.last_val if self.mode == "min" else value >= self.last_val
        if has_improved or not self._window:
            return False
        mean = sum(self._window) / len(self._window)
        distance = abs(value - mean)
        return (self.atol is None or distance >= abs(self.atol)) and (
            self.rtol is None or distance >= abs(self.rtol * mean)
        )

    def _write(self) -> None:
        path = self.exclude_batches_path or _FILE
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "w") as file:
            json.dump(self.bad_batches, file, indent=4)

    def state_dict(self) -> StateDict:
        """Return the running values and what was found."""
        state = {name: getattr(self, name) for name in _STATE}
        return {**state, "bad_batches_path": self.exclude_batches_path, "window": list(self._window)}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take up :meth:`state_dict`."""
        vars(self).update({name: state_dict[name] for name in _STATE})
        self.bad_batches = list(self.bad_batches)
        self.exclude_batches_path = state_dict["bad_batches_path"]
        self._window.extend(state_dict.get("window", ()))


class SpikeDetection(SpikeDetector, Callback):
    """Raises when the loss is much worse than its running mean, and writes down the batch and the one before it.

    Start again from a checkpoint and leave these batches out. Each batch waits for the device, since a spike must be
    known before the next step.

    Args:
        mode: ``"min"`` if a larger loss is worse, ``"max"`` if a smaller one is.
        window: Number of batches of the running mean.
        warmup: Number of batches of each epoch before the first look.
        atol: Least distance from the mean, in units of the loss.
        rtol: Least distance from the mean, as a share of it. With both, both must be exceeded.
        exclude_batches_path: JSON file for the list of batch indices, or a folder for ``skip_batches.json``; by default
            in the Trainer's ``default_root_dir``.
        finite_only: Whether NaN and infinity are spikes.

    Raises:
        MisconfigurationException: Arguments out of range.
        TrainingSpikeException: During training, a spike.

    Example:
        >>> detection = SpikeDetection(window=100, warmup=200, rtol=3.0)
    """

    is_on_all_ranks = True

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = trainer.default_root_dir if self.exclude_batches_path is None else self.exclude_batches_path
        self.exclude_batches_path = path if path.endswith(".json") else os.path.join(path, _FILE)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self.look_at(loss, batch_idx, trainer.strategy)
