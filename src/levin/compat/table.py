"""Lightning's paths and levin's names: the one table that the import alias and ``levin migrate`` go by."""

from __future__ import annotations

from levin.compat.paths import TABLE

ROOMS = frozenset(
    f"levin.{room}"
    for room in (
        "accelerators", "callbacks", "checkpoint", "cli", "environments", "launchers", "loggers", "precision",
        "profilers", "strategies",
    )
)  # fmt: skip
"""Modules that are attributes of ``levin`` without being imported."""

ROOTS = {"lightning": "", "pytorch_lightning": "pytorch", "lightning_fabric": "fabric"}
"""Top-level packages that the alias answers for, and the path that each is."""

PROGRAMS = {
    "pytorch.utilities.upgrade_checkpoint": "levin.checkpoint.upgrade_file",
    "pytorch.utilities.consolidate_checkpoint": "levin.checkpoint.folder",
    "fabric.utilities.consolidate_checkpoint": "levin.checkpoint.folder",
}
"""Modules that people run with ``python -m``, and the module whose ``main(words)`` does it here."""


def names_in(path: str) -> dict[str, tuple[str, str]]:
    """Return what the module at ``path`` holds: name -> (levin's module, the name there).

    Args:
        path: A key of :data:`levin.compat.paths.TABLE`.

    Example:
        >>> names_in("pytorch.core.optimizer")["_MockOptimizer"]
        ('levin.optimizer', 'MockOptimizer')
    """
    found = {}
    for home, names in TABLE[path].items():
        for entry in names.split():
            theirs, _, ours = entry.partition(":")
            found[theirs] = (home, ours or theirs)
    return found


def path_of(module: str) -> str | None:
    """Return the key of the table that a module name of Lightning's stands for, whether or not it is there.

    Args:
        module: A dotted name, such as ``pytorch_lightning.callbacks``.

    Returns:
        The path below ``lightning``; None for a module of somebody else.

    Example:
        >>> path_of("pytorch_lightning.callbacks"), path_of("lightning"), path_of("torch")
        ('pytorch.callbacks', '', None)
    """
    root, _, rest = module.partition(".")
    if root not in ROOTS:
        return None
    return ".".join(part for part in (ROOTS[root], rest) if part)
