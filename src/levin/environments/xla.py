"""Processes of torch_xla."""

from __future__ import annotations

from levin.accelerators.xla import XLAAccelerator
from levin.environments.environment import ClusterEnvironment


class XLAEnvironment(ClusterEnvironment):
    """Processes that torch_xla started; its runtime knows the ranks.

    Raises:
        ModuleNotFoundError: torch_xla is not installed.
    """

    def __init__(self) -> None:
        # Its constructor has the check for torch_xla.
        XLAAccelerator()

    @property
    def creates_processes_externally(self) -> bool:
        """False: levin starts them through torch_xla."""
        return False

    @property
    def main_address(self) -> str:
        """Not known: torch_xla connects its processes itself.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("main_address has no meaning for XLAEnvironment: torch_xla connects its processes.")

    @property
    def main_port(self) -> int:
        """Not known: torch_xla connects its processes itself.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("main_port has no meaning for XLAEnvironment: torch_xla connects its processes.")

    @staticmethod
    def detect() -> bool:
        """Return whether there is a TPU."""
        return XLAAccelerator.is_available()

    def world_size(self) -> int:
        """Return the number of processes that the runtime has."""
        from torch_xla import runtime

        return int(runtime.world_size())

    def set_world_size(self, size: int) -> None:
        """Do nothing: the runtime knows."""

    def global_rank(self) -> int:
        """Return the index of this process in the runtime."""
        from torch_xla import runtime

        return int(runtime.global_ordinal())

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: the runtime knows."""

    def local_rank(self) -> int:
        """Return the index of this process on its machine."""
        from torch_xla import runtime

        return int(runtime.local_ordinal())

    def node_rank(self) -> int:
        """Return the index of this machine."""
        from torch_xla import runtime

        return int(runtime.host_index())
