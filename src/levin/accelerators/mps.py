"""Graphics processors of Apple."""

from __future__ import annotations

import os
from typing import Any

import torch
from typing_extensions import override

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.devices import parse_device_indices


class MPSAccelerator(Accelerator):
    """Runs on the single graphics processor of an Apple machine; ``DISABLE_MPS=1`` hides it."""

    _device_type = "mps"

    @staticmethod
    @override
    def name() -> str:
        return "mps"

    @staticmethod
    @override
    def parse_devices(devices: Any) -> list[int]:
        return parse_device_indices(devices, [0], kind="mps")

    @staticmethod
    @override
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("mps", index) for index in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return 1

    @staticmethod
    @override
    def is_available() -> bool:
        return torch.backends.mps.is_available() and os.environ.get("DISABLE_MPS", "0") != "1"

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, float]:
        return {
            "mps.current_allocated_bytes": torch.mps.current_allocated_memory(),
            "mps.driver_allocated_bytes": torch.mps.driver_allocated_memory(),
        }

    @override
    def teardown(self) -> None:
        torch.mps.empty_cache()
