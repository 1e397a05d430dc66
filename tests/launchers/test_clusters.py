"""Real processes under the variables of each launcher and scheduler: one script, the same weights everywhere."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import _free_port

SCRIPT = """
import os
import sys
import torch
from levin import Trainer
from levin.environments import ClusterEnvironment, KubeflowEnvironment
from tests.strategies.small import QUIET, Small

class Farm(ClusterEnvironment):
    creates_processes_externally = True
    main_address = "127.0.0.1"
    main_port = property(lambda self: int(os.environ["FARM_PORT"]))

    @staticmethod
    def detect():
        return False

    def world_size(self):
        return 2

    def set_world_size(self, size):
        pass

    def global_rank(self):
        return int(os.environ["FARM_RANK"])

    def set_global_rank(self, rank):
        pass

    def local_rank(self):
        return self.global_rank()

    def node_rank(self):
        return 0

if __name__ == "__main__":
    folder, plugin, devices, nodes = sys.argv[1:5]
    plugins = {"kubeflow": [KubeflowEnvironment()], "one's own": [Farm()]}.get(plugin)
    trainer = Trainer(**{**QUIET, "devices": int(devices), "num_nodes": int(nodes), "strategy": "ddp", "max_epochs": 1,
                         "enable_checkpointing": False, "plugins": plugins})
    module = Small()
    trainer.fit(module)
    torch.save({"weights": module.state_dict(), "seen": module.seen, "loss": trainer.callback_metrics["loss"],
                "environment": type(trainer.strategy.cluster_environment).__name__},
               f"{folder}/result-{trainer.global_rank}")
"""
ROOT = Path(__file__).parents[2]
OURS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def run(command: list[str], tmp_path: Path, ranks: list[dict[str, object]], arguments: tuple[str, ...]) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    base = {name: value for name, value in os.environ.items() if name not in OURS}
    # What is there already is where mpi4py lies.
    base["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    base["OMP_NUM_THREADS"] = "1"
    processes = [
        subprocess.Popen(
            [*command, str(script), str(tmp_path), *arguments],
            env={**base, **{name: str(value) for name, value in variables.items()}},
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in ranks
    ]
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)


def check(tmp_path: Path, environment: str) -> None:
    import torch

    results = [torch.load(tmp_path / f"result-{rank}", weights_only=False) for rank in range(2)]
    assert [result["environment"] for result in results] == [environment] * 2
    assert sorted(results[0]["seen"] + results[1]["seen"]) == list(range(16))
    assert results[0]["loss"] == results[1]["loss"]
    for first, second in zip(results[0]["weights"].values(), results[1]["weights"].values(), strict=True):
        assert torch.equal(first, second)


def test_the_script_alone(tmp_path):
    run([sys.executable], tmp_path, [{}], ("-", "2", "1"))
    check(tmp_path, "LightningEnvironment")


def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={_free_port()}"]
    run(command, tmp_path, [{}], ("-", "2", "1"))
    check(tmp_path, "TorchElasticEnvironment")


# Of several the first is that of mpi4py. A folder may be there by two names.
MPIRUNS = list(
    dict.fromkeys(path.resolve() for folder in os.get_exec_path() if (path := Path(folder, "mpirun")).exists())
)
needs_mpirun = pytest.mark.skipif(not MPIRUNS, reason="mpirun is not installed (make test-mpi)")
needs_mpi4py = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed (make test-mpi)"
)


@pytest.fixture
def open_mpi(monkeypatch):
    # For what other MPIs do by themselves.
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "OMPI_MCA_rmaps_base_oversubscribe"):
        monkeypatch.setenv(name, "1")


@needs_mpirun
@needs_mpi4py
def test_mpirun(tmp_path, open_mpi):
    run([str(MPIRUNS[0]), "-n", "2", sys.executable], tmp_path, [{}], ("-", "2", "1"))
    check(tmp_path, "MPIEnvironment")


def told_alone(mpirun: Path, program: str, tmp_path: Path) -> str:
    """Run a program in two processes that cannot find each other, and return what they say."""
    # In one write: the two share their output.
    program += "; import levin, sys; sys.stdout.write(f'{levin.Trainer(logger=False).world_size}\\n')"
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(mpirun), "-n", "2", sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split() == ["1", "1"], done.stderr
    assert done.stderr.count("mpirun started 2 processes, and each trains alone") == 2
    return done.stderr


@needs_mpirun
def test_mpirun_without_mpi4py_says_that_each_process_trains_alone(tmp_path, open_mpi):
    told = told_alone(MPIRUNS[0], "import sys; sys.modules['mpi4py'] = None", tmp_path)
    assert told.count("Run `pip install mpi4py`") == 2


@needs_mpi4py
@pytest.mark.skipif(len(MPIRUNS) < 2, reason="there is no other MPI than Open MPI (make test-mpi)")
def test_mpirun_of_another_mpi_than_that_of_mpi4py_says_that_each_process_trains_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("MPI4PY_LIBMPI", "libmpi.so.40")
    assert told_alone(MPIRUNS[0], "pass", tmp_path).count("has another MPI than this mpirun, 'Open MPI v") == 2


def variables_of(cluster: str, tmp_path: Path) -> list[dict[str, object]]:
    port = _free_port()
    if cluster == "srun":
        common = {
            "SLURM_JOB_ID": 12345, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2,
            "SLURM_NNODES": 1, "SLURM_NODELIST": "localhost", "SLURM_NODEID": 0, "SLURM_STEP_ID": 0,
            "MASTER_PORT": port,
        }  # fmt: skip
        return [{**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(2)]
    if cluster == "jsrun":
        hosts = tmp_path / "hosts"
        hosts.write_text("launch\nlocalhost\nlocalhost\n")
        common = {"LSB_JOBID": 777, "LSB_DJOB_RANKFILE": hosts, "JSM_NAMESPACE_SIZE": 2, "MASTER_PORT": port}
        return [{**common, "JSM_NAMESPACE_RANK": rank, "JSM_NAMESPACE_LOCAL_RANK": rank} for rank in range(2)]
    if cluster == "one's own":
        return [{"FARM_PORT": port, "FARM_RANK": rank} for rank in range(2)]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if cluster == "kubeflow":
        return [{**common, "WORLD_SIZE": 2, "RANK": rank} for rank in range(2)]
    if cluster == "two machines by hand":
        return [{**common, "NODE_RANK": rank} for rank in range(2)]
    return [{**common, "LOCAL_RANK": rank} for rank in range(2)]


@pytest.mark.parametrize(
    ("cluster", "devices", "nodes", "environment"),
    [
        ("srun", 2, 1, "SLURMEnvironment"),
        ("jsrun", 2, 1, "LSFEnvironment"),
        ("kubeflow", 1, 2, "KubeflowEnvironment"),
        ("two machines by hand", 1, 2, "LightningEnvironment"),
        ("by hand", 2, 1, "LightningEnvironment"),
        ("one's own", 2, 1, "Farm"),
    ],
)
def test_started_from_outside(cluster, devices, nodes, environment, tmp_path):
    run([sys.executable], tmp_path, variables_of(cluster, tmp_path), (cluster, str(devices), str(nodes)))
    check(tmp_path, environment)
