"""Processes of torch_xla."""

from __future__ import annotations

from typing_extensions import override

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
    @override
    def creates_processes_externally(self) -> bool:
        return False

    @property
    @override
    def main_address(self) -> str:
        """Not known: torch_xla connects its processes itself.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("main_address has no meaning for XLAEnvironment: torch_xla connects its processes.")

    @property
    @override
    def main_port(self) -> int:
        """Not known: torch_xla connects its processes itself.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("main_port has no meaning for XLAEnvironment: torch_xla connects its processes.")

    @staticmethod
    @override
    def detect() -> bool:
        return XLAAccelerator.is_available()

    @override
    def world_size(self) -> int:
        from torch_xla import runtime

        return int(runtime.world_size())

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        from torch_xla import runtime

        return int(runtime.global_ordinal())

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        from torch_xla import runtime

        return int(runtime.local_ordinal())

    @override
    def node_rank(self) -> int:
        from torch_xla import runtime

        return int(runtime.host_index())
