"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def lazy_face(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: Its name.
        homes: Module -> the public names that come from it, with spaces between; of a submodule, its own name.

    Example:
        >>> __getattr__, __dir__ = lazy_face(__name__, {"collections": "OrderedDict deque"})
        >>> __getattr__("OrderedDict").__name__, __dir__()
        ('OrderedDict', ['OrderedDict', 'deque'])
    """
    home_of = {name: home for home, names in homes.items() for name in names.split()}

    def get(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(home_of[name])
        value = module if module.__name__ == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(home_of)
