"""Hosts of a TPU pod."""

from __future__ import annotations

import os

from typing_extensions import override

from levin.accelerators.xla import XLAAccelerator
from levin.environments.local import LocalEnvironment


class XLAEnvironment(LocalEnvironment):
    """Processes that levin starts on each host of a TPU pod, on which the script is started once.

    Which host this is, and where the first one listens, is asked of the TPU unless ``NODE_RANK`` and ``MASTER_ADDR`` say so.

    Raises:
        ModuleNotFoundError: torch_xla is not installed.
    """

    def __init__(self) -> None:
        # Its constructor has the check for torch_xla.
        XLAAccelerator()
        super().__init__()

    @property
    @override
    def main_address(self) -> str:
        if "MASTER_ADDR" in os.environ or not XLAAccelerator.num_tpus():
            return super().main_address
        from torch_xla._internal import tpu

        return str(tpu.get_worker_ips()[0])

    @staticmethod
    @override
    def detect() -> bool:
        return XLAAccelerator.is_available()

    @override
    def node_rank(self) -> int:
        if {"NODE_RANK", "GROUP_RANK"} & os.environ.keys() or not XLAAccelerator.num_tpus():
            return super().node_rank()
        from torch_xla._internal import tpu

        return int(tpu.worker_id())
