"""A cluster of SLURM on this machine: the real daemons of Debian's slurm-wlm, with two nodes on loopback."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.distributed import _free_port

# The nodes bear their addresses as names, so that they are found without an entry in /etc/hosts.
# A job that is put back waits until its credential has expired, by default two minutes.
NODES = ("127.0.0.1", "127.0.0.2")
CONFIGURATION = """
ClusterName=levin
SlurmctldHost=localhost
SlurmctldPort={control_port}
AuthInfo=socket={folder}/munge.socket,cred_expire=20
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/node-%n.pid
SlurmctldLogFile={folder}/control.log
SlurmdLogFile={folder}/node-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
MpiDefault=none
KillWait=10
NodeName={nodes[0]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 CoresPerSocket=4 RealMemory=1000
NodeName={nodes[1]} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 CoresPerSocket=4 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES State=UP
"""


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start munged, slurmctld and a slurmd for each node; the variables with which the commands of SLURM find them."""
    folder.chmod(0o755)
    for parent in folder.parents:
        if parent.stat().st_uid == os.getuid() and str(parent) not in ("/", "/tmp"):
            parent.chmod(0o755)  # munged wants to know that nobody can take its socket away.
    (folder / "state").mkdir()
    for node in NODES:
        (folder / node).mkdir()
    key, socket = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            folder=folder, nodes=NODES, control_port=_free_port(), ports=(_free_port(), _free_port())
        )  # fmt: skip
    )
    variables = {"SLURM_CONF": str(folder / "slurm.conf")}
    environment = {**os.environ, **variables}
    munged = [
        "munged", "--foreground", "--force", f"--socket={socket}", f"--key-file={key}", f"--log-file={folder}/munge.log",
        f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed",
    ]  # fmt: skip
    commands = [munged, ["slurmctld", "-D", "-c"], *(["slurmd", "-D", "-N", node] for node in NODES)]
    daemons = []
    try:
        with (folder / "daemons.log").open("w") as output:
            for command in commands:
                daemons.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
                deadline = time.monotonic() + 30
                while command is munged and not socket.exists():
                    assert daemons[0].poll() is None and time.monotonic() < deadline, (
                        folder / "daemons.log"
                    ).read_text()
                    time.sleep(0.05)
        deadline = time.monotonic() + 60
        while _idle_nodes(environment) < len(NODES):
            logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
            assert time.monotonic() < deadline and all(daemon.poll() is None for daemon in daemons), logs
            time.sleep(0.2)
        yield variables
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):  # of a controller that does not answer
            subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True, timeout=30)
            deadline = time.monotonic() + 30
            # The steps end with the daemons' help alone.
            while _output(environment, "squeue", "--noheader") and time.monotonic() < deadline:
                time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _idle_nodes(environment: dict[str, str]) -> int:
    return _output(environment, "sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")


def _output(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout
