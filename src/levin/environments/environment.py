"""Who started the processes, and what they know of each other."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any


class ClusterEnvironment(ABC):
    """How many processes there are, which one this is, and where rank 0 listens.

    Subclass it for a scheduler that levin does not know and pass the instance in ``Trainer(plugins=...)``.
    """

    @property
    @abstractmethod
    def creates_processes_externally(self) -> bool:
        """Whether something outside starts all processes; otherwise levin's launchers do."""

    @property
    @abstractmethod
    def main_address(self) -> str:
        """Name or address of the machine on which rank 0 runs."""

    @property
    @abstractmethod
    def main_port(self) -> int:
        """Port on which rank 0 listens."""

    @staticmethod
    @abstractmethod
    def detect() -> bool:
        """Return whether this process was started in such an environment."""

    @abstractmethod
    def world_size(self) -> int:
        """Return the number of processes over all machines."""

    @abstractmethod
    def set_world_size(self, size: int) -> None:
        """Take note of the number of processes; environments that know it themselves ignore this."""

    @abstractmethod
    def global_rank(self) -> int:
        """Return the index of this process among all."""

    @abstractmethod
    def set_global_rank(self, rank: int) -> None:
        """Take note of the index of this process; environments that know it themselves ignore this."""

    @abstractmethod
    def local_rank(self) -> int:
        """Return the index of this process on its machine."""

    @abstractmethod
    def node_rank(self) -> int:
        """Return the index of this machine."""

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check the user's numbers against what was really started.

        Args:
            num_devices: Devices per machine.
            num_nodes: Machines.

        Raises:
            ValueError: They do not fit.
        """

    def store(self, timeout: timedelta | None) -> Any:
        """Return the store through which the processes find each other; None when torch shall make its own.

        Args:
            timeout: How long a process waits for what another one writes; torch's default when None.
        """
        return None

    def teardown(self) -> None:
        """Remove what was written into the process environment."""


def read_int(name: str, default: int | None = None) -> int:
    """Return an environment variable as a number.

    Args:
        name: The variable.
        default: Value when it is not set; without it the variable is required.

    Raises:
        RuntimeError: The variable is required and not set, or is not a number.
    """
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise RuntimeError(
                f"The environment variable {name} must be set for this cluster environment, and is not. "
                "Start the script with the launcher of the cluster."
            )
        return default
    try:
        return int(text)
    except ValueError:
        raise RuntimeError(f"The environment variable {name} must be a number, received {text!r}.") from None
