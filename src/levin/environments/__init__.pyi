from levin.environments.environment import ClusterEnvironment as ClusterEnvironment
from levin.environments.kubeflow import KubeflowEnvironment as KubeflowEnvironment
from levin.environments.local import LightningEnvironment as LightningEnvironment
from levin.environments.lsf import LSFEnvironment as LSFEnvironment
from levin.environments.mpi import MPIEnvironment as MPIEnvironment
from levin.environments.slurm import SLURMEnvironment as SLURMEnvironment
from levin.environments.torchelastic import TorchElasticEnvironment as TorchElasticEnvironment
from levin.environments.xla import XLAEnvironment as XLAEnvironment
