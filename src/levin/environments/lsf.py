"""Processes that jsrun started on a cluster managed by LSF."""

from __future__ import annotations

import ipaddress
import os
import socket

from typing_extensions import override

from levin.environments.environment import read_int
from levin.environments.external import ExternalEnvironment, Variables

_REQUIRED = ("LSB_JOBID", "LSB_DJOB_RANKFILE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE")


class LSFEnvironment(ExternalEnvironment):
    """Processes that ``jsrun`` started; the machines are read from the rank file of the job.

    Raises:
        ValueError: The rank file names no machine for the job's tasks, or not this one.
    """

    variables = Variables("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK")

    def __init__(self) -> None:
        self._hosts = read_rank_file(os.environ.get("LSB_DJOB_RANKFILE", ""))
        self._node_rank = _node_rank(self._hosts)

    @property
    @override
    def main_address(self) -> str:
        return self._hosts[0]

    @property
    @override
    def main_port(self) -> int:
        if "MASTER_PORT" in os.environ:
            return read_int("MASTER_PORT")
        return read_int("LSB_JOBID") % 1000 + 10000

    @staticmethod
    @override
    def detect() -> bool:
        return all(name in os.environ for name in _REQUIRED)

    @override
    def node_rank(self) -> int:
        return self._node_rank


def read_rank_file(path: str) -> list[str]:
    """Return the machines of an LSF rank file in order, each once, without the first line, where the job was launched.

    Args:
        path: The file; one machine per line, one line per task.

    Raises:
        ValueError: The file cannot be read or holds no machine for tasks.
    """
    try:
        with open(path) as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise ValueError(
            f"LSB_DJOB_RANKFILE must name the rank file of the job, received {path!r}, which cannot be read: {error}. "
            "Start the script with jsrun inside an LSF job."
        ) from error
    hosts = list(dict.fromkeys(names[1:]))
    if not hosts:
        raise ValueError(
            f"The rank file {path!r} must hold the launching machine and at least one other line, received "
            f"{len(names)} lines. Start the script with jsrun inside an LSF job."
        )
    return hosts


def _node_rank(hosts: list[str]) -> int:
    if len(hosts) == 1:
        return 0
    own = _names_of_this_machine()
    found = [index for index, host in enumerate(hosts) if host in own or _short_name(host) in own]
    if not found:
        raise ValueError(
            f"The rank file of the job must name this machine ({', '.join(sorted(own))}), received {', '.join(hosts)}. "
            "Start the script with jsrun inside the job."
        )
    return found[0]


def _names_of_this_machine() -> set[str]:
    name = socket.gethostname()
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        addresses = set()
    return {name, _short_name(name), *addresses}


def _short_name(host: str) -> str:
    """Return a host's name without its domain; an address, which has dots as well, as it is."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.split(".")[0]
    return host
