"""Small public helpers of Lightning's that packages import and that nothing of levin's own needs."""

from __future__ import annotations

import gc
import os
import pickle
import sys
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from importlib.util import find_spec
from typing import Any, Protocol, Union, runtime_checkable

import torch
import torch.distributed
from lightning_utilities.core.enums import StrEnum

from levin.engine import Engine, build_engine
from levin.hparams import frame_arguments
from levin.loading import read_hparams_file
from levin.utilities.collections import apply_to_collection
from levin.utilities.numbers import to_numbers

FLOAT16_EPSILON: float = float(torch.finfo(torch.float16).eps)
FLOAT32_EPSILON: float = float(torch.finfo(torch.float32).eps)
FLOAT64_EPSILON: float = float(torch.finfo(torch.float64).eps)
_KINETO_AVAILABLE: bool = torch.profiler.kineto_available()
_IS_WINDOWS: bool = sys.platform == "win32"
_OMEGACONF_AVAILABLE: bool = find_spec("omegaconf") is not None
_EVALUATE_OUTPUT = list[Mapping[str, float]]
_PREDICT_OUTPUT = Union[list[Any], list[list[Any]]]


class LightningDeprecationWarning(DeprecationWarning):
    """A filter for it silences nothing: levin's deprecations are plain DeprecationWarnings."""


class _TunerExitException(Exception):
    """Ends a search for a batch size or a learning rate; caught and never raised."""


class LightningEnum(StrEnum):
    """Members are strings, and equal theirs in any case."""


class Interval(LightningEnum):
    """When a Timer looks at the clock."""

    step = "step"
    epoch = "epoch"

    def __str__(self) -> str:
        return str(self.value)


@runtime_checkable
class Steppable(Protocol):
    """What has a ``step``."""

    def step(self, closure: Any = None) -> Any:
        """Take a step."""


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """What has the methods of an optimizer."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state."""


def _AcceleratorConnector(**arguments: Any) -> Engine:
    """Return what a Trainer with such arguments would run on, as ``trainer._accelerator_connector`` answers it.

    Args:
        arguments: ``accelerator``, ``strategy``, ``devices``, ``num_nodes``, ``precision``, ``plugins`` and
            ``sync_batchnorm``, as the Trainer takes them.
    """
    return build_engine(**{name: value for name, value in arguments.items() if name not in _DECIDED_ELSEWHERE})


_DECIDED_ELSEWHERE = ("benchmark", "deterministic", "use_distributed_sampler")


def is_cuda_available() -> bool:
    """Return whether CUDA can be used."""
    return torch.cuda.is_available()


def _distributed_is_initialized() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_picklable(obj: object) -> bool:
    """Return whether ``obj`` can be pickled."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def get_init_args(frame: types.FrameType) -> dict[str, Any]:
    """Return the arguments of the ``__init__`` that runs in ``frame``, with those caught by ``**kwargs``.

    Args:
        frame: Often ``inspect.currentframe()``.
    """
    if "__class__" not in frame.f_locals:
        return {}
    return frame_arguments(frame)


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many loader workers each process of this machine may have: the cores are shared, one stays free.

    Args:
        local_world_size: Processes of this machine, >= 1.
    """
    if local_world_size < 1:
        raise ValueError(f"local_world_size must be >= 1, received {local_world_size}. Use 1 for one process.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_world_size - 1)


def convert_tensors_to_scalars(data: Any) -> Any:
    """Return ``data`` with a number in the place of each tensor of one element.

    Raises:
        ValueError: A tensor of several elements.
    """
    return apply_to_collection(data, torch.Tensor, lambda tensor: to_numbers({"": tensor})[""])


def recursive_detach(in_dict: Any, to_cpu: bool = False) -> Any:
    """Return ``in_dict`` with its tensors detached.

    Args:
        in_dict: Any collection.
        to_cpu: Whether to copy them to the CPU too.
    """
    return apply_to_collection(
        in_dict, torch.Tensor, lambda tensor: tensor.detach().cpu() if to_cpu else tensor.detach()
    )


def is_oom_error(exception: BaseException) -> bool:
    """Return whether the exception says that the memory of a device or of the machine is full."""
    if isinstance(exception, torch.cuda.OutOfMemoryError):
        return True
    text = str(exception)
    return isinstance(exception, RuntimeError) and any(
        part in text
        for part in ("CUDA out of memory", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED", "can't allocate memory")
    )


def garbage_collection_cuda() -> None:
    """Free what can be freed on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lightning_hasattr(model: Any, attribute: str) -> bool:
    """Return whether the module, its ``hparams`` or its data module has ``attribute``."""
    return next(_holders(model, attribute), None) is not None


def lightning_getattr(model: Any, attribute: str) -> Any:
    """Return the attribute from the module, its ``hparams`` or its data module; the last that has it wins.

    Raises:
        AttributeError: None of them has it.
    """
    holders = list(_holders(model, attribute))
    if not holders:
        raise AttributeError(f"{attribute!r} is neither in the module nor in its hparams nor in its data module.")
    holder = holders[-1]
    return holder[attribute] if isinstance(holder, dict) else getattr(holder, attribute)


def lightning_setattr(model: Any, attribute: str, value: Any) -> None:
    """Set the attribute wherever it is: in the module, its ``hparams`` and its data module.

    Raises:
        AttributeError: None of them has it.
    """
    holders = list(_holders(model, attribute))
    if not holders:
        raise AttributeError(f"{attribute!r} is neither in the module nor in its hparams nor in its data module.")
    for holder in holders:
        if isinstance(holder, dict):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)


def _holders(model: Any, attribute: str) -> Iterator[Any]:
    if hasattr(model, attribute):
        yield model
    hparams = getattr(model, "hparams", None)
    if isinstance(hparams, dict) and attribute in hparams:
        yield hparams
    datamodule = getattr(getattr(model, "_trainer", None), "datamodule", None)
    if datamodule is not None and hasattr(datamodule, attribute):
        yield datamodule


def load_hparams_from_yaml(config_yaml: str | os.PathLike[str], use_omegaconf: bool = True) -> dict[str, Any]:
    """Return the hyper-parameters in a YAML file; an empty dict when there is no such file.

    Args:
        config_yaml: The path.
        use_omegaconf: Without effect: plain values come back.
    """
    return read_hparams_file(config_yaml) if os.path.exists(config_yaml) else {}


def save_hparams_to_yaml(config_yaml: str | os.PathLike[str], hparams: Any, use_omegaconf: bool = True) -> None:
    """Write hyper-parameters into a YAML file, those that YAML can hold.

    Args:
        config_yaml: The path; the file is called ``hparams.yaml`` by convention.
        hparams: A dict or a namespace.
        use_omegaconf: Without effect: plain values are written.
    """
    import yaml

    values = dict(hparams) if isinstance(hparams, Mapping) else vars(hparams)
    with open(config_yaml, "w", newline="") as file:
        yaml.safe_dump({key: _plain(value) for key, value in values.items()}, file)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)
