"""Starting the user's script again, once per process."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from levin.launchers.launcher import SIGTERM_STATUS, Launcher
from levin.launchers.restart import hydra_job, script_command
from levin.utilities.exceptions import SIGTERMException
from levin.utilities.process_group import disconnect_processes
from levin.utilities.rank_zero import log

if TYPE_CHECKING:
    from levin.environments.environment import ClusterEnvironment

# How long the other processes get to end by themselves after one has failed, or after a signal to all.
GRACE_S = 10.0
# The same after an error in this process: most of the others wait for it then, in vain, and hear no signal.
_VAIN_S = 3.0
# How often the processes are looked at.
_POLL_S = 0.2
# How long another process may take to end after its failure was felt here.
_ECHO_S = 1.0


# What was started in a job of Hydra, by the process that started it.
_JOB = "LEVIN_HYDRA_JOB"


def leave_hydra_job() -> None:
    """Let go of the processes that were started in an earlier job of Hydra: they do that job alone, and end with it."""
    job = hydra_job()
    if _JOB not in os.environ or job is None:
        return
    started = json.loads(os.environ[_JOB])
    if started["folder"] == job.runtime.output_dir:
        return
    deadline = time.monotonic() + GRACE_S
    while any(_is_alive(pid) for pid in started["pids"]) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    disconnect_processes()
    for name in (*started["added"], _JOB):
        os.environ.pop(name, None)


def _is_alive(pid: int) -> bool:
    # The watcher of the launcher that started it collects those that have ended.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class SubprocessLauncher(Launcher):
    """Starts the script again for every process but the first, which goes on itself.

    A thread watches the started processes: when one fails, all others end. Environments that start the processes
    themselves (torchrun, srun) leave nothing to start, and the function just runs.

    Args:
        environment: Knows where rank 0 listens, and whether the processes are there already.
        num_processes: Number of processes of this machine.
        num_nodes: Number of machines.
    """

    is_interactive_compatible = False  # a prompt has no script to start again

    def __init__(self, environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        self._environment = environment
        self._num_processes = num_processes
        self._num_nodes = num_nodes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watcher: _Watcher | None = None
        # Whether the run ended for SIGTERM, which all processes obey by themselves.
        self._is_told: bool = False

    def launch(
        self, function: Callable[..., object], *args: object, trainer: object = None, **kwargs: object
    ) -> object:
        """Start the other processes, unless they are there, and run the function in this one."""
        if not self._environment.creates_processes_externally:
            self._start()
        try:
            return function(*args, **kwargs)
        except SIGTERMException:
            # The others end at the same batch. Until all have left together they need each other, to save the run.
            self._is_told = True
            if self._watcher is not None:
                self._watcher.stop()
            raise
        except BaseException as error:
            # An error here is often only the echo of one in another process.
            is_echo = isinstance(error, Exception) and self._watcher is not None
            failed = self._watcher.failure(wait_s=_ECHO_S) if is_echo and self._watcher is not None else None
            self._end_all()
            if isinstance(error, SystemExit):
                self._processes.clear()  # the command ends with the status that the program gives
            if failed is None:
                raise
            if self._watcher is not None and self._watcher.is_sigterm:
                raise SIGTERMException from error
            raise RuntimeError(f"{failed} Its own error stands above.") from error

    def kill(self, signum: int) -> None:
        """Send a signal to the processes that were started."""
        for process in self._processes:
            process.send_signal(signum)

    def __getstate__(self) -> dict[str, object]:
        """Leave the running processes here: they belong to this process alone."""
        return {**self.__dict__, "_processes": [], "_watcher": None}

    def _start(self) -> None:
        shared = {
            "MASTER_ADDR": self._environment.main_address,
            "MASTER_PORT": str(self._environment.main_port),
            "NODE_RANK": str(self._environment.node_rank()),
            "WORLD_SIZE": str(self._num_processes * self._num_nodes),
        }
        for local_rank in range(1, self._num_processes):
            command, directory = script_command(local_rank)
            environment = {**os.environ, **shared, "LOCAL_RANK": str(local_rank)}
            self._processes.append(subprocess.Popen(command, env=environment, cwd=directory))
        if self._processes:
            # From here on this process looks like the others: LOCAL_RANK also keeps a second run from starting more.
            added = sorted({*shared, "LOCAL_RANK"} - os.environ.keys())
            os.environ.update(shared, LOCAL_RANK="0")
            if (job := hydra_job()) is not None:
                pids = [process.pid for process in self._processes]
                os.environ[_JOB] = json.dumps({"folder": job.runtime.output_dir, "added": added, "pids": pids})
            self._watcher = _Watcher(self._processes)
            self._watcher.start()
            atexit.register(self._wait_at_exit)

    def _end_all(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
        end_processes(self._processes, _VAIN_S)

    def _wait_at_exit(self) -> None:
        # Without this a shell would see the command end while processes still write their files. After an error in
        # this process they wait for it in vain.
        if getattr(sys, "last_value", None) is not None:
            self._end_all()
            return
        if self._is_told:
            wait_for_processes(self._processes, GRACE_S)
            end_processes(self._processes)
        failed = {code for code in [process.wait() for process in self._processes] if code}
        if failed:
            sys.stdout.flush()
            sys.stderr.flush()
            # A status that a program gives (`sys.exit(3)`) is that of all its processes.
            status = next(iter(failed)) if len(failed) == 1 and min(failed) > 0 else 1
            os._exit(SIGTERM_STATUS if self._is_told or all(_is_sigterm(code) for code in failed) else status)


class _Watcher(threading.Thread):
    """Ends all processes when one of them fails."""

    def __init__(self, processes: list[subprocess.Popen[bytes]]) -> None:
        super().__init__(name="levin-process-watcher", daemon=True)
        self._processes = processes
        self._failure: str | None = None
        # Whether the process did not fail, but was asked to terminate.
        self.is_sigterm: bool = False
        self._stopped = threading.Event()

    def run(self) -> None:
        """Look at the processes until all have ended well, or one has not."""
        while not self._stopped.wait(_POLL_S):
            self._look()
            if self._failure is not None:
                log.error("%s Ending the others.", self._failure)
                end_processes(self._processes)
                # The first process notices when it next talks to the others. Where it does not, it would wait for ever.
                if not self._stopped.wait(GRACE_S) and threading.main_thread().is_alive():
                    os._exit(SIGTERM_STATUS if self.is_sigterm else 1)
                return
            if all(process.poll() == 0 for process in self._processes):
                return

    def failure(self, wait_s: float) -> str | None:
        """Return what has failed, if anything has.

        Args:
            wait_s: How long to wait for a process that is about to end.
        """
        deadline = time.monotonic() + wait_s
        while self._failure is None and time.monotonic() < deadline:
            self._look()
            time.sleep(0.02)
        return self._failure

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _look(self) -> None:
        for index, process in enumerate(self._processes):
            if process.poll() not in (None, 0) and self._failure is None:
                self._failure = f"The process with local rank {index + 1} failed with exit status {process.returncode}."
                self.is_sigterm = _is_sigterm(process.returncode)


def end_processes(processes: list[subprocess.Popen[bytes]], grace_s: float = GRACE_S) -> None:
    """Ask processes to end, and make those that do not.

    Args:
        processes: The processes; those that have ended are left alone.
        grace_s: How long they get.
    """
    for process in processes:
        process.terminate()
    wait_for_processes(processes, grace_s)
    for process in processes:
        process.kill()
        process.wait()


def wait_for_processes(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait until all have ended, but not for longer than ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(0.0, deadline - time.monotonic()))


def _is_sigterm(code: int | None) -> bool:
    return code in (SIGTERM_STATUS, -signal.SIGTERM)
