"""Who started the processes: levin, torchrun, or the scheduler of a cluster."""

from levin.environments.environment import ClusterEnvironment
from levin.environments.kubeflow import KubeflowEnvironment
from levin.environments.local import LightningEnvironment
from levin.environments.lsf import LSFEnvironment
from levin.environments.mpi import MPIEnvironment
from levin.environments.slurm import SLURMEnvironment
from levin.environments.torchelastic import TorchElasticEnvironment
from levin.environments.xla import XLAEnvironment

__all__ = [
    "ClusterEnvironment",
    "KubeflowEnvironment",
    "LSFEnvironment",
    "LightningEnvironment",
    "MPIEnvironment",
    "SLURMEnvironment",
    "TorchElasticEnvironment",
    "XLAEnvironment",
]
