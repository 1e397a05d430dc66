"""Jobs under the real SLURM: steps on one and two nodes, arrays, a job that is put back in the queue, and mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.integrations.slurm import cluster

pytestmark = pytest.mark.timeout(500)
ROOT = Path(__file__).parents[2]
TRAIN = """
import os, sys, time
import torch
from levin import Callback, Trainer
from tests.strategies.small import QUIET, Small, loader

fn = next((word for word in sys.argv if word in ("validate", "test")), "fit")

class Slow(Callback):
    def on_train_batch_end(self, trainer, *args):
        if "is_slow" in sys.argv and trainer.state.fn == fn and "SLURM_RESTART_COUNT" not in os.environ:
            open(f"began-{trainer.global_rank}", "w").close()
            time.sleep(2)

    on_validation_batch_end = on_test_batch_end = on_train_batch_end

def train(devices, nodes, epochs=2):
    trainer = Trainer(**{**QUIET, "devices": devices, "num_nodes": nodes, "strategy": "ddp" if devices * nodes > 1 else "auto",
                         "max_epochs": epochs, "callbacks": [Slow()], "enable_checkpointing": False})
    module = Small()
    trainer.fit(module)
    if fn != "fit":
        getattr(trainer, fn)(module, loader(1))
    step, task = os.environ.get("SLURM_STEP_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    environment = trainer.strategy.cluster_environment
    torch.save({"weights": module.state_dict(), "seen": module.seen, "from": trainer.ckpt_path, "steps": trainer.global_step,
                "metrics": trainer.callback_metrics, "environment": type(environment).__name__,
                "restarts": os.environ.get("SLURM_RESTART_COUNT")}, f"result{task}-{step}-{trainer.global_rank}")

if __name__ == "__main__":
    train(*map(int, sys.argv[1:4]))
"""


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with cluster(tmp_path_factory.mktemp("slurm")) as variables:
        yield variables


class Jobs:
    """Runs jobs in a folder of their own."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        (folder / "train.py").write_text(TRAIN)
        self.environment = {
            **os.environ, **variables, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

    def command(self, *words: str, limit_s: float = 200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=limit_s
        )

    def sbatch(self, lines: str, *options: str) -> tuple[int, str]:
        """Run a batch script to its end; its status and everything that it wrote."""
        job = self.start(lines, *options)
        return job.wait(300), self.logs()

    def start(self, lines: str, *options: str) -> subprocess.Popen[str]:
        """Submit a batch script, and return what waits for its end."""
        (self.folder / "job.sh").write_text(f"#!/bin/bash\n{lines}\n")
        command = ["sbatch", "--wait", "--output=log-%A-%a", *options, "job.sh"]
        with (self.folder / "log-sbatch").open("w") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log, text=True)

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def results(self, pattern: str, environment: str = "SLURMEnvironment") -> list[dict]:
        found = [torch.load(path, weights_only=False) for path in sorted(self.folder.glob(pattern))]
        assert [result["environment"] for result in found] == [environment] * len(found)
        for result in found[1:]:
            assert all(
                torch.equal(a, b) for a, b in zip(found[0]["weights"].values(), result["weights"].values(), strict=True)
            )
        return found

    def tell(self, job: subprocess.Popen[str]) -> None:
        """Send a job of two tasks its signal, once both are at work."""
        while len(list(self.folder.glob("began-*"))) < 2:
            assert job.poll() is None, self.logs()
            time.sleep(0.2)
        self.command("scancel", "--signal=SIGUSR1", "--name=job.sh")

    def remove_results(self) -> None:
        for path in [*self.folder.glob("result*"), *self.folder.rglob("hpc_ckpt_*")]:
            path.unlink()


@pytest.fixture
def jobs(tmp_path: Path, variables: dict[str, str]) -> Jobs:
    return Jobs(tmp_path, variables)


PYTHON = sys.executable


@pytest.mark.parametrize(("nodes", "tasks"), [(1, 2), (2, 1)])
def test_a_step_of_two_tasks(jobs, nodes, tasks):
    status, log = jobs.sbatch(
        f"srun {PYTHON} train.py {tasks} {nodes}", f"--nodes={nodes}", f"--ntasks-per-node={tasks}"
    )
    assert status == 0, log
    first, second = jobs.results("result-*")
    assert sorted({*first["seen"], *second["seen"]}) == list(range(16)) and not {*first["seen"]} & {*second["seen"]}


LAUNCHED = {"SLURMEnvironment": "srun --mpi=pmi2", "MPIEnvironment": f"{Path(PYTHON).with_name('mpirun')} -n 2"}


@pytest.mark.parametrize("environment", LAUNCHED)
def test_the_processes_of_an_mpi_in_a_job(jobs, environment):
    status, log = jobs.sbatch(f"{LAUNCHED[environment]} {PYTHON} train.py 2 1", "--ntasks-per-node=2")
    assert status == 0, log
    first, second = jobs.results("result-*", environment)
    assert sorted({*first["seen"], *second["seen"]}) == list(range(16)) and not {*first["seen"]} & {*second["seen"]}


def test_two_steps_beside_each_other_on_a_node_each(jobs):
    step = f"srun --exact --nodes=1 --ntasks=2 --ntasks-per-node=2 --nodelist=127.0.0.{{}} {PYTHON} train.py 2 1 &"
    status, log = jobs.sbatch(
        f"{step.format(1)}\n{step.format(2)}\nwait -n && wait -n", "--nodes=2", "--ntasks-per-node=2"
    )
    assert status == 0, log
    assert len(jobs.results("result-*")) == 4


def test_the_tasks_of_an_array_are_runs_of_their_own(jobs):
    status, log = jobs.sbatch(f"srun {PYTHON} train.py 1 1", "--array=0-2", "--ntasks-per-node=1")
    assert status == 0, log
    assert len(jobs.results("result*")) == 3 and (jobs.folder / "result2-0-0").exists()


# What tells the job, on how many nodes with how many tasks each, and the options for it.
REQUEUES = {
    # SLURM sends the signal up to a minute before the time that was asked for.
    "the time limit": (1, 2, ["--time=3", "--signal=SIGUSR1@70"]),
    "an operator, of an array": (1, 2, ["--array=7"]),
    "an operator, of two nodes": (2, 1, []),
}


@pytest.mark.parametrize("who", REQUEUES)
def test_a_job_that_is_told_to_leave_is_put_back_and_goes_on_bit_for_bit(jobs, who):
    nodes, tasks, options = REQUEUES[who]
    command, size = f"srun {PYTHON} train.py {tasks} {nodes} 60", [f"--nodes={nodes}", f"--ntasks-per-node={tasks}"]
    job = jobs.start(f"{command} is_slow", "--requeue", "--open-mode=append", *size, *options)
    if who != "the time limit":
        jobs.tell(job)
    assert job.wait(400) == 0, jobs.logs()
    resumed = jobs.results("result*")
    assert [result["restarts"] for result in resumed] == ["1", "1"], jobs.logs()
    assert all(str(result["from"]).endswith("hpc_ckpt_1.ckpt") for result in resumed)
    jobs.remove_results()
    status, log = jobs.sbatch(command, *size)
    assert status == 0, log
    unbroken = jobs.results("result*")
    assert resumed[0]["steps"] == unbroken[0]["steps"] == 120
    for name, value in unbroken[0]["weights"].items():
        assert torch.equal(value, resumed[0]["weights"][name])
    assert unbroken[0]["metrics"] == resumed[0]["metrics"]


@pytest.mark.parametrize("fn", ["validate", "test"])
def test_a_job_in_an_evaluation_is_put_back_and_trains_no_second_time(jobs, fn):
    command = f"srun {PYTHON} train.py 2 1 2 {fn}"
    job = jobs.start(f"{command} is_slow", "--ntasks-per-node=2", "--requeue", "--open-mode=append")
    jobs.tell(job)
    assert job.wait(400) == 0, jobs.logs()
    resumed = jobs.results("result*")
    assert list(jobs.folder.rglob("hpc_ckpt_1.ckpt")), jobs.logs()
    jobs.remove_results()
    status, log = jobs.sbatch(command, "--ntasks-per-node=2")
    assert status == 0, log
    unbroken = jobs.results("result*")
    # The fit is known to be over; the evaluation began again.
    assert [(result["restarts"], result["seen"]) for result in resumed] == [("1", [])] * 2, jobs.logs()
    assert all(len(result["seen"]) == 16 for result in unbroken)
    for before, after in zip(unbroken, resumed, strict=True):
        assert before["metrics"] == after["metrics"] and before["steps"] == after["steps"] == 4
    assert "val_loss" in after["metrics"]


TIMES = """
import os, signal, statistics, time
from levin import Trainer
from tests.integrations.times import Clock
from tests.strategies.small import QUIET, Small

def reach(name):
    # Tell the test where this is, and wait until it has done its part.
    open(name, "w").close()
    while not os.path.exists(f"{name}-done"):
        time.sleep(0.05)

def leave():
    if "SLURM_RESTART_COUNT" not in os.environ:
        os.kill(os.getpid(), signal.SIGUSR1)

when = {200: lambda: reach("stop"), 400: leave}
clock = Clock(when if "SLURM_RESTART_COUNT" not in os.environ else None)
trainer = Trainer(**{**QUIET, "devices": 1, "max_epochs": 1, "callbacks": [clock], "enable_checkpointing": False})
try:
    trainer.fit(Small(size=4 * 450))
finally:
    for name, part in (("healthy", clock.seconds[:198]), ("no controller", clock.seconds[200:398])):
        if len(part) > 2:
            percent = statistics.quantiles(part, n=100)
            print(f"SLURM, {name}: median step {1e6 * percent[49]:.0f} us, 99 % {1e6 * percent[98]:.0f} us", flush=True)
open(f"steps-{trainer.global_step}", "w").close()
"""


def test_steps_go_on_without_the_controller_and_the_job_is_put_back_when_it_answers(jobs):
    (jobs.folder / "train.py").write_text(TIMES)
    job = jobs.start(f"srun {PYTHON} train.py", "--ntasks-per-node=1", "--requeue", "--open-mode=append")
    controller = next(child for child in psutil.Process().children() if child.name() == "slurmctld")

    def wait_for(pattern: str) -> None:
        deadline = time.monotonic() + 200
        while not list(jobs.folder.rglob(pattern)):
            assert job.poll() is None and time.monotonic() < deadline, jobs.logs()
            time.sleep(0.1)

    wait_for("stop")
    controller.suspend()
    try:
        (jobs.folder / "stop-done").touch()
        # Saved before the scheduler is asked, which does not answer.
        wait_for("hpc_ckpt_1.ckpt")
        time.sleep(2)
    finally:
        controller.resume()
    assert job.wait(300) == 0, jobs.logs()
    assert (jobs.folder / "steps-450").exists(), jobs.logs()
    print("", *(line for line in jobs.logs().splitlines() if line.startswith("SLURM, ")), sep="\n")


MISTAKES = {
    "too many tasks": ("srun {python} train.py 1 1", ["--ntasks-per-node=2"], "devices must equal SLURM's --ntasks-per-node=2"),
    "too many nodes": ("srun {python} train.py 1 1", ["--nodes=2", "--ntasks-per-node=1"], "num_nodes must equal SLURM's --nodes=2"),
    "tasks without a place": ("srun {python} train.py 2 1", ["--ntasks=2"], "Use --ntasks-per-node=2 instead of --ntasks"),
    "one task for two devices": ("srun {python} train.py 2 1", ["--ntasks=1"], "must equal SLURM's --ntasks=1"),
    "no srun": ("{python} train.py 2 1", ["--ntasks-per-node=2"], "Write `srun python train.py ...` into it"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_anything_starts(jobs, mistake):
    line, options, sentence = MISTAKES[mistake]
    began = time.monotonic()
    status, log = jobs.sbatch(line.format(python=PYTHON), *options)
    assert status != 0 and sentence in log
    assert time.monotonic() - began < 100 and not list(jobs.folder.glob("result*"))


def test_a_heterogeneous_job(jobs):
    script = "#SBATCH --nodes=1 --ntasks-per-node={}\n#SBATCH hetjob\n#SBATCH --nodes=1 --ntasks-per-node={}\n"
    step = f"srun --het-group=0,1 {PYTHON} train.py 1 2"
    status, log = jobs.sbatch(script.format(1, 1) + step)
    assert status == 0 and len(jobs.results("result*")) == 2, log
    status, log = jobs.sbatch(script.format(1, 2) + step)
    assert status != 0 and "must have the same --ntasks-per-node, received [1, 2]" in log


def test_the_shell_of_a_person(jobs):
    # What is started in the shell starts its own processes.
    done = jobs.command("salloc", "--ntasks-per-node=2", PYTHON, "train.py", "2", "1")
    assert done.returncode == 0, done.stderr
    assert len(jobs.results("result-*", "LightningEnvironment")) == 2
    jobs.environment["PYTHONWARNINGS"] = "default"
    done = jobs.command("salloc", "--ntasks-per-node=2", "srun", PYTHON, "train.py", "1", "1")
    assert "srun started 2 tasks in a job named 'interactive'" in done.stderr


def test_torchrun_in_an_allocation(jobs):
    torchrun = f"{PYTHON} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d"
    status, log = jobs.sbatch(
        f"srun {torchrun} --rdzv-endpoint=127.0.0.1:$((20000 + SLURM_JOB_ID)) train.py 1 2",
        "--nodes=2", "--ntasks-per-node=1",
    )  # fmt: skip
    assert status == 0, log
    assert len(jobs.results("result*", "TorchElasticEnvironment")) == 2


def test_submitit(jobs):
    (jobs.folder / "submit.py").write_text(
        "import submitit\n"
        "from train import train\n"
        "executor = submitit.SlurmExecutor(folder='jobs')\n"
        "executor.update_parameters(nodes=1, ntasks_per_node=2, time=5)\n"
        "job = executor.submit(train, 2, 1)\n"
        "job.results()\n"
    )
    done = jobs.command(PYTHON, "submit.py")
    assert done.returncode == 0, done.stderr
    assert len(jobs.results("result*")) == 2
