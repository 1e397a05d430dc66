"""Accelerators by the name that the user types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.cpu import CPUAccelerator
from levin.accelerators.cuda import CUDAAccelerator
from levin.accelerators.mps import MPSAccelerator
from levin.accelerators.xla import XLAAccelerator


class AcceleratorRegistryType:
    """Maps a name to an :class:`Accelerator` class and its arguments.

    Example:
        >>> registry = AcceleratorRegistryType()
        >>> registry.register("cpu", CPUAccelerator, description="processor")
        >>> registry.available_accelerators()
        ['cpu']
        >>> type(registry.get("cpu")).__name__
        'CPUAccelerator'
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[type[Accelerator], str, dict[str, Any]]] = {}

    def register(
        self,
        name: str,
        accelerator: type[Accelerator] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: Any,
    ) -> Any:
        """Make an accelerator selectable by ``name``.

        Args:
            name: What the user will type.
            accelerator: The class; without it, a decorator for the class is returned.
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
            raise ValueError(f"The accelerator name {name!r} is taken. Pass override=True to replace it.")

        def add(cls: type[Accelerator]) -> type[Accelerator]:
            self._entries[name] = (cls, description, init_params)
            return cls

        if accelerator is None:
            return add
        add(accelerator)
        return None

    def get(self, name: str) -> Accelerator:
        """Return a new accelerator of that name.

        Raises:
            KeyError: The name is unknown.
        """
        cls, init_params = self._entry(name)
        return cls(**init_params)

    def get_class(self, name: str) -> type[Accelerator]:
        """Return the class that stands behind ``name``, without making one."""
        return self._entry(name)[0]

    def _entry(self, name: str) -> tuple[type[Accelerator], dict[str, Any]]:
        if name not in self._entries:
            raise KeyError(f"No accelerator is named {name!r}. Available names: {', '.join(self._entries)}.")
        cls, _, init_params = self._entries[name]
        return cls, init_params

    def remove(self, name: str) -> None:
        """Forget ``name``."""
        self._entries.pop(name)

    def available_accelerators(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __str__(self) -> str:
        return f"Registered accelerators: {', '.join(self.available_accelerators())}"


AcceleratorRegistry = AcceleratorRegistryType()
AcceleratorRegistry.register("tpu", XLAAccelerator, description="TPUs of Google, through torch_xla")
AcceleratorRegistry.register(
    "cuda", CUDAAccelerator, description="graphics processors of NVIDIA, and of AMD through ROCm"
)
AcceleratorRegistry.register("cpu", CPUAccelerator, description="the processor")
AcceleratorRegistry.register("mps", MPSAccelerator, description="graphics processors of Apple")
