from levin.accelerators.accelerator import Accelerator as Accelerator
from levin.accelerators.cpu import CPUAccelerator as CPUAccelerator
from levin.accelerators.cuda import CUDAAccelerator as CUDAAccelerator
from levin.accelerators.cuda import find_usable_cuda_devices as find_usable_cuda_devices
from levin.accelerators.mps import MPSAccelerator as MPSAccelerator
from levin.accelerators.registry import AcceleratorRegistry as AcceleratorRegistry
from levin.accelerators.xla import XLAAccelerator as XLAAccelerator
