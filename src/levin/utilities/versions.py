"""Versions of installed packages."""

from __future__ import annotations

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
