"""Processes that the PyTorchJob operator of Kubeflow started."""

from __future__ import annotations

import os

from levin.environments.environment import ClusterEnvironment, read_int


class KubeflowEnvironment(ClusterEnvironment):
    """One process per pod, started by Kubeflow's PyTorchJob; pass it in ``Trainer(plugins=...)``, it is not detected."""

    @property
    def creates_processes_externally(self) -> bool:
        """True: the operator does."""
        return True

    @property
    def main_address(self) -> str:
        """``MASTER_ADDR``."""
        if "MASTER_ADDR" not in os.environ:
            raise RuntimeError(
                "The environment variable MASTER_ADDR must be set for KubeflowEnvironment, and is not. "
                "Run the script in a PyTorchJob."
            )
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        """``MASTER_PORT``."""
        return read_int("MASTER_PORT")

    @staticmethod
    def detect() -> bool:
        """Raise: torchrun sets the same variables, so the choice is left to the user.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "KubeflowEnvironment cannot be told from torchrun by its variables. Pass Trainer(plugins=[KubeflowEnvironment()])."
        )

    def world_size(self) -> int:
        """Return ``WORLD_SIZE``."""
        return read_int("WORLD_SIZE")

    def set_world_size(self, size: int) -> None:
        """Do nothing: Kubeflow knows."""

    def global_rank(self) -> int:
        """Return ``RANK``."""
        return read_int("RANK")

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: Kubeflow knows."""

    def local_rank(self) -> int:
        """Return 0: one process per pod."""
        return 0

    def node_rank(self) -> int:
        """Return the global rank: one process per pod."""
        return self.global_rank()
