"""A job on two hosts outlives a cut cable and the loss of a host, and ends with the weights of the undisturbed job."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.launchers.test_elastic import PROGRAM, samples_of_epochs, seen, weights
from tests.launchers.two_hosts import Host, refusal, two_hosts

NO_HOSTS = refusal() if os.environ.get("LEVIN_TEST_HOSTS") else "set LEVIN_TEST_HOSTS=1 (make test-hosts)"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS)),
]
DEADLINE_S = 400


class Job:
    """The job on both hosts; each agent writes into a log of its own."""

    def __init__(self, folder: Path, hosts: tuple[Host, Host], step_s: float) -> None:
        self.folder, self.hosts, self.step_s = folder, hosts, step_s
        folder.mkdir()
        self.agents = [self.start(host) for host in hosts]

    def start(self, host: Host) -> subprocess.Popen[bytes]:
        return host.start(
            self.folder / f"agent-{host.index}.log", "launch", "--nnodes", 2, "--nproc-per-node", 1, "--max-restarts", 5,
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self.hosts[0].address}:29400", "--rdzv-id", "job", "--local-addr",
            host.address, "--rdzv-conf", f"is_host={int(host.index == 0)}", "--tee", "3", PROGRAM, self.folder,
            STEP_S=str(self.step_s), STEP_TIMEOUT_S="5",
        )  # fmt: skip

    def logs(self) -> str:
        return "\n".join(f"=== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob("agent-*.log")))

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: max(seen(self.folder), default=0) >= step, f"step {step}")

    def wait_for(self, happened, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not happened():
            assert time.monotonic() < deadline, f"{what} did not come\n{self.logs()}"
            assert any(agent.poll() is None for agent in self.agents), f"the job ended before {what}\n{self.logs()}"
            time.sleep(0.1)

    def ends_well(self) -> None:
        deadline = time.monotonic() + DEADLINE_S
        for agent in self.agents:
            try:
                code = agent.wait(max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                pytest.fail(f"the job did not end\n{self.logs()}")
            assert code == 0, self.logs()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two-hosts") / "undisturbed"
    with two_hosts() as hosts:
        Job(folder, hosts, step_s=0.0).ends_well()
    return folder


def compare(folder: Path, undisturbed: Path) -> None:
    assert seen(folder) == seen(undisturbed)
    assert samples_of_epochs(folder) == {0: [*range(24)], 1: [*range(24)]}
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(folder)[name], value), name


def test_a_cut_cable(undisturbed, tmp_path):
    folder = tmp_path / "job"
    with two_hosts() as hosts:
        job = Job(folder, hosts, step_s=1.0)
        job.wait_for_step(2)
        hosts[1].plug("down")
        job.wait_for(lambda: "RuntimeError: " in job.logs(), "an error")
        hosts[1].plug("up")
        job.ends_well()
        assert len({path.name.split("-")[1] for path in folder.glob("seen-*")}) > 1, "nothing was restarted"
    compare(folder, undisturbed)


def test_a_lost_host(undisturbed, tmp_path):
    folder = tmp_path / "job"
    with two_hosts() as hosts:
        job = Job(folder, hosts, step_s=1.0)
        job.wait_for_step(2)
        hosts[1].crash()
        job.agents[1].wait()
        job.wait_for(lambda: "no sign of life" in job.logs(), "the name of the lost rank")
        # Another machine takes its place.
        job.agents[1] = job.start(hosts[1])
        job.ends_well()
    compare(folder, undisturbed)


def test_a_killed_agent(undisturbed, tmp_path):
    folder = tmp_path / "job"
    with two_hosts() as hosts:
        job = Job(folder, hosts, step_s=1.0)
        job.wait_for_step(2)
        os.kill(job.agents[1].pid, signal.SIGKILL)
        job.agents[1].wait()
        # Its process ends with it, and another agent takes its place.
        job.wait_for(lambda: not hosts[1].processes() and "no sign of life" in job.logs(), "the end of its process")
        job.agents[1] = job.start(hosts[1])
        job.ends_well()
    compare(folder, undisturbed)
