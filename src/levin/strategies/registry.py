"""Strategies by the name that the user types."""

from __future__ import annotations

from typing import Any

from levin.strategies.strategy import Strategy
from levin.utilities.registry import Registry


class StrategyRegistryType(Registry[Strategy]):
    """Maps a name to a :class:`Strategy` class and its arguments.

    Example:
        >>> from levin.strategies import SingleDeviceStrategy
        >>> registry = StrategyRegistryType()
        >>> registry.register("one_cpu", SingleDeviceStrategy, device="cpu")
        >>> registry.get("one_cpu").root_device
        device(type='cpu')
    """

    def __init__(self) -> None:
        super().__init__("strategy")

    def register(
        self,
        name: str,
        strategy: type[Strategy] | str | None = None,
        description: str = "",
        override: bool = False,
        **init_params: object,
    ) -> Any:
        """Make a strategy selectable by ``name``, in lower case; see :meth:`Registry.add`."""
        return self.add(name, strategy, description, override, **init_params)

    def available_strategies(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self)

    def __str__(self) -> str:
        return f"Registered strategies: {', '.join(sorted(self))}"


StrategyRegistry = StrategyRegistryType()
