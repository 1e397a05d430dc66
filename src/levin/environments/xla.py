"""Hosts of a TPU pod."""

from __future__ import annotations

import os

from typing_extensions import override

from levin.accelerators.xla import XLAAccelerator
from levin.environments.environment import ClusterEnvironment
from levin.environments.local import LightningEnvironment


class XLAEnvironment(ClusterEnvironment):
    """Processes that levin starts on each host of a TPU pod, on which the script is started once.

    Which host this is, and where the first one listens, is asked of the TPU unless ``NODE_RANK`` and ``MASTER_ADDR`` say so.

    Raises:
        ModuleNotFoundError: torch_xla is not installed.
    """

    def __init__(self) -> None:
        # Its constructor has the check for torch_xla.
        XLAAccelerator()
        self._local = LightningEnvironment()

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return self._local.creates_processes_externally

    @property
    @override
    def main_address(self) -> str:
        if "MASTER_ADDR" in os.environ or not XLAAccelerator.num_tpus():
            return self._local.main_address
        from torch_xla._internal import tpu

        return str(tpu.get_worker_ips()[0])

    @property
    @override
    def main_port(self) -> int:
        return self._local.main_port

    @staticmethod
    @override
    def detect() -> bool:
        return XLAAccelerator.is_available()

    @override
    def world_size(self) -> int:
        return self._local.world_size()

    @override
    def set_world_size(self, size: int) -> None:
        self._local.set_world_size(size)

    @override
    def global_rank(self) -> int:
        return self._local.global_rank()

    @override
    def set_global_rank(self, rank: int) -> None:
        self._local.set_global_rank(rank)

    @override
    def local_rank(self) -> int:
        return self._local.local_rank()

    @override
    def node_rank(self) -> int:
        if {"NODE_RANK", "GROUP_RANK"} & os.environ.keys() or not XLAAccelerator.num_tpus():
            return self._local.node_rank()
        from torch_xla._internal import tpu

        return int(tpu.worker_id())
