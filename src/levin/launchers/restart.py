"""The command that starts this program again."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

import __main__
from levin.utilities.command_line import CommandLine, parse_command_line
from levin.utilities.exceptions import MisconfigurationException

# The directory in which the program was started, unless it changes into another one before it imports levin.
_DIRECTORY_AT_IMPORT = os.getcwd()
# Modules that processes run which get their tasks from others, as the jobs of Hydra's launchers do.
_POOLS = ("joblib.externals.loky.", "submitit.core.")


def script_command(local_rank: int) -> tuple[list[str], str]:
    """Return the command that runs this program again, and the directory to run it in.

    It is the command that started it, whatever the program has made of ``sys.argv`` and of the working directory since.

    Args:
        local_rank: The process that the command is for.

    Raises:
        ValueError: This process does not run a script or a module, or is a worker of a pool.
    """
    name = getattr(getattr(__main__, "__spec__", None), "name", None)
    file = getattr(__main__, "__file__", None)
    started = parse_command_line(sys.orig_argv[1:])
    if name is not None and name.startswith(_POOLS):
        raise MisconfigurationException(
            f"This process cannot be started again: it is a worker of {name.partition('.')[0]}, which has its task from another "
            "process. Give each task one device, or let the scheduler start all processes (srun, torchrun)."
        )
    if name is not None and name != "__main__":
        # Started by -m, or by a tool that runs modules so: `sys.argv` is then all that it has left.
        target = ["-m", name.removesuffix(".__main__")]
        is_own = started.kind == "-m" and started.target == target[1]
    elif file is not None and os.path.exists(path := os.path.dirname(file) if name == "__main__" else file):
        # A folder or an archive with a __main__.py has a name here, a script has none.
        target = [os.path.abspath(path)]
        is_own = started.kind == "file" and os.path.basename(os.path.normpath(started.target)) == os.path.basename(path)
    else:
        raise MisconfigurationException(
            f"This process cannot be started again: it runs no script, received sys.argv[0]={sys.argv[0]!r}. "
            "Write the program into a file, or use strategy='ddp_spawn' or torchrun."
        )
    # Another program, such as a profiler, may have been started and run this one: then only that one goes to all ranks.
    options, arguments = (started.options, started.arguments) if is_own else ([], sys.argv[1:])
    directory = _start_directory(started, file or "")
    if (job := hydra_job()) is not None:
        from hydra.utils import get_original_cwd  # used when present

        arguments, directory = hydra_arguments(arguments, job, local_rank), get_original_cwd()
    return [sys.executable, *options, *target, *arguments], directory


def _start_directory(started: CommandLine, file: str) -> str:
    """Return the directory in which this program was started.

    Args:
        started: How.
        file: The program's own file, with its whole path.
    """
    # Python puts it in front of the path of modules; a shell says it, unless another program stands between.
    said = sys.path[0] if started.kind == "-m" else os.environ.get("PWD", "")
    if started.kind == "-m":
        is_true = os.path.isabs(said) and file.startswith(os.path.join(said, ""))
    else:
        is_true = not os.path.isabs(started.target) and file.startswith(
            os.path.realpath(os.path.join(said, started.target))
        )
    return said if is_true else _DIRECTORY_AT_IMPORT


def hydra_job() -> Any:
    """Return Hydra's own settings in the job that this process does now; None without one."""
    if "hydra" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig  # used when present

    return HydraConfig.get() if HydraConfig.initialized() else None


def hydra_arguments(arguments: Sequence[str], job: Any, local_rank: int) -> list[str]:
    """Return the arguments with which another process does the same job of Hydra, in the same directory.

    Args:
        arguments: Those that started all jobs.
        job: Hydra's own settings in this job.
        local_rank: The other process.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for names in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir"), ("-p", "--package")):
        parser.add_argument(*names)
    for names in (("-m", "--multirun"), ("-r", "--run")):
        parser.add_argument(*names, action="store_true")
    given, overrides = parser.parse_known_args(arguments)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in vars(given).items() if isinstance(value, str)]
    if "hydra.mode=MULTIRUN" in job.overrides.hydra:
        # One job out of many: its own values, not the lists of them.
        overrides = [*job.overrides.task, *job.overrides.hydra, "hydra.mode=RUN"]
    place = [f"hydra.run.dir={job.runtime.output_dir!r}", f"hydra.job.name=train_ddp_process_{local_rank}"]
    return [*options, *overrides, *place, "hydra.output_subdir=null"]
