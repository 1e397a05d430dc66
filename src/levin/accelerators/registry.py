"""Accelerators by the name that the user types."""

from __future__ import annotations

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.cpu import CPUAccelerator
from levin.accelerators.cuda import CUDAAccelerator
from levin.accelerators.mps import MPSAccelerator
from levin.accelerators.xla import XLAAccelerator
from levin.utilities.registry import Registry


class AcceleratorRegistryType(Registry[Accelerator]):
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
        super().__init__("accelerator")

    def register(
        self,
        name: str,
        accelerator: type[Accelerator] | None = None,
        description: str = "",
        override: bool = False,
        **init_params: object,
    ) -> object:
        """Make an accelerator selectable by ``name``; see :meth:`Registry.add`."""
        return self.add(name, accelerator, description, override, **init_params)

    def available_accelerators(self) -> list[str]:
        """Return all names, sorted."""
        return sorted(self)

    def __str__(self) -> str:
        return f"Registered accelerators: {', '.join(sorted(self))}"


AcceleratorRegistry = AcceleratorRegistryType()
AcceleratorRegistry.register("tpu", XLAAccelerator, description="TPUs of Google, through torch_xla")
AcceleratorRegistry.register(
    "cuda", CUDAAccelerator, description="graphics processors of NVIDIA, and of AMD through ROCm"
)
AcceleratorRegistry.register("cpu", CPUAccelerator, description="the processor")
AcceleratorRegistry.register("mps", MPSAccelerator, description="graphics processors of Apple")
