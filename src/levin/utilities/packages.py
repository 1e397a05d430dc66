"""Installed packages: their versions, and those that something needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version


def versions_of(packages: Iterable[str], absent: str = "") -> Iterator[tuple[str, str]]:
    """Yield each package with its version; one that is not installed with ``absent``, or not at all where that is empty.

    Example:
        >>> [name for name, _ in versions_of(["torch", "no-such-package"])]
        ['torch']
    """
    for package in packages:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            if absent:
                yield package, absent


def require_package(package: str, what: str, way_out: str = "") -> None:
    """Check that a package is installed, without importing it.

    Args:
        package: Its name.
        what: What needs it.
        way_out: What to use instead, as a sentence.

    Raises:
        ModuleNotFoundError: It is not.

    Example:
        >>> require_package("torch", "Everything")
    """
    if importlib.util.find_spec(package) is None:
        text = f"{what} needs the package {package}, which is not installed. Run `pip install {package}`. {way_out}"
        raise ModuleNotFoundError(text.rstrip())
