"""Processes that levin starts itself, or that the user starts by hand."""

from __future__ import annotations

import os
import socket

from levin.environments.environment import ClusterEnvironment, read_int
from levin.utilities.rank_zero import rank_zero_only


class LightningEnvironment(ClusterEnvironment):
    """The default: levin starts one process per device of this machine.

    On several machines the user starts the script once on each with ``MASTER_ADDR``, ``MASTER_PORT`` and ``NODE_RANK``
    set. When ``LOCAL_RANK`` is set as well, every process was started by hand and levin starts none.

    Example:
        >>> LightningEnvironment().local_rank()
        0
    """

    def __init__(self) -> None:
        self._main_port = -1
        self._global_rank = 0
        self._world_size = 1

    @property
    def creates_processes_externally(self) -> bool:
        """Whether ``LOCAL_RANK`` is set."""
        return "LOCAL_RANK" in os.environ

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``, by default this machine."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``, by default a free port, the same in every call."""
        if self._main_port == -1:
            self._main_port = read_int("MASTER_PORT") if "MASTER_PORT" in os.environ else find_free_port()
        return self._main_port

    @staticmethod
    def detect() -> bool:
        """Return True."""
        return True

    def world_size(self) -> int:
        """Return the number that the strategy set."""
        return self._world_size

    def set_world_size(self, size: int) -> None:
        """Take note of the number of processes."""
        self._world_size = size

    def global_rank(self) -> int:
        """Return the number that the strategy set."""
        return self._global_rank

    def set_global_rank(self, rank: int) -> None:
        """Take note of the index of this process."""
        self._global_rank = rank
        setattr(rank_zero_only, "rank", rank)  # noqa: B010  (a function attribute is unknown to mypy)

    def local_rank(self) -> int:
        """Return ``LOCAL_RANK``, by default 0."""
        return read_int("LOCAL_RANK", 0)

    def node_rank(self) -> int:
        """Return ``GROUP_RANK`` or ``NODE_RANK``, by default 0."""
        return read_int("GROUP_RANK", read_int("NODE_RANK", 0))

    def teardown(self) -> None:
        """Forget ``WORLD_SIZE``, so that a later run in this process starts afresh."""
        os.environ.pop("WORLD_SIZE", None)


def find_free_port() -> int:
    """Return a port of this machine that nobody listens on, or ``STANDALONE_PORT`` when that is set."""
    if "STANDALONE_PORT" in os.environ:
        return read_int("STANDALONE_PORT")
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port
