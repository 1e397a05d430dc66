"""Processes that levin starts itself, or that the user starts by hand."""

from __future__ import annotations

import os
import socket
from abc import ABC

from typing_extensions import override

from levin.environments.environment import ClusterEnvironment, read_int
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import set_rank


class LocalEnvironment(ClusterEnvironment, ABC):
    """Processes of this machine that levin starts; on several machines the user starts the script once on each."""

    def __init__(self) -> None:
        self._main_port = -1
        self._global_rank = 0
        self._world_size = 1

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return "LOCAL_RANK" in os.environ

    @property
    @override
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    @override
    def main_port(self) -> int:
        if self._main_port == -1:
            if "MASTER_PORT" in os.environ:
                self._main_port = read_int("MASTER_PORT")
            elif self.creates_processes_externally and self._world_size > 1 and "STANDALONE_PORT" not in os.environ:
                raise RuntimeError(
                    f"MASTER_PORT must say where the {self._world_size} processes find each other, and is not set, while LOCAL_RANK="
                    f"{os.environ['LOCAL_RANK']} is: with that, something else has to start each of them. Set MASTER_ADDR and "
                    "MASTER_PORT in all of them, or unset LOCAL_RANK to let levin start them."
                )
            else:
                self._main_port = find_free_port()
        return self._main_port

    @override
    def world_size(self) -> int:
        return self._world_size

    @override
    def set_world_size(self, size: int) -> None:
        self._world_size = size

    @override
    def global_rank(self) -> int:
        return self._global_rank

    @override
    def set_global_rank(self, rank: int) -> None:
        self._global_rank = rank
        set_rank(rank)

    @override
    def local_rank(self) -> int:
        return read_int("LOCAL_RANK", 0)

    @override
    def node_rank(self) -> int:
        return read_int("GROUP_RANK", read_int("NODE_RANK", 0))


class LightningEnvironment(LocalEnvironment):
    """The default: levin starts one process per device of this machine.

    On several machines the user starts the script once on each with ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``
    set. When ``LOCAL_RANK`` is set as well, every process was started by hand and levin starts none.

    Example:
        >>> LightningEnvironment().local_rank()
        0
    """

    @staticmethod
    @override
    def detect() -> bool:
        return True

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check that each machine knows which one it is.

        Raises:
            ValueError: There are several machines, and the variables are those of Kubeflow's operator.
        """
        is_operator = {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys()
        if num_nodes > 1 and is_operator and not {"NODE_RANK", "GROUP_RANK", "LOCAL_RANK"} & os.environ.keys():
            raise MisconfigurationException(
                f"NODE_RANK must say which of the num_nodes={num_nodes} machines this is, and is not set, while RANK="
                f"{os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are, as Kubeflow's operator sets them. Pass"
                " Trainer(plugins=[KubeflowEnvironment()]), or start the script with torchrun."
            )


def find_free_port() -> int:
    """Return a port of this machine that nobody listens on, or ``STANDALONE_PORT`` when that is set."""
    if "STANDALONE_PORT" in os.environ:
        return read_int("STANDALONE_PORT")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
