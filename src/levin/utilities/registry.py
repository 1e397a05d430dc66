"""Classes by the name that the user types."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(dict[str, dict[str, Any]], Generic[T]):
    """Maps a name to a class, the arguments it is made with, and a description.

    Args:
        kind: What is registered, as messages and the keys of an entry name it.

    Example:
        >>> registry = Registry("shape")
        >>> registry.add("unit_circle", dict, "round", radius=1)
        >>> registry.get("unit_circle"), registry["unit_circle"]["description"]
        ({'radius': 1}, 'round')
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind: str = kind

    def add(
        self, name: str, cls: type[T] | str | None, description: str = "", override: bool = False, **init_params: object
    ) -> Callable[[type[T]], type[T]] | None:
        """Make a class selectable by ``name``.

        Args:
            name: What the user will type.
            cls: The class, or ``"module:name"`` of one that is imported when it is asked for; without it, a decorator for
                the class is returned.
            description: One sentence for lists.
            override: Whether an existing entry may be replaced.
            init_params: Passed to the class.

        Raises:
            TypeError: ``name`` is not a string.
            ValueError: The name is taken and ``override`` is False.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, received {name!r}. Pass the word that the user will type.")
        if name in self and not override:
            raise ValueError(f"The {self._kind} name {name!r} is taken. Pass override=True to replace it.")

        def enter(cls: object) -> Any:
            self[name] = {
                self._kind: cls,
                f"{self._kind}_name": name,
                "description": description,
                "init_params": init_params,
            }
            return cls

        if cls is None:
            return enter
        enter(cls)
        return None

    def get(self, name: str, default: Any = None) -> T:  # type: ignore[override]  # an object, as packages expect
        """Return a new object of the class that stands behind ``name``.

        Args:
            name: What the user typed.
            default: Returned for an unknown name, if it is given.

        Raises:
            KeyError: The name is unknown.
        """
        if name not in self and default is not None:
            value: T = default
            return value
        return self.get_class(name)(**self[name]["init_params"])

    def get_class(self, name: str) -> type[T]:
        """Return the class that stands behind ``name``, without making an object.

        Raises:
            KeyError: The name is unknown.
        """
        if name not in self:
            raise KeyError(f"No {self._kind} is named {name!r}. Available names: {', '.join(sorted(self))}.")
        entry = self[name]
        if isinstance(entry[self._kind], str):
            module, _, attribute = entry[self._kind].partition(":")
            entry[self._kind] = getattr(importlib.import_module(module), attribute)
        cls: type[T] = entry[self._kind]
        return cls

    def remove(self, name: str) -> None:
        """Forget ``name``."""
        self.pop(name)
