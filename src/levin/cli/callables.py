"""Types for arguments that build optimizers and schedulers, and the scheduler that knows what it watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Optional, Union

from jsonargparse import Namespace
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler


class ReduceLROnPlateau(lr_scheduler.ReduceLROnPlateau):
    """The scheduler of torch's, with the name of the logged value that it watches.

    Args:
        optimizer: The optimizer whose learning rate it lowers.
        monitor: Name of the logged value.
        args: As for :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.
        kwargs: As for :class:`torch.optim.lr_scheduler.ReduceLROnPlateau`.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.1)
        >>> ReduceLROnPlateau(optimizer, monitor="val_loss", patience=3).monitor
        'val_loss'
    """

    def __init__(self, optimizer: Optimizer, monitor: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(optimizer, *args, **kwargs)
        self.monitor = monitor


ArgsType = Optional[Union[list[str], dict[str, Any], Namespace]]
"""What a command line can be given as from Python."""

LRSchedulerTypeTuple = (LRScheduler, ReduceLROnPlateau)
LRSchedulerTypeUnion = Union[LRScheduler, ReduceLROnPlateau]
LRSchedulerType = Union[type[LRScheduler], type[ReduceLROnPlateau]]

# jsonargparse asks for the types at run time, and offers the classes that the returned type allows.
OptimizerCallable = Callable[[Iterable], Optimizer]  # type: ignore[type-arg]  # parameters or groups of them
LRSchedulerCallable = Callable[[Optimizer], LRSchedulerTypeUnion]
