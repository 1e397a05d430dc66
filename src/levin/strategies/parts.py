"""What a strategy is made of: the parts that the user gave, and those that the engine chose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from levin.checkpoint.io import CheckpointIO, TorchCheckpointIO
from levin.precision.precision import Precision
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.properties import reads

if TYPE_CHECKING:
    from levin.accelerators.accelerator import Accelerator
    from levin.environments.environment import ClusterEnvironment
    from levin.launchers.launcher import Launcher
    from levin.strategies.layer_sync import LayerSync


@dataclass
class UserParts:
    """What the user passed to a strategy's constructor; None stands for "levin may choose"."""

    accelerator: Accelerator | None = None
    precision: Precision | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None
    parallel_devices: list[torch.device] | None = None


class StrategyParts:
    """The parts of a strategy; see :class:`levin.strategies.Strategy` for the arguments."""

    is_for_xla: bool = False
    """Whether it runs on XLA devices, and on no others."""

    join_norms: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Returns the norms of all processes that have parameters of their own, out of that of this one; None for no such thing."""

    counts_in_norm: Callable[[torch.Tensor], bool] | None = None
    """Whether a parameter counts in the norm of this process, or in that of another one that has it, too; None for always."""

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__()
        if precision is not None and precision_plugin is not None:
            raise MisconfigurationException(
                f"precision and precision_plugin are the same argument, received {precision!r} and "
                f"{precision_plugin!r}. Pass one of them."
            )
        self.user_parts = UserParts(
            accelerator=accelerator, precision=precision or precision_plugin, checkpoint_io=checkpoint_io
        )
        self._accelerator: Accelerator | None = accelerator
        self.checkpoint_io: CheckpointIO = checkpoint_io or TorchCheckpointIO()
        self.precision: Precision = self.user_parts.precision or Precision()
        self.environment: ClusterEnvironment | None = None
        self._launcher: Launcher | None = None
        self.layer_sync: LayerSync | None = None
        self.num_nodes: int = 1

    launcher: Launcher | None = reads(
        "_launcher", "What starts the processes; None where there is one process, or all are there."
    )

    @property
    def accelerator(self) -> Accelerator:
        """The hardware.

        Raises:
            RuntimeError: None was given and no engine has chosen one yet.
        """
        if self._accelerator is None:
            raise RuntimeError(
                f"{type(self).__name__} has no accelerator yet. Pass it to Trainer(strategy=...), or give it accelerator=..."
            )
        return self._accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator

    def default_checkpoint_io(self) -> CheckpointIO:
        """Return what writes and reads checkpoints where the user gave nothing for it."""
        return TorchCheckpointIO()

    def assemble(
        self,
        *,
        accelerator: Accelerator,
        precision: Precision,
        parallel_devices: list[torch.device],
        num_nodes: int = 1,
        environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        layer_sync: LayerSync | None = None,
    ) -> None:
        """Take the parts that the engine chose, before any process is started.

        Args:
            accelerator: The hardware.
            precision: The number format.
            parallel_devices: One device per process of this machine.
            num_nodes: Number of machines.
            environment: Who starts the processes; None in a single process.
            checkpoint_io: Writes and reads checkpoints; the default when None.
            layer_sync: Makes layers aware of other processes in training; none when None.
        """
        self._accelerator = accelerator
        self.precision = precision
        self.num_nodes = num_nodes
        self.environment = environment
        self.checkpoint_io = checkpoint_io or self.user_parts.checkpoint_io or self.default_checkpoint_io()
        self.layer_sync = layer_sync
        self.take_devices(parallel_devices)
        self._configure_launcher()

    def _configure_launcher(self) -> None:
        """Set :attr:`_launcher`; a strategy that starts processes in a way of its own overrides it."""

    def check_module(self, module: torch.nn.Module) -> None:
        """Raise before a process starts when a module cannot be set up, as far as its layers are there already."""

    def own_optimizer_state(self, optimizer: Optimizer, state: Any) -> Any:
        """Return, of the state of an optimizer as it was saved, the part that belongs to the parameters of this process."""
        return state

    def take_devices(self, parallel_devices: list[torch.device]) -> None:
        """Prepare for the devices that the engine chose, for strategies that start processes; see :meth:`assemble`."""

    def abandon_peers(self) -> None:
        """Take note that the other processes cannot be counted on any more, because this one failed."""
