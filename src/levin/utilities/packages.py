"""Installed packages: their versions, and those that something needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from levin.utilities.collections import as_list


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


def made_by_packages(*groups: str) -> list[Any]:
    """Return what the factories that installed packages register make: each one object, or a list of them.

    Args:
        groups: Groups of entry points; a factory that is in several is called once.

    Example:
        >>> made_by_packages("no-such-group")
        []
    """
    factories = {entry.value: entry for group in groups for entry in entry_points(group=group)}
    return [made for factory in factories.values() for made in as_list(factory.load()())]


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
