"""Kinds of hardware: how devices are found, named, prepared and measured."""

from levin.accelerators.accelerator import Accelerator
from levin.accelerators.cpu import CPUAccelerator
from levin.accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices
from levin.accelerators.mps import MPSAccelerator
from levin.accelerators.registry import AcceleratorRegistry
from levin.accelerators.xla import XLAAccelerator

__all__ = [
    "Accelerator",
    "AcceleratorRegistry",
    "CPUAccelerator",
    "CUDAAccelerator",
    "MPSAccelerator",
    "XLAAccelerator",
    "find_usable_cuda_devices",
]
