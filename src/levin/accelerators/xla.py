"""TPUs, through torch_xla."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from typing_extensions import override

from levin.accelerators.accelerator import Accelerator
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.packages import require_package
from levin.utilities.xla_generator import XLA_GENERATOR


class XLAAccelerator(Accelerator):
    """Runs on TPUs; unavailable without the package torch_xla.

    With ``PJRT_DEVICE=CPU`` in the environment the processor stands in for a TPU, to try a program out: each process has a
    device of its own. It is not chosen by ``accelerator="auto"``.

    Raises:
        ModuleNotFoundError: torch_xla is not installed.
    """

    _device_type = "xla"

    def __init__(self) -> None:
        require_package("torch_xla", "accelerator='tpu'", "Or use accelerator='auto'.")

    @staticmethod
    @override
    def name() -> str:
        return "tpu"

    @staticmethod
    @override
    def parse_devices(devices: Any) -> int | list[int]:
        """Return the number of cores, or one core's index in a list.

        Raises:
            ValueError: ``devices`` is neither 1, all cores, nor one index.
        """
        count = XLAAccelerator.auto_device_count()
        if isinstance(devices, str):
            text = devices.strip().rstrip(",")
            devices = (
                [int(text)]
                if "," in devices and text.isdigit()
                else int(text)
                if text.lstrip("-").isdigit()
                else devices
            )
        if devices == -1:
            return count
        is_count = isinstance(devices, int) and not isinstance(devices, bool) and devices >= 1
        if is_count and (devices in (1, count) or _is_replaced()):
            return int(devices)
        if isinstance(devices, (list, tuple)) and len(devices) == 1 and devices[0] in range(count):
            return [int(devices[0])]
        raise MisconfigurationException(
            f"devices must be 1, {count} or [index] with accelerator='tpu', received {devices!r}. Use 'auto' for all cores."
        )

    @staticmethod
    @override
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        indices = devices if isinstance(devices, list) else range(devices)
        return [torch.device("xla", index) for index in indices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return XLAAccelerator.num_tpus() or int(_is_replaced())

    @staticmethod
    def num_tpus() -> int:
        """Return the number of TPU cores of this machine."""
        if not _is_installed():
            return 0
        from torch_xla._internal import tpu

        try:
            return int(tpu.num_available_devices())
        except OSError:
            # It asks the cloud's metadata server, which is not there elsewhere.
            return 0

    @staticmethod
    @override
    def is_available() -> bool:
        return XLAAccelerator.auto_device_count() > 0

    @override
    def setup_device(self, device: torch.device) -> None:
        """Check that ``device`` is one of XLA, start its runtime, and let its random numbers follow torch's seed.

        Raises:
            ValueError: ``device`` is of another kind.
        """
        super().setup_device(device)
        import torch_xla

        torch_xla.device()
        XLA_GENERATOR.follow(torch.initial_seed())

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, float]:
        import torch_xla.core.xla_model as xm

        if _is_replaced():
            return {}
        info = xm.get_memory_info(device)
        free = info["bytes_limit"] - info["bytes_used"]
        return {"avg. free memory (MB)": free / 2**20, "avg. peak memory (MB)": info["peak_bytes_used"] / 2**20}


def _is_replaced() -> bool:
    """Whether another device stands in for a TPU."""
    return _is_installed() and os.environ.get("PJRT_DEVICE", "TPU") != "TPU"


def _is_installed() -> bool:
    return importlib.util.find_spec("torch_xla") is not None
