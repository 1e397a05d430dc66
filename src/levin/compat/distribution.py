"""What ``importlib.metadata`` says of Lightning under the alias."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Optional


class AliasDistribution(importlib.metadata.Distribution):
    """A package with a name and a version, and no files.

    Args:
        name: As packages ask for it, such as ``pytorch-lightning``.
        version: The version to answer with.
    """

    def __init__(self, name: str, version: str) -> None:
        self._name = name
        self._version = version

    def read_text(self, filename: str) -> Optional[str]:
        """Return the content of one of the files with metadata, or None."""
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {self._name}\nVersion: {self._version}\nSummary: answered for by levin\n"

    def locate_file(self, path: object) -> Any:
        """Refuse: there are no files.

        Raises:
            FileNotFoundError: Always.
        """
        raise FileNotFoundError(f"{self._name} is answered for by levin and has no files, asked for {str(path)!r}.")
