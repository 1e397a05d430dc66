"""Properties that show what lies in a part: one line for each name that users know."""

from __future__ import annotations

from operator import attrgetter
from typing import Any


def reads(path: str, doc: str) -> Any:
    """Return a property that reads ``path``, such as ``"strategy.world_size"``, from its object.

    Example:
        >>> class Box:
        ...     content = [1, 2]
        ...     size = reads("content.__len__", "How many.")
        >>> Box().size()
        2
    """
    return property(attrgetter(path), doc=doc)
