"""Processes that SLURM's srun started."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys

from typing_extensions import override

from levin.environments.environment import read_int
from levin.environments.external import ExternalEnvironment, Variables
from levin.environments.mpi import num_started_by_mpirun
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.interactive import is_slurm_shell
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.warnings import PossibleUserWarning

_TASKS_OF_COMPONENT = "SLURM_NTASKS_PER_NODE_HET_GROUP_"


class SLURMEnvironment(ExternalEnvironment):
    """Processes that ``srun`` started, one per device.

    Args:
        auto_requeue: Whether to save a checkpoint and put the job back in the queue when its time runs out.
        requeue_signal: The signal that announces it; SIGUSR1 by default.
    """

    variables = Variables("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")

    def __init__(self, auto_requeue: bool = True, requeue_signal: signal.Signals | None = None) -> None:
        self.auto_requeue = auto_requeue
        if requeue_signal is None and hasattr(signal, "SIGUSR1"):
            requeue_signal = signal.SIGUSR1
        self.requeue_signal: signal.Signals | None = requeue_signal
        if is_srun_missing():
            rank_zero_warn(
                "The command `srun` is on this machine but was not used. Start the script with `srun python "
                f"{os.path.basename(sys.argv[0])} ...` to run it under SLURM.",
                category=PossibleUserWarning,
            )

    @property
    @override
    def main_address(self) -> str:
        # A step may have a part of the job's nodes.
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        return os.environ.get("MASTER_ADDR") or self.resolve_root_node_address(nodes)

    @staticmethod
    def resolve_root_node_address(nodes: str) -> str:
        """Return the first machine of a SLURM node list.

        Example:
            >>> SLURMEnvironment.resolve_root_node_address("gpu[07-09,12],cpu3")
            'gpu07'
            >>> SLURMEnvironment.resolve_root_node_address("alpha,beta")
            'alpha'
        """
        # In "prefix[07-09,12]suffix" the first entry of the brackets stands for the first machine.
        text = re.sub(r"\[(.*?)[,-].*?\]", r"\1", nodes)
        text = re.sub(r"\[(.*?)\]", r"\1", text)
        return text.split(" ")[0].split(",")[0]

    @property
    @override
    def main_port(self) -> int:
        if "MASTER_PORT" in os.environ:
            return read_int("MASTER_PORT")
        digits = (os.environ.get("SLURM_JOB_ID") or "")[-4:]
        if not digits.isdigit():
            return 12910
        # Steps of one job may run beside each other.
        return int(digits) + 15000 + read_int("SLURM_STEP_ID", 0) % 10000

    @staticmethod
    @override
    def detect() -> bool:
        if is_srun_missing() or "SLURM_NTASKS" not in os.environ:
            return False
        num_tasks = read_int("SLURM_STEP_NUM_TASKS", 1)
        if num_started_by_mpirun() > num_tasks:
            return False  # A task is an mpirun, or a part of it, which has started several processes.
        if not is_slurm_shell():
            return True
        if num_tasks > 1 and "SLURM_PTY_PORT" not in os.environ:
            rank_zero_warn(
                f"srun started {num_tasks} tasks in a job named {SLURMEnvironment.job_name()!r}, which is taken for the shell"
                " of a person: each task trains alone. Pass plugins=SLURMEnvironment() to let them train together, or give"
                " srun another --job-name.",
                category=PossibleUserWarning,
            )
        return False

    @staticmethod
    def job_name() -> str | None:
        """Return ``SLURM_JOB_NAME``."""
        return os.environ.get("SLURM_JOB_NAME")

    @staticmethod
    def job_id() -> int | None:
        """Return ``SLURM_JOB_ID``; None outside of SLURM and in interactive jobs."""
        text = os.environ.get("SLURM_JOB_ID")
        if text is None or not text.isdigit() or is_slurm_shell():
            return None
        return int(text)

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Check the numbers against the allocation.

        Raises:
            RuntimeError: srun got ``--ntasks`` without ``--ntasks-per-node``, or was not used inside of a batch script for
                several processes.
            ValueError: ``devices`` or ``num_nodes`` differs from the allocation, or the components of a heterogeneous job
                differ from each other.
        """
        if is_slurm_shell() or (num_devices == num_nodes == 1 and is_batch_script()):
            return
        per_node = os.environ.get("SLURM_NTASKS_PER_NODE")
        per_component = [read_int(name) for name in sorted(os.environ) if name.startswith(_TASKS_OF_COMPONENT)]
        if len(set(per_component)) > 1:
            raise MisconfigurationException(
                f"The components of a heterogeneous job must have the same --ntasks-per-node, received {per_component}: levin"
                f" starts devices={num_devices} processes on every machine. Give all components --ntasks-per-node={num_devices}."
            )
        if per_node is None and read_int("SLURM_NTASKS", 1) > 1:
            raise RuntimeError(
                f"SLURM started --ntasks={os.environ['SLURM_NTASKS']} without saying how many per machine, and devices "
                f"cannot be placed. Use --ntasks-per-node={num_devices} instead of --ntasks."
            )
        if per_node is not None and read_int("SLURM_NTASKS_PER_NODE") != num_devices:
            raise MisconfigurationException(
                f"devices must equal SLURM's --ntasks-per-node={per_node}, received devices={num_devices}. "
                f"Set devices={per_node} or --ntasks-per-node={num_devices}."
            )
        nodes = os.environ.get("SLURM_NNODES")
        if nodes is not None and read_int("SLURM_NNODES") != num_nodes:
            raise MisconfigurationException(
                f"num_nodes must equal SLURM's --nodes={nodes}, received num_nodes={num_nodes}. "
                f"Set num_nodes={nodes} or --nodes={num_nodes}."
            )
        num_tasks = read_int("SLURM_NTASKS", 1)
        if num_tasks != num_devices * num_nodes:
            raise MisconfigurationException(
                f"devices * num_nodes must equal SLURM's --ntasks={num_tasks}, received devices={num_devices} and "
                f"num_nodes={num_nodes}. Set --ntasks-per-node={num_devices} and --nodes={num_nodes}, or devices and num_nodes."
            )
        if num_tasks > 1 and is_batch_script():
            raise RuntimeError(
                f"SLURM has reserved {num_tasks} tasks, and nothing has started them: this process was started by the "
                f"batch script itself. Write `srun python {os.path.basename(sys.argv[0])} ...` into it, or pass "
                "plugins=LightningEnvironment() to let levin start the processes of this machine."
            )


def is_batch_script() -> bool:
    """Return whether this process was started by the script that sbatch runs, and not by an ``srun`` in it."""
    return "SLURM_JOB_ID" in os.environ and not {"SLURM_STEP_ID", "SLURM_STEPID"} & os.environ.keys()


def is_srun_missing() -> bool:
    """Return whether SLURM is on this machine while this process was started without it."""
    return "SLURM_NTASKS" not in os.environ and shutil.which("srun") is not None
