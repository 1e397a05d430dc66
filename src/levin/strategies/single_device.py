"""One process on one device."""

from __future__ import annotations

from abc import ABC
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from levin.strategies.strategy import Strategy
from levin.utilities.types import Group, Tree

if TYPE_CHECKING:
    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.precision.precision import Precision

T = TypeVar("T")


class OneProcess(Strategy, ABC):
    """There is nobody to talk to."""

    is_global_zero = True

    def reduce(self, tensor: Tree, group: Group = None, reduce_op: object = "mean") -> Tree:
        """Return ``tensor``."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Group = None, sync_grads: bool = False) -> Tensor:
        """Return ``tensor``."""
        return tensor

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return ``obj``."""
        return obj

    def barrier(self, name: str | None = None) -> None:
        """Return at once."""


class SingleDeviceStrategy(OneProcess):
    """One process on one device: nothing is wrapped and there is nobody to talk to.

    Args:
        device: The device.
        accelerator: The hardware; by default the one that ``device`` belongs to.
        checkpoint_io: Writes and reads checkpoints.
        precision: The number format.
        precision_plugin: Another name for ``precision``.

    Example:
        >>> SingleDeviceStrategy("cpu").reduce(torch.tensor(2.0))
        tensor(2.)
    """

    strategy_name = "single_device"

    def __init__(
        self,
        device: torch.device | str | int = "cpu",
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision, precision_plugin)
        self._root_device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)

    @property
    def root_device(self) -> torch.device:
        """The device."""
        return self._root_device

    @root_device.setter
    def root_device(self, device: torch.device) -> None:
        self._root_device = device
