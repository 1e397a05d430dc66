"""Two hosts on one machine: network namespaces joined by a cable that can be cut."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def refusal() -> str | None:
    """Return why this machine cannot be two hosts, or None when it can."""
    if shutil.which("ip") is None:
        return "`ip` (iproute2) is not installed"
    name = f"levin-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"`ip netns add` was refused: {done.stderr.strip()}"
    try:
        done = subprocess.run(
            ["ip", "-n", name, "link", "add", "x0", "type", "veth", "peer", "name", "x1"], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return f"`ip link add type veth` was refused: {done.stderr.strip()}" if done.returncode else None
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


class Host:
    """One of the two: a network of its own, a name of its own, the same disk.

    Args:
        index: 0 or 1.
        name: Of its network namespace.
    """

    def __init__(self, index: int, name: str) -> None:
        self.name, self.address, self.cable = name, f"10.77.0.{index + 1}", f"cable{index}"
        self.index = index

    def plug(self, state: str) -> None:
        """Set the end of the cable ``up`` or ``down``."""
        subprocess.run(["ip", "-n", self.name, "link", "set", self.cable, state], check=True)

    def start(self, log: Path, *words: object, **variables: str) -> subprocess.Popen[bytes]:
        """Run ``levin`` with the words on this host; what it prints is added to a file."""
        environment = {
            **os.environ, "PYTHONPATH": str(SOURCE), "GLOO_SOCKET_IFNAME": self.cable, "TP_SOCKET_IFNAME": self.cable,
            "OMP_NUM_THREADS": "1", **variables,
        }  # fmt: skip
        script = f'hostname host-{self.index}; exec "$@"'
        command = [
            "ip",
            "netns",
            "exec",
            self.name,
            "unshare",
            "--uts",
            "sh",
            "-c",
            script,
            "sh",
            sys.executable,
            "-m",
            "levin",
        ]
        with open(log, "ab") as file:
            return subprocess.Popen(
                [*command, *map(str, words)],
                env=environment,
                cwd=log.parent,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Return the processes on this host."""
        done = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    def crash(self) -> None:
        """Kill everything that runs on this host."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Yield two hosts with a cable between them; afterwards nothing of them is left."""
    hosts = tuple(Host(index, f"levin-{os.getpid()}-{index}") for index in range(2))
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        first, second = hosts
        subprocess.run(
            ["ip", "-n", first.name, "link", "add", first.cable, "type", "veth", "peer", "name", second.cable, "netns",
             second.name], check=True,
        )  # fmt: skip
        for host in hosts:
            subprocess.run(["ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.cable], check=True)
            subprocess.run(["ip", "-n", host.name, "link", "set", "lo", "up"], check=True)
            host.plug("up")
        yield first, second
    finally:
        for host in hosts:
            with suppress(subprocess.CalledProcessError):
                host.crash()
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)
