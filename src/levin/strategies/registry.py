"""Strategies by the name that the user types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from levin.strategies.strategy import Strategy


@dataclass
class _Entry:
    cls: type[Strategy]
    description: str
    init_params: dict[str, Any]


class StrategyRegistryType:
    """Maps a name to a :class:`Strategy` class and its arguments.

    Example:
        >>> from levin.strategies import SingleDeviceStrategy
        >>> registry = StrategyRegistryType()
        >>> registry.register("one_cpu", SingleDeviceStrategy, device="cpu")
        >>> registry.get("one_cpu").root_device
        device(type='cpu')
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def register(
        self,
        name: str,
        strategy: type[Strategy] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Make a strategy selectable by ``name``.

        Args:
            name: What the user will type; in lower case.
            strategy: The class; without it, a decorator for the class is returned.
            description: One sentence for lists.
            override: Whether an existing entry may be replaced.
            init_params: Passed to the class.

        Raises:
            TypeError: ``name`` is not a string.
            ValueError: The name is taken and ``override`` is False.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, received {name!r}. Pass the word that the user will type.")
        if name in self._entries and not override:
            raise ValueError(f"The strategy name {name!r} is taken. Pass override=True to replace it.")

        def add(cls: type[Strategy]) -> type[Strategy]:
            self._entries[name] = _Entry(cls, description, init_params)
            return cls

        if strategy is None:
            return add
        add(strategy)
        return None

    def get(self, name: str) -> Strategy:
        """Return a new strategy of that name.

        Raises:
            KeyError: The name is unknown.
        """
        entry = self._entry(name)
        return entry.cls(**entry.init_params)

    def get_class(self, name: str) -> type[Strategy]:
        """Return the class that stands behind ``name``, without making one."""
        return self._entry(name).cls

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise KeyError(f"No strategy is named {name!r}. Available names: {', '.join(self.available_strategies())}.")
        return self._entries[name]

    def remove(self, name: str) -> None:
        """Forget ``name``."""
        self._entries.pop(name)

    def available_strategies(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __str__(self) -> str:
        return f"Registered strategies: {', '.join(self.available_strategies())}"


StrategyRegistry = StrategyRegistryType()
