"""What a machine lacks for a test: the test suites of packages ask Lightning this for their ``RunIf`` marks."""

from __future__ import annotations

import os
import platform
import sys
from importlib.util import find_spec
from typing import Optional

import torch
from packaging.version import Version

from levin.accelerators import MPSAccelerator, XLAAccelerator


def _has_compiler() -> bool:
    from torch._dynamo.eval_frame import is_dynamo_supported  # takes a second to import

    return bool(is_dynamo_supported())


def _runif_reasons(
    *,
    min_cuda_gpus: int = 0,
    min_torch: Optional[str] = None,
    max_torch: Optional[str] = None,
    min_python: Optional[str] = None,
    bf16_cuda: bool = False,
    tpu: bool = False,
    mps: Optional[bool] = None,
    skip_windows: bool = False,
    standalone: bool = False,
    deepspeed: bool = False,
    dynamo: bool = False,
    linux_only: bool = False,
) -> tuple[list[str], dict[str, bool]]:
    """Return what is missing for a test, and the marks by which it is chosen; read by litgpt and others.

    Example:
        >>> _runif_reasons(min_torch="99.0")[0][0].partition(",")[0]
        'torch>=99.0'
    """
    installed, base = torch.__version__, Version(Version(torch.__version__).base_version)
    has_mps = MPSAccelerator.is_available()
    lacks = {
        f"GPUs>={min_cuda_gpus}": torch.cuda.device_count() < min_cuda_gpus,
        f"torch>={min_torch}, {installed} installed": min_torch is not None and base < Version(min_torch),
        f"torch<{max_torch}, {installed} installed": max_torch is not None and base >= Version(max_torch),
        f"python>={min_python}": min_python is not None and Version(platform.python_version()) < Version(min_python),
        "CUDA device bf16": bf16_cuda and not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()),
        "unimplemented on Windows": skip_windows and sys.platform == "win32",
        "TPU": tpu and not XLAAccelerator.is_available(),
        "MPS": bool(mps) and not has_mps,
        "not MPS": mps is False and has_mps,
        "Standalone execution": standalone and os.environ.get("PL_RUN_STANDALONE_TESTS", "0") != "1",
        "Deepspeed": deepspeed and find_spec("deepspeed") is None,
        "torch.compile": dynamo and not _has_compiler(),
        "Linux": linux_only and sys.platform != "linux",
    }
    marks = {"min_cuda_gpus": min_cuda_gpus > 0, "tpu": tpu, "standalone": standalone}
    return [reason for reason, is_lacking in lacks.items() if is_lacking], {name: True for name in marks if marks[name]}
