"""Graphics processors of NVIDIA, and of AMD through ROCm."""

from __future__ import annotations

import functools
from typing import Any

import torch

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.devices import parse_device_indices
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.interactive import is_interactive
from levin.utilities.rank_zero import rank_zero_info


class CUDAAccelerator(Accelerator):
    """Runs on CUDA devices; see :func:`levin.accelerators.devices.parse_device_indices` for the ways to name them."""

    @staticmethod
    def name() -> str:
        """Return ``"cuda"``."""
        return "cuda"

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Return the indices of the devices that the user named."""
        return parse_device_indices(devices, range(num_cuda_devices()), kind="cuda")

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        """Return one device per index."""
        return [torch.device("cuda", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """Return all devices; in an interactive session 1, since several need other processes."""
        return 1 if is_interactive() and num_cuda_devices() else num_cuda_devices()

    @staticmethod
    def is_available() -> bool:
        """Return whether there is a CUDA device."""
        return num_cuda_devices() > 0

    def setup_device(self, device: torch.device) -> None:
        """Make ``device`` the current one.

        Raises:
            ValueError: ``device`` is not a CUDA device.
        """
        if device.type != "cuda":
            raise MisconfigurationException(
                f"The cuda accelerator needs a cuda device, received {device}. Pass the accelerator of that device."
            )
        _hint_matmul_precision(device)
        torch.cuda.set_device(device)

    def setup(self, trainer: Any) -> None:
        """Give memory that nobody uses back to the driver, so that the run starts with what there is."""
        torch.cuda.empty_cache()

    def get_device_stats(self, device: torch.device | str | int) -> dict[str, Any]:
        """Return ``torch.cuda.memory_stats`` of the device."""
        return dict(torch.cuda.memory_stats(device))

    def teardown(self) -> None:
        """Give unused memory back to the driver."""
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


@functools.lru_cache(maxsize=1)
def _hint_matmul_precision(device: torch.device) -> None:
    # From compute capability 8 on there are units for TF32; torch leaves them off unless told.
    major, _ = torch.cuda.get_device_capability(device)
    if major >= 8 and torch.get_float32_matmul_precision() == "highest":
        rank_zero_info(
            f"{torch.cuda.get_device_name(device)!r} has Tensor Cores. To use them for float32 matrix products, call "
            "`torch.set_float32_matmul_precision('medium' | 'high')`: faster, with fewer digits."
        )
