"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Callable


def names_in_stub(package: str) -> dict[str, str]:
    """Return the names that the stub of a package (``__init__.pyi``) gives out, with the module that each comes from.

    It gives out what it imports under its own name, ``from a import b as b``. Type checkers and editors read the same list.

    Example:
        >>> names_in_stub("levin.data")
        {'CombinedLoader': 'levin.data.combined'}
    """
    stub = pkgutil.get_data(package, "__init__.pyi")
    assert stub is not None, "the package comes from files or an archive"
    imports = (node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom))
    return {alias.name: str(node.module) for node in imports for alias in node.names if alias.asname == alias.name}


def lazy_face(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package, for the names that its stub gives out.

    Args:
        package: Its name.

    Example:
        >>> __getattr__, __dir__ = lazy_face("levin.data")
        >>> __getattr__("CombinedLoader").__name__, __dir__()
        ('CombinedLoader', ['CombinedLoader'])
    """
    home_of = names_in_stub(package)

    def get(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = home_of[name]
        is_module = home == package
        module = importlib.import_module(f"{home}.{name}" if is_module else home)
        value: object = module if is_module else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(home_of)
