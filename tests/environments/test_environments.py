"""Who started the processes: each environment under the variables of a real allocation."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import sys
import types

import pytest

from levin.environments import (
    ClusterEnvironment,
    KubeflowEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    XLAEnvironment,
)
from levin.environments.local import find_free_port
from levin.environments.lsf import read_rank_file
from levin.utilities.rank_zero import rank_zero_only
from levin.utilities.warnings import PossibleUserWarning

PREFIXES = ("SLURM_", "LSB_", "JSM_", "TORCHELASTIC_")
NAMES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "STANDALONE_PORT")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name in NAMES or name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setattr(rank_zero_only, "rank", 0)


def set_variables(monkeypatch, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_lightning_defaults():
    environment = LightningEnvironment()
    assert LightningEnvironment.detect()
    assert environment.creates_processes_externally is False
    assert environment.main_address == "127.0.0.1"
    assert environment.main_port == environment.main_port
    with socket.socket() as probe:
        probe.bind(("", environment.main_port))
    assert (environment.world_size(), environment.global_rank()) == (1, 0)
    assert (environment.local_rank(), environment.node_rank()) == (0, 0)
    environment.set_world_size(4)
    environment.set_global_rank(3)
    assert (environment.world_size(), environment.global_rank(), rank_zero_only.rank) == (4, 3, 3)


def test_lightning_by_hand(monkeypatch):
    set_variables(monkeypatch, MASTER_ADDR="10.0.0.1", MASTER_PORT=1234, LOCAL_RANK=2, NODE_RANK=1, WORLD_SIZE=8)
    environment = LightningEnvironment()
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("10.0.0.1", 1234)
    assert (environment.local_rank(), environment.node_rank()) == (2, 1)
    monkeypatch.setenv("GROUP_RANK", "5")
    assert environment.node_rank() == 5
    environment.teardown()
    # What splits data by it goes on doing so in a second run.
    assert os.environ["WORLD_SIZE"] == "8"


def test_a_process_that_nobody_can_find_is_told_at_once(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    environment = LightningEnvironment()
    environment.set_world_size(2)
    with pytest.raises(
        RuntimeError, match=r"MASTER_PORT must say where the 2 processes find each other.*unset LOCAL_RANK"
    ):
        assert environment.main_port
    environment.set_world_size(1)
    assert environment.main_port > 0


def test_lightning_port_for_single_runs(monkeypatch):
    monkeypatch.setenv("STANDALONE_PORT", "2345")
    assert LightningEnvironment().main_port == 2345


def test_a_variable_that_is_no_number(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "first")
    with pytest.raises(RuntimeError, match=r"LOCAL_RANK must be a number, received 'first'"):
        LightningEnvironment().local_rank()


def test_torchelastic(monkeypatch):
    assert TorchElasticEnvironment.detect() is False
    set_variables(
        monkeypatch, TORCHELASTIC_RUN_ID="x", MASTER_ADDR="host", MASTER_PORT=29400, WORLD_SIZE=4, RANK=3, LOCAL_RANK=1,
        GROUP_RANK=1,
    )  # fmt: skip
    assert TorchElasticEnvironment.detect()
    environment = TorchElasticEnvironment()
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("host", 29400)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    environment.set_world_size(9)
    environment.set_global_rank(9)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    environment.validate_settings(num_devices=2, num_nodes=2)
    with pytest.raises(
        ValueError, match=r"must be the 4 processes that torchrun started, received devices=2 and num_nodes=1"
    ):
        environment.validate_settings(num_devices=2, num_nodes=1)


@pytest.mark.parametrize("missing", ["WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK"])
def test_variables_of_torchrun_that_are_set_by_half_make_no_rank_zero(monkeypatch, missing):
    variables = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "GROUP_RANK": 0}
    set_variables(monkeypatch, TORCHELASTIC_RUN_ID="x", **variables)
    monkeypatch.delenv(missing)
    environment = TorchElasticEnvironment()
    ask = {
        "WORLD_SIZE": environment.world_size,
        "RANK": environment.global_rank,
        "LOCAL_RANK": environment.local_rank,
    }
    if missing in ask:
        with pytest.raises(RuntimeError, match=f"{missing} must be set"):
            ask.pop(missing)()
    assert [each() for each in ask.values()] == [variables[name] for name in ask]
    assert environment.node_rank() == 0


def test_torchelastic_defaults_warn():
    environment = TorchElasticEnvironment()
    with pytest.warns(UserWarning, match="MASTER_ADDR is not set"):
        assert environment.main_address == "127.0.0.1"
    with pytest.warns(UserWarning, match="MASTER_PORT is not set"):
        assert environment.main_port == 12910
    del os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]


ALLOCATION = {
    "SLURM_JOB_ID": 4815162342, "SLURM_JOB_NAME": "train", "SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4,
    "SLURM_NNODES": 2, "SLURM_NODELIST": "gpu[07-08]", "SLURM_PROCID": 5, "SLURM_STEP_ID": 0, "SLURM_LOCALID": 1, "SLURM_NODEID": 1,
}  # fmt: skip


def test_slurm(monkeypatch):
    assert SLURMEnvironment.detect() is False
    set_variables(monkeypatch, **ALLOCATION)
    assert SLURMEnvironment.detect()
    environment = SLURMEnvironment()
    assert environment.creates_processes_externally
    assert environment.auto_requeue
    assert environment.requeue_signal == signal.SIGUSR1
    assert (environment.main_address, environment.main_port) == ("gpu07", 17342)
    assert (environment.world_size(), environment.global_rank()) == (8, 5)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    assert (environment.job_id(), environment.job_name()) == (4815162342, "train")
    environment.validate_settings(num_devices=4, num_nodes=2)
    with pytest.raises(ValueError, match=r"devices must equal SLURM's --ntasks-per-node=4, received devices=2"):
        environment.validate_settings(num_devices=2, num_nodes=2)
    with pytest.raises(ValueError, match=r"num_nodes must equal SLURM's --nodes=2, received num_nodes=1"):
        environment.validate_settings(num_devices=4, num_nodes=1)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ValueError, match=r"must equal SLURM's --ntasks=4, received devices=4 and num_nodes=2"):
        environment.validate_settings(num_devices=4, num_nodes=2)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_STEP_ID", "3")
    assert environment.main_port == 17345
    monkeypatch.delenv("SLURM_STEP_ID")
    assert environment.main_port == 17342
    monkeypatch.setattr(sys, "argv", ["runs/train.py", "--lr"])
    with pytest.raises(RuntimeError, match=r"reserved 8 .* has started them.* Write `srun python train.py \.\.\.`"):
        environment.validate_settings(num_devices=4, num_nodes=2)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(RuntimeError, match=r"--ntasks=8 without .* Use --ntasks-per-node=4 instead"):
        environment.validate_settings(num_devices=4, num_nodes=2)
    set_variables(monkeypatch, MASTER_ADDR="other", MASTER_PORT=99)
    assert (environment.main_address, environment.main_port) == ("other", 99)


@pytest.mark.parametrize("name", ["bash", "zsh", "sh", "interactive"])
def test_an_interactive_slurm_job_is_no_launch(monkeypatch, name):
    set_variables(monkeypatch, **{**ALLOCATION, "SLURM_JOB_NAME": name})
    assert SLURMEnvironment.detect() is False
    assert SLURMEnvironment.job_id() is None
    SLURMEnvironment().validate_settings(num_devices=1, num_nodes=1)


def test_a_step_on_a_part_of_the_nodes(monkeypatch):
    set_variables(monkeypatch, **{**ALLOCATION, "SLURM_STEP_ID": 3, "SLURM_STEP_NODELIST": "gpu08"})
    environment = SLURMEnvironment()
    assert (environment.main_address, environment.main_port) == ("gpu08", 17345)
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")  # that of the shell
    assert environment.main_port == 2342 + 15000 + 7290


def test_a_task_that_is_an_mpirun_has_started_processes_of_its_own(monkeypatch):
    set_variables(monkeypatch, **{**ALLOCATION, "SLURM_STEP_NUM_TASKS": 2}, PMI_SIZE=2)
    assert SLURMEnvironment.detect()  # srun --mpi=pmi2
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert SLURMEnvironment.detect() is False  # an mpirun over two nodes
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    assert SLURMEnvironment.detect() is False  # an mpirun in the batch script


def test_tasks_in_the_shell_of_a_person_are_told_that_each_trains_alone(monkeypatch):
    set_variables(monkeypatch, **{**ALLOCATION, "SLURM_JOB_NAME": "interactive", "SLURM_STEP_NUM_TASKS": 2})
    monkeypatch.setattr("levin.utilities.rank_zero.rank_zero_only.rank", 0)
    with pytest.warns(
        UserWarning, match=r"srun started 2 tasks in a job named 'interactive'.*plugins=SLURMEnvironment\(\)"
    ):
        assert SLURMEnvironment.detect() is False
    monkeypatch.setenv("SLURM_PTY_PORT", "1234")  # `srun --pty bash`
    assert SLURMEnvironment.detect() is False


def test_components_of_a_heterogeneous_job_that_differ(monkeypatch):
    groups = {f"SLURM_NTASKS_PER_NODE_HET_GROUP_{number}": 4 for number in range(2)}
    set_variables(monkeypatch, **ALLOCATION, **groups)
    SLURMEnvironment().validate_settings(num_devices=4, num_nodes=2)
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE_HET_GROUP_1", "2")
    with pytest.raises(ValueError, match=r"must have the same --ntasks-per-node, received \[4, 2\]"):
        SLURMEnvironment().validate_settings(num_devices=4, num_nodes=2)


def test_two_tasks_that_nothing_has_started_or_placed_and_one_that_needs_neither(monkeypatch):
    names = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES")
    set_variables(monkeypatch, **{name: ALLOCATION[name] for name in names[:2]}, SLURM_NTASKS=2)
    with pytest.raises(RuntimeError, match=r"--ntasks=2 without saying how many per machine"):
        SLURMEnvironment().validate_settings(num_devices=2, num_nodes=1)
    set_variables(monkeypatch, SLURM_NTASKS_PER_NODE=2, SLURM_NNODES=1)
    with pytest.raises(RuntimeError, match=r"SLURM has reserved 2 tasks, and nothing has started them"):
        SLURMEnvironment().validate_settings(num_devices=2, num_nodes=1)
    # Nothing else was started: this process is alone, however many tasks are reserved.
    SLURMEnvironment().validate_settings(num_devices=1, num_nodes=1)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    SLURMEnvironment().validate_settings(num_devices=1, num_nodes=1)
    set_variables(monkeypatch, SLURM_NTASKS=1, SLURM_NTASKS_PER_NODE=1)
    SLURMEnvironment().validate_settings(num_devices=1, num_nodes=1)


@pytest.mark.parametrize("name", ["SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_NTASKS"])
@pytest.mark.parametrize("value", ["", "2(x2)"])
def test_a_number_of_slurm_that_is_none_is_named(monkeypatch, name, value):
    set_variables(monkeypatch, **{**ALLOCATION, name: value})
    with pytest.raises(RuntimeError, match=rf"{name} must be a number, received '{re.escape(value)}'"):
        SLURMEnvironment().validate_settings(num_devices=4, num_nodes=2)


def test_the_variables_of_kubeflow_without_its_plugin(monkeypatch):
    set_variables(monkeypatch, MASTER_ADDR="master", MASTER_PORT=1, WORLD_SIZE=2, RANK=1)
    LightningEnvironment().validate_settings(num_devices=2, num_nodes=1)
    with pytest.raises(ValueError, match=r"NODE_RANK must say .* Pass Trainer\(plugins=\[KubeflowEnvironment\(\)\]\)"):
        LightningEnvironment().validate_settings(num_devices=1, num_nodes=2)
    monkeypatch.setenv("NODE_RANK", "1")
    LightningEnvironment().validate_settings(num_devices=1, num_nodes=2)


def test_slurm_without_a_job_number(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # This machine may have SLURM.
    assert SLURMEnvironment().main_port == 12910
    assert SLURMEnvironment.job_id() is None
    SLURMEnvironment().validate_settings(num_devices=1, num_nodes=1)


def test_forgotten_srun_is_pointed_out(monkeypatch, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\n")
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["runs/train.py", "--lr"])
    with pytest.warns(UserWarning, match=r"The command `srun` is on .* with `srun python train.py \.\.\.`"):
        SLURMEnvironment()
    assert SLURMEnvironment.detect() is False


@pytest.mark.parametrize(
    ("nodelist", "expected"),
    [
        ("alpha", "alpha"),
        ("alpha,beta,gamma", "alpha"),
        ("alpha beta", "alpha"),
        ("gpu[07-09,12],cpu3", "gpu07"),
        ("host[22]", "host22"),
        ("1-2-[3-4]", "1-2-3"),
        ("rack-[5,7-9]-x", "rack-5-x"),
        ("127.0.0.1", "127.0.0.1"),
    ],
)
def test_first_node(nodelist, expected):
    assert SLURMEnvironment.resolve_root_node_address(nodelist) == expected


def test_lsf(monkeypatch, tmp_path):
    assert LSFEnvironment.detect() is False
    ranks = tmp_path / "ranks"
    here = socket.gethostname()
    ranks.write_text(f"launch\nnode10\nnode10\n{here}\n{here}\n")
    set_variables(
        monkeypatch, LSB_JOBID=1234567, LSB_DJOB_RANKFILE=ranks, JSM_NAMESPACE_LOCAL_RANK=1, JSM_NAMESPACE_SIZE=4,
        JSM_NAMESPACE_RANK=3,
    )  # fmt: skip
    assert LSFEnvironment.detect()
    environment = LSFEnvironment()
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("node10", 10567)
    assert (environment.world_size(), environment.global_rank()) == (4, 3)
    assert (environment.local_rank(), environment.node_rank()) == (1, 1)
    monkeypatch.setenv("MASTER_PORT", "77")
    assert environment.main_port == 77
    monkeypatch.delenv("JSM_NAMESPACE_RANK")
    with pytest.raises(RuntimeError, match=r"The environment variable JSM_NAMESPACE_RANK must be set"):
        environment.global_rank()


def test_lsf_machines_by_address_and_by_domain(monkeypatch, tmp_path):
    ranks = tmp_path / "ranks"
    set_variables(
        monkeypatch, LSB_JOBID=1, LSB_DJOB_RANKFILE=ranks, JSM_NAMESPACE_LOCAL_RANK=0, JSM_NAMESPACE_SIZE=2,
        JSM_NAMESPACE_RANK=1,
    )  # fmt: skip
    own = socket.getaddrinfo(socket.gethostname(), None)[0][4][0]
    ranks.write_text(f"launch\n127.77.1.1\n{own}\n")
    assert LSFEnvironment().node_rank() == 1
    ranks.write_text(f"launch\nnode10.cluster\n{socket.gethostname()}.cluster\n")
    assert LSFEnvironment().node_rank() == 1
    ranks.write_text("launch\n127.77.1.1\n127.77.1.2\n")
    with pytest.raises(ValueError, match=r"must name this machine .* received 127\.77\.1\.1, 127\.77\.1\.2"):
        LSFEnvironment()
    ranks.write_text("launch\n127.77.1.1\n127.77.1.1\n")  # one machine has no other number
    assert LSFEnvironment().node_rank() == 0
    monkeypatch.setattr(socket, "gethostname", lambda: "127.77.1.2")  # not the first with 127
    ranks.write_text("launch\n127.77.1.1\n127.77.1.2\n")
    assert LSFEnvironment().node_rank() == 1


def test_lsf_rank_files(tmp_path):
    with pytest.raises(ValueError, match=r"LSB_DJOB_RANKFILE must name the rank file of the job, received '/nowhere'"):
        read_rank_file("/nowhere")
    empty = tmp_path / "empty"
    empty.write_text("launch\n")
    with pytest.raises(ValueError, match=r"at least one other line, received 1 lines"):
        read_rank_file(str(empty))


def test_kubeflow(monkeypatch):
    environment = KubeflowEnvironment()
    with pytest.raises(RuntimeError, match=r"MASTER_ADDR must be set"):
        _ = environment.main_address
    set_variables(monkeypatch, MASTER_ADDR="pod-0", MASTER_PORT=23456, WORLD_SIZE=3, RANK=2)
    assert environment.creates_processes_externally
    assert (environment.main_address, environment.main_port) == ("pod-0", 23456)
    assert (environment.world_size(), environment.global_rank()) == (3, 2)
    assert (environment.local_rank(), environment.node_rank()) == (0, 2)
    with pytest.raises(NotImplementedError, match=r"Pass Trainer\(plugins=\[KubeflowEnvironment\(\)\]\)"):
        KubeflowEnvironment.detect()


def test_mpi_and_tpu_without_their_packages(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for environment, package in ((MPIEnvironment, "mpi4py"), (XLAEnvironment, "torch_xla")):
        assert environment.detect() is False
        with pytest.raises(ModuleNotFoundError, match=rf"needs the package {package}, which is not installed"):
            environment()


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_processes_of_mpirun_that_cannot_find_each_other_are_told(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(name, "1")
    assert MPIEnvironment.detect() is False
    monkeypatch.setenv(name, "3")
    with pytest.warns(
        PossibleUserWarning, match="mpirun started 3 processes, and each trains alone.*pip install mpi4py"
    ):
        assert MPIEnvironment.detect() is False
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert MPIEnvironment.detect() is False


def test_processes_of_an_mpirun_that_is_not_that_of_mpi4py_are_told(monkeypatch):
    alone = types.SimpleNamespace(Get_size=lambda: 1)
    version = "Open MPI v4.1.4, package: Debian"
    mpi = types.SimpleNamespace(COMM_WORLD=alone, Get_library_version=lambda: version)
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi, __spec__="is there"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("PMI_SIZE", "2")
    with pytest.warns(PossibleUserWarning, match="each trains alone.*another MPI than this mpirun, 'Open MPI v4.1.4'"):
        assert MPIEnvironment.detect() is False
    monkeypatch.setenv("PMI_SIZE", "1")
    assert MPIEnvironment.detect() is False
    alone.Get_size = lambda: 2
    assert MPIEnvironment.detect()


def test_mpi_is_not_started_where_mpirun_did_not_start_the_process(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("OMPI_", "PMI", "MV2_"))]:
        monkeypatch.delenv(name)
    assert MPIEnvironment.detect() is False
    assert "mpi4py.MPI" not in sys.modules
    pair = types.SimpleNamespace(COMM_WORLD=types.SimpleNamespace(Get_size=lambda: 2))
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=pair, __spec__="is there"))
    assert MPIEnvironment.detect() is False


def test_a_custom_environment_needs_all_methods():
    class Half(ClusterEnvironment):
        @property
        def main_address(self) -> str:
            return "here"

    with pytest.raises(TypeError, match="abstract"):
        Half()


def test_torchruns_store_is_divided_by_attempts(monkeypatch):
    import torch.distributed as dist

    from levin.utilities.rank_zero import rank_zero_only

    environment = TorchElasticEnvironment()
    assert environment.store(None) is None  # not restarted, or no store of torchrun's
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    assert environment.store(None) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert environment.store(None) is None
    stores = []
    for attempt in ("1", "2"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        stores.append(environment.store(None))
    stores[0].set("address", "of the dead")
    assert not stores[1].check(["address"])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    with pytest.warns(UserWarning, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        assert environment.store(None) is None


def test_a_free_port_is_one_that_can_be_listened_on(monkeypatch):
    monkeypatch.delenv("STANDALONE_PORT", raising=False)
    port = find_free_port()
    assert port > 1023
    with socket.socket() as listener:
        listener.bind(("", port))
    monkeypatch.setenv("STANDALONE_PORT", "29512")
    assert find_free_port() == 29512
