"""Packages that a number format needs and that are imported when it is used."""

from __future__ import annotations

import importlib.util


def require_package(package: str, what: str, way_out: str) -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: Its name, for imports and, with ``-`` for ``_``, for pip.
        what: What needs it.
        way_out: What to use instead, as a sentence.

    Raises:
        ModuleNotFoundError: It is not.

    Example:
        >>> require_package("torch", "everything", "There is no other way.")
    """
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{what} needs the package {package}, which is not installed. Run `pip install {package.replace('_', '-')}`. "
            f"{way_out}"
        )
