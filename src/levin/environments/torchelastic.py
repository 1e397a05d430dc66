"""Processes that torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch.distributed
from typing_extensions import override

from levin.environments.environment import read_int
from levin.environments.external import ExternalEnvironment, Variables
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.rank_zero import rank_zero_warn


class TorchElasticEnvironment(ExternalEnvironment):
    """Processes that ``torchrun`` started, possibly again after a failure."""

    variables = Variables("WORLD_SIZE", "RANK", "LOCAL_RANK")
    is_lone_without_variables = True

    @property
    @override
    def main_address(self) -> str:
        if "MASTER_ADDR" not in os.environ:
            rank_zero_warn("MASTER_ADDR is not set. Using 127.0.0.1, which is right for one machine only.")
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        return os.environ["MASTER_ADDR"]

    @property
    @override
    def main_port(self) -> int:
        if "MASTER_PORT" not in os.environ:
            rank_zero_warn("MASTER_PORT is not set. Using 12910.")
            os.environ["MASTER_PORT"] = "12910"
        return read_int("MASTER_PORT")

    @staticmethod
    @override
    def detect() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()

    @override
    def node_rank(self) -> int:
        return read_int("GROUP_RANK", 0)

    @override
    def store(self, timeout: timedelta | None) -> Any:
        """Return a part of torchrun's store that earlier attempts have not written into.

        torchrun keeps one store over its restarts, in which the addresses of processes that have died still stand. A new
        process that reads one waits for it in vain.
        """
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or read_int("TORCHELASTIC_RESTART_COUNT", 0) == 0:
            return None
        if read_int("GROUP_WORLD_SIZE", 1) > 1:
            # Each machine counts its own restarts, so the count cannot name the attempt.
            rank_zero_warn(
                "torchrun restarted the processes and keeps one store over its restarts, in which addresses of dead ones may "
                "stand. Start with `levin launch`, or with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, on several machines."
            )
            return None
        distributed: Any = torch.distributed
        waits = {} if timeout is None else {"timeout": timeout}
        shared = distributed.TCPStore(self.main_address, self.main_port, is_master=False, **waits)
        return distributed.PrefixStore(f"attempt_{read_int('TORCHELASTIC_RESTART_COUNT')}", shared)

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check that the numbers multiply to what torchrun started.

        Raises:
            ValueError: ``devices`` times ``num_nodes`` is not the number of processes.
        """
        if num_devices * num_nodes != self.world_size():
            raise MisconfigurationException(
                f"devices * num_nodes must be the {self.world_size()} processes that torchrun started, received "
                f"devices={num_devices} and num_nodes={num_nodes}. Set devices to torchrun's --nproc-per-node and "
                "num_nodes to its --nnodes."
            )
