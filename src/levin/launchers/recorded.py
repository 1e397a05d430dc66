"""Run a script or a module as torchrun would, and write its error where torchrun looks for it.

python -m levin.launchers.recorded {script,module} NAME [ARGUMENTS ...]
"""

from __future__ import annotations

import os
import runpy
import sys

from torch.distributed.elastic.multiprocessing.errors import record


def main() -> None:
    """Run what the command line names, as the main program."""
    kind, name, *arguments = sys.argv[1:]
    sys.argv = [name, *arguments]
    record(run)(kind, name)


def run(kind: str, name: str) -> None:
    """Run a script or a module under the name ``__main__``.

    Args:
        kind: ``"script"`` or ``"module"``.
        name: Its path or its name.
    """
    if kind == "module":
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    # As Python itself does for a script.
    sys.path[0] = os.path.dirname(os.path.abspath(name))
    runpy.run_path(name, run_name="__main__")


if __name__ == "__main__":
    main()
