"""Whether a person sits at a Python prompt or a notebook."""

from __future__ import annotations

import sys


def is_interactive() -> bool:
    """Return whether this is a Python prompt, IPython or a notebook, where a script cannot be started again."""
    if hasattr(sys, "ps1") or sys.flags.interactive:
        return True
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
