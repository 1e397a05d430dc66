"""Graphics processors of NVIDIA, and of AMD through ROCm."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from typing_extensions import override

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.devices import parse_device_indices
from levin.utilities.interactive import is_interactive
from levin.utilities.rank_zero import rank_zero_info

# Asking for devices through NVML makes no CUDA context, so that processes can still be forked afterwards.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


class CUDAAccelerator(Accelerator):
    """Runs on CUDA devices; see :func:`levin.accelerators.devices.parse_device_indices` for the ways to name them."""

    _device_type = "cuda"

    @staticmethod
    @override
    def name() -> str:
        return "cuda"

    @staticmethod
    @override
    def parse_devices(devices: Any) -> list[int]:
        return parse_device_indices(devices, range(num_cuda_devices()), kind="cuda")

    @staticmethod
    @override
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return 1 if is_interactive() and num_cuda_devices() else num_cuda_devices()

    @staticmethod
    @override
    def is_available() -> bool:
        return num_cuda_devices() > 0

    @override
    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one.

        Raises:
            ValueError: ``device`` is not a CUDA device.
        """
        super().setup_device(device)
        _hint_matmul_precision(device)
        torch.cuda.set_device(device)

    @override
    def setup(self, trainer: Any) -> None:
        torch.cuda.empty_cache()

    @override
    def get_device_stats(self, device: torch.device | str | int) -> dict[str, float]:
        return dict(torch.cuda.memory_stats(device))

    @override
    def teardown(self) -> None:
        torch.cuda.empty_cache()


def num_cuda_devices() -> int:
    """Return how many CUDA devices this process sees, without starting CUDA (a forked child could not use it)."""
    return torch.cuda.device_count()


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Return the indices of CUDA devices on which memory can be taken.

    Devices in exclusive mode that another process holds are left out. This starts CUDA in the calling process.

    Args:
        num_devices: How many to find; -1 for all there are.

    Raises:
        ValueError: The machine has fewer devices.
        RuntimeError: Too many of them are taken.
    """
    if num_devices == 0:
        return []
    visible = num_cuda_devices()
    if visible == 0:
        raise ValueError(
            f"num_devices={num_devices} CUDA devices were asked for, but this machine has none. Use accelerator='cpu'."
        )
    if num_devices > visible:
        raise ValueError(
            f"num_devices must be <= {visible}, the CUDA devices of this machine, received {num_devices}. "
            "Use -1 for all."
        )
    usable: list[int] = []
    taken: list[int] = []
    for index in range(visible):
        if len(usable) == num_devices:
            break
        try:
            torch.zeros(1, device=torch.device("cuda", index))
        except RuntimeError:
            taken.append(index)
        else:
            usable.append(index)
    if num_devices != -1 and len(usable) != num_devices:
        raise RuntimeError(
            f"num_devices={num_devices} CUDA devices were asked for, but {taken} are taken by other processes and "
            f"only {usable} can be used. Ask for {len(usable)}, or free the others."
        )
    return usable


@functools.cache
def _hint_matmul_precision(device: torch.device) -> None:
    # From compute capability 8 on there are units for TF32; torch leaves them off unless told.
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8 and torch.get_float32_matmul_precision() == "highest":
        rank_zero_info(
            f"{torch.cuda.get_device_name(device)!r} has Tensor Cores. To use them for float32 matrix products, call "
            "`torch.set_float32_matmul_precision('medium' | 'high')`: faster, with fewer digits."
        )
