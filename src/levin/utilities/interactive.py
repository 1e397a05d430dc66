"""Whether a person sits at a Python prompt, a notebook or a shell of SLURM."""

from __future__ import annotations

import os
import sys

# What `salloc` calls a job, and what `srun --pty` does.
_SHELLS = ("interactive", "bash", "sh", "zsh", "fish", "dash", "ksh", "csh", "tcsh")


def is_interactive() -> bool:
    """Return whether this is a Python prompt, IPython or a notebook, where a script cannot be started again."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or ipython_shell() is not None


def ipython_shell() -> object:
    """Return the shell of IPython or a notebook that runs this process, or None."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def is_slurm_shell() -> bool:
    """Return whether the job of SLURM is a shell for a person (``salloc``, ``srun --pty zsh``), not a launched script."""
    return os.environ.get("SLURM_JOB_NAME") in _SHELLS
