"""Processes that mpirun started."""

from __future__ import annotations

import importlib.util
import os
import socket
from typing import Any

from typing_extensions import override

from levin.environments.environment import read_int
from levin.environments.external import ExternalEnvironment
from levin.environments.local import find_free_port
from levin.utilities.packages import require_package
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.warnings import PossibleUserWarning

# By Open MPI, by MPICH and what descends from it, by MVAPICH, by PMIx, by Cray's launcher.
_SET_BY_MPIRUN = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "PMI_RANK",
    "MPI_LOCALNRANKS",
    "MV2_COMM_WORLD_SIZE",
    "PMIX_RANK",
    "PALS_RANKID",
)


def num_started_by_mpirun() -> int:
    """Return how many processes the launcher says that MPI has; 1 where there is none."""
    return max(read_int(name, 1) for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"))


class MPIEnvironment(ExternalEnvironment):
    """Processes that ``mpirun`` started; they find each other through mpi4py.

    Raises:
        ModuleNotFoundError: mpi4py is not installed.
    """

    def __init__(self) -> None:
        require_package("mpi4py", "MPIEnvironment")
        from mpi4py import MPI

        self._world: Any = MPI.COMM_WORLD
        # Processes that share memory are those of one machine.
        self._local: Any = self._world.Split_type(MPI.COMM_TYPE_SHARED)
        self._node_rank: int | None = None
        self._main_address: str | None = None
        self._main_port: int | None = None

    @property
    @override
    def main_address(self) -> str:
        if self._main_address is None:
            self._main_address = str(self._world.bcast(socket.gethostname(), root=0))
        return self._main_address

    @property
    @override
    def main_port(self) -> int:
        if self._main_port is None:
            port = find_free_port() if self.global_rank() == 0 else None
            self._main_port = int(self._world.bcast(port, root=0))
        return self._main_port

    @staticmethod
    @override
    def detect() -> bool:
        # To import MPI is to start it, which a process that nothing of the kind has started is spared.
        if not any(name in os.environ for name in _SET_BY_MPIRUN):
            return False
        lack = "cannot be imported. Run `pip install mpi4py`"
        if importlib.util.find_spec("mpi4py") is not None:
            try:
                from mpi4py import MPI
            except (ImportError, RuntimeError):
                pass  # the MPI library that it was built for is not there
            else:
                if MPI.COMM_WORLD.Get_size() > 1:
                    return True
                library = MPI.Get_library_version().partition(",")[0].partition("\n")[0]
                lack = f"has another MPI than this mpirun, {library!r}. Use the mpirun of that one"
        num_processes = num_started_by_mpirun()
        if num_processes > 1 and "LOCAL_RANK" not in os.environ:  # whoever sets that has them find each other otherwise
            rank_zero_warn(
                f"mpirun started {num_processes} processes, and each trains alone: they find each other through mpi4py, which"
                f" {lack} to let them train together.",
                category=PossibleUserWarning,
            )
        return False

    @override
    def world_size(self) -> int:
        return int(self._world.Get_size())

    @override
    def global_rank(self) -> int:
        return int(self._world.Get_rank())

    @override
    def local_rank(self) -> int:
        return int(self._local.Get_rank())

    @override
    def node_rank(self) -> int:
        if self._node_rank is None:
            # Each machine is known by the smallest global rank on it.
            leader = self._local.bcast(self.global_rank(), root=0)
            leaders = sorted(set(self._world.allgather(leader)))
            self._node_rank = leaders.index(leader)
        return self._node_rank
