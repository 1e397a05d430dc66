"""Names for the types in public signatures."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional, TypedDict, Union

import torch
from torch.optim import Optimizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = Any
"""What a loader gives: whatever the user's data set and collate function make. Hooks name the type that they expect."""

Tree = Any
"""A tensor or another value, or lists, tuples and dicts of them, nested as one likes."""

Closure = Callable[[], Any]
"""Computes the loss and its gradients, and returns the loss."""

Group = Optional["ProcessGroup"]
"""Processes that talk to each other, as torch.distributed knows them; None for all."""

Function = Callable[..., Any]
"""Whatever can be called: a method of the user's, which takes and returns what it likes."""

StateDict = dict[str, Any]
"""What ``state_dict()`` returns, and a checkpoint is: a value of any kind under each name."""

Kwargs = dict[str, Any]
"""Keyword arguments that are kept and passed on."""

ParamGroup = dict[str, Any]
"""A parameter group of an optimizer: ``params``, ``lr`` and what else the optimizer keeps there."""

Metrics = Mapping[str, Any]
"""Values by name: numbers, tensors of one element, or what a logger takes besides."""

HParams = Union[dict[str, Any], Namespace]
"""Hyper-parameters as users have them."""

STEP_OUTPUT = Optional[Union[torch.Tensor, Mapping[str, Any]]]
TRAIN_DATALOADERS = Any
EVAL_DATALOADERS = Any
PathLike = Union[str, "os.PathLike[str]"]
_PATH = PathLike
_DEVICE = Union[torch.device, str, int]
_MAP_LOCATION_TYPE = Optional[Union[_DEVICE, Callable[[Any, str], Any], dict[str, str]]]
LRSchedulerType = Union[torch.optim.lr_scheduler.LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau]
LRScheduler = torch.optim.lr_scheduler.LRScheduler
ReduceLROnPlateau = torch.optim.lr_scheduler.ReduceLROnPlateau


@dataclass
class LRSchedulerConfig:
    """When and on what a learning-rate scheduler is stepped.

    Args:
        scheduler: The scheduler.
        name: Label for LearningRateMonitor.
        interval: ``"epoch"`` or ``"step"``.
        frequency: Step every so many intervals.
        reduce_on_plateau: Whether the scheduler needs the monitored value.
        monitor: Key in ``callback_metrics`` that a plateau scheduler reads.
        strict: Whether a missing ``monitor`` is an error (True) or a warning (False).
    """

    scheduler: Any
    name: Optional[str] = None
    interval: str = "epoch"
    frequency: int = 1
    reduce_on_plateau: bool = False
    monitor: Optional[str] = None
    strict: bool = True


class LRSchedulerConfigType(TypedDict, total=False):
    """The dict form in which ``configure_optimizers`` may return a scheduler."""

    scheduler: object
    name: Optional[str]
    interval: str
    frequency: int
    reduce_on_plateau: bool
    monitor: Optional[str]
    strict: bool


class OptimizerConfig(TypedDict):
    """The dict form with an optimizer alone."""

    optimizer: Optimizer


class OptimizerLRSchedulerConfig(TypedDict, total=False):
    """The dict form with an optimizer and its scheduler."""

    optimizer: Optimizer
    lr_scheduler: object
    monitor: str


OptimizerLRScheduler = Optional[
    Union[
        Optimizer,
        Sequence[Optimizer],
        tuple[Sequence[Optimizer], Sequence[Any]],
        OptimizerConfig,
        OptimizerLRSchedulerConfig,
        Sequence[OptimizerConfig],
        Sequence[OptimizerLRSchedulerConfig],
    ]
]
