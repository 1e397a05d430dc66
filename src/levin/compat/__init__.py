"""Running code that was written for Lightning: the import alias.

After :func:`install` the packages ``lightning``, ``pytorch_lightning`` and ``lightning_fabric`` are levin, whether or not
Lightning is installed. ``python -m levin SCRIPT`` does it for a program that stays as it is, and for all processes that the
program starts.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["install"]

_SITE = str(Path(__file__).parent / "site")


def install(inherit: bool = True) -> None:
    """Let ``import lightning.pytorch as pl`` and its siblings give levin, from now on.

    Args:
        inherit: Whether the Python processes that this one starts do the same: launched ranks, spawned workers, the
            workers of pytest-xdist. A folder in ``PYTHONPATH`` sees to it, which their start-up reads.

    Raises:
        RuntimeError: Lightning itself was imported before.

    Example:
        >>> from levin.compat import install
        >>> install()  # doctest: +SKIP
        >>> import lightning.pytorch as pl  # doctest: +SKIP
        >>> pl.Trainer  # doctest: +SKIP
        <class 'levin.trainer.Trainer'>
    """
    from levin.compat.finder import install_finder

    install_finder()
    if inherit:
        os.environ.update(inherited_environment())


def inherited_environment() -> dict[str, str]:
    """Return the variables that make a new Python process install the alias at its start."""
    others = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder and folder != _SITE]
    return {"PYTHONPATH": os.pathsep.join([_SITE, *others])}
