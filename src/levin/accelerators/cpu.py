"""The processor of the machine."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import override

from levin.accelerators.accelerator import Accelerator
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.packages import require_package


class CPUAccelerator(Accelerator):
    """Runs on the processor; ``devices`` is the number of processes.

    Example:
        >>> CPUAccelerator.get_parallel_devices(CPUAccelerator.parse_devices("2"))
        [device(type='cpu'), device(type='cpu')]
    """

    _device_type = "cpu"

    @staticmethod
    @override
    def name() -> str:
        return "cpu"

    @staticmethod
    @override
    def parse_devices(devices: Any) -> int:
        """Return the number of processes.

        Args:
            devices: An int > 0, or a string of one.

        Raises:
            ValueError: ``devices`` is 0.
            TypeError: ``devices`` is anything else than a positive int.
        """
        return parse_cpu_processes(devices)

    @staticmethod
    @override
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cpu")] * parse_cpu_processes(devices)

    @staticmethod
    @override
    def auto_device_count() -> int:
        return 1

    @staticmethod
    @override
    def is_available() -> bool:
        return True

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, float]:
        """Return the load of processor, memory and swap in percent.

        Raises:
            ModuleNotFoundError: psutil is not installed.
        """
        require_package("psutil", "CPU statistics")
        import psutil

        return {
            "cpu_vm_percent": psutil.virtual_memory().percent,
            "cpu_percent": psutil.cpu_percent(),
            "cpu_swap_percent": psutil.swap_memory().percent,
        }


def parse_cpu_processes(devices: object) -> int:
    """Return ``devices`` as a number of processes; see :meth:`CPUAccelerator.parse_devices`."""
    count = devices
    if isinstance(count, str):
        try:
            count = int(count.strip())
        except ValueError:
            count = None
    if isinstance(count, int) and count > 0:
        return int(count)
    if isinstance(count, int) and count == 0:
        raise MisconfigurationException(f"devices must be > 0, received {devices!r}. Use 1 for one process.")
    raise TypeError(
        f"devices must be an int > 0 with accelerator='cpu' (the number of processes), received {devices!r}. "
        "Use devices=1 for one process."
    )
