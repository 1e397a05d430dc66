"""Whether a person sits at a Python prompt or a notebook."""

from __future__ import annotations

import sys


def is_interactive() -> bool:
    """Return whether this is a Python prompt, IPython or a notebook, where a script cannot be started again."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive) or ipython_shell() is not None


def ipython_shell() -> object:
    """Return the shell of IPython or a notebook that runs this process, or None."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()
