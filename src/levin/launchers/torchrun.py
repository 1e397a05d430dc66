"""``levin launch``: torchrun with defaults that fit, and the failing process's own traceback first."""

from __future__ import annotations

import argparse
import copy
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from levin.launchers.launcher import SIGTERM_STATUS
from levin.utilities.processors import count_processors

LOG_DIR = "levin_logs"
_LINES_OF_LOG = 20
# More than the time between torchrun's looks, less than the half minute that it gives processes to end.
_LOOKED_LATE_S = 10
_RENDEZVOUS = ("rdzv_endpoint", "node_rank", "master_addr", "master_port", "standalone")


def main(arguments: Sequence[str]) -> int:
    """Start a script in several processes, by torchrun, and wait for them.

    Without options: one process per GPU (one on a machine without), on this machine; each process has its part of the
    processors; what the processes print goes into files below ``levin_logs``, that of the first also to the console.

    Args:
        arguments: torchrun's options, the script, and the script's arguments.

    Returns:
        0 when all processes ended well, otherwise the exit status of the one that failed first; 143 when this process
        was asked to terminate, and in general 128 and the number of the signal that ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    parser = get_args_parser()
    parser.prog = "levin launch"
    parser.epilog = "Example: levin launch --nproc-per-node 2 train.py --lr 0.1"
    given = parser.parse_args(list(arguments))
    if not (given.module or given.no_python or given.run_path or os.path.exists(given.training_script)):
        raise SystemExit(f"levin: {given.training_script!r} is no script that exists. See `levin launch --help`.")
    complete(given, named_options(parser, arguments))
    try:
        run(given)
    except ChildFailedError as error:
        sys.stdout.flush()
        print(describe(error, given.log_dir), file=sys.stderr, flush=True)
        code: int = error.failures[first_failure(error.failures)].exitcode
        # As a shell says it: 128 and the number of the signal.
        return code if code > 0 else 128 - code
    except SignalException as error:
        # torchrun has passed the signal on and waited for the processes.
        print(f"Ended by {error.sigval.name}, which was passed on to the processes.", file=sys.stderr, flush=True)
        return 128 + error.sigval
    return 0


def named_options(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> set[str]:
    """Return the names of the options that the command line, or torchrun's environment variables, set."""
    silent = copy.deepcopy(parser)
    for action in silent._actions:
        action.default = argparse.SUPPRESS
    named = vars(silent.parse_args(list(arguments)))
    variables = {action.dest for action in parser._actions if f"PET_{action.dest.upper()}" in os.environ}
    return set(named) | variables


def complete(given: Any, named: set[str]) -> None:
    """Set what the user left open.

    Args:
        given: torchrun's settings; changed in place.
        named: Those that the user set.
    """
    if "nproc_per_node" not in named:
        given.nproc_per_node = str(_num_gpus() or 1)
    if "nnodes" not in named and not named.intersection(_RENDEZVOUS):
        given.standalone = True
    if "log_dir" not in named:
        given.log_dir = LOG_DIR
    num_processes = int(given.nproc_per_node) if str(given.nproc_per_node).isdigit() else None
    if num_processes is not None:
        if "OMP_NUM_THREADS" not in os.environ:
            os.environ["OMP_NUM_THREADS"] = str(max(1, count_processors() // num_processes))
        if not named.intersection(("redirects", "tee", "local_ranks_filter")) and num_processes > 1:
            given.redirects = ",".join(f"{local_rank}:3" for local_rank in range(1, num_processes))
    # Without it torchrun keeps one store over its restarts, and new processes may read the addresses of dead ones.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if not given.no_python and not given.run_path:
        # The script runs in a program that writes down its error, so that it can be shown here.
        kind = "module" if given.module else "script"
        given.training_script_args = [kind, given.training_script, *given.training_script_args]
        given.training_script, given.module = "levin.launchers.recorded", True


def describe(error: Any, log_dir: str) -> str:
    """Return what failed, the first failure first, with its traceback or the end of what it printed.

    Args:
        error: torchrun's ``ChildFailedError``.
        log_dir: Below which torchrun wrote what the processes printed.
    """
    rank = first_failure(error.failures)
    first = error.failures[rank]
    lines = [f"Rank {rank} failed first: process {first.pid}, {_how(first)}."]
    data = first.error_file_data.get("message") if isinstance(first.error_file_data, dict) else None
    printed = max(Path(log_dir).glob(f"*/attempt_*/{first.local_rank}/stderr.log"), key=os.path.getmtime, default=None)
    if isinstance(data, dict) and data.get("extraInfo", {}).get("py_callstack"):
        lines.append(data["extraInfo"]["py_callstack"].rstrip())
    elif printed is not None:
        lines += [f"It left no traceback. The end of {printed}:"]
        lines += [f"    {line}" for line in printed.read_text(errors="replace").splitlines()[-_LINES_OF_LOG:]]
    others = sorted(other for other in error.failures if other != rank)
    if others:
        listed = ", ".join(f"{other} ({_how(error.failures[other])})" for other in others[:8])
        lines.append(f"After it: rank {listed}{', ...' if len(others) > 8 else ''}.")
    return "\n".join(lines)


def first_failure(failures: Mapping[int, Any]) -> int:
    """Return the rank that failed first.

    torchrun has a time in whole seconds for each: of its traceback, or, without one, of the look that found it dead. A
    process killed from outside would so come after those that failed for want of it, and among the processes of one second
    the lowest rank would be first. So what torchrun itself ended comes last, and a killed process before what followed.

    Args:
        failures: torchrun's ``ProcessFailure`` of each rank that failed, in the order in which they were found.
    """

    def order(rank: int) -> tuple[bool, int]:
        failure = failures[rank]
        # torchrun's own SIGKILL comes half a minute after the first failure.
        time: int = failure.timestamp - (_LOOKED_LATE_S if failure.exitcode == -signal.SIGKILL else 0)
        return failure.exitcode in (-signal.SIGTERM, SIGTERM_STATUS), time

    return min(failures, key=order)


def _how(failure: Any) -> str:
    return f"ended by {failure.signal_name()}" if failure.exitcode < 0 else f"exit status {failure.exitcode}"


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
