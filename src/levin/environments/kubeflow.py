"""Processes that the PyTorchJob operator of Kubeflow started."""

from __future__ import annotations

import os

from typing_extensions import override

from levin.environments.environment import read_int
from levin.environments.external import ExternalEnvironment, Variables


class KubeflowEnvironment(ExternalEnvironment):
    """One process per pod, started by Kubeflow's PyTorchJob; pass it in ``Trainer(plugins=...)``, it is not detected."""

    variables = Variables("WORLD_SIZE", "RANK", node_rank="RANK")

    @property
    @override
    def main_address(self) -> str:
        if "MASTER_ADDR" not in os.environ:
            raise RuntimeError(
                "The environment variable MASTER_ADDR must be set for KubeflowEnvironment, and is not. "
                "Run the script in a PyTorchJob."
            )
        return os.environ["MASTER_ADDR"]

    @property
    @override
    def main_port(self) -> int:
        return read_int("MASTER_PORT")

    @staticmethod
    @override
    def detect() -> bool:
        """Raise: torchrun sets the same variables, so the choice is left to the user.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "KubeflowEnvironment cannot be told from torchrun by its variables. Pass Trainer(plugins=[KubeflowEnvironment()])."
        )
