"""Graphics processors of Apple."""

from __future__ import annotations

import os
from typing import Any

import torch

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.devices import parse_device_indices
from levin.utilities.exceptions import MisconfigurationException


class MPSAccelerator(Accelerator):
    """Runs on the single graphics processor of an Apple machine; ``DISABLE_MPS=1`` hides it."""

    @staticmethod
    def name() -> str:
        """Return ``"mps"``."""
        return "mps"

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Return ``[0]`` when the user named the one device there is."""
        return parse_device_indices(devices, [0], kind="mps")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return the MPS device."""
        return [torch.device("mps", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """Return 1."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Return whether torch can use the device and ``DISABLE_MPS`` is not set."""
        return torch.backends.mps.is_available() and os.environ.get("DISABLE_MPS", "0") != "1"

    def setup_device(self, device: torch.device) -> None:
        """Check that ``device`` is an MPS device.

        Raises:
            ValueError: ``device`` is not an MPS device.
        """
        if device.type != "mps":
            raise MisconfigurationException(
                f"The mps accelerator needs an mps device, received {device}. Pass the accelerator of that device."
            )

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return the memory in use, in bytes."""
        return {
            "mps.current_allocated_bytes": torch.mps.current_allocated_memory(),
            "mps.driver_allocated_bytes": torch.mps.driver_allocated_memory(),
        }

    def teardown(self) -> None:
        """Give unused memory back to the driver."""
        torch.mps.empty_cache()
