"""Small public helpers of Lightning's that packages import and that nothing of levin's own needs."""

from __future__ import annotations

import functools
import importlib
import math
import os
import pickle
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, Union, runtime_checkable

import torch
import torch.distributed
from lightning_utilities.core.enums import StrEnum
from packaging.version import Version
from torch.utils.data import IterableDataset

from levin.accelerators import Accelerator, CPUAccelerator
from levin.checkpoint.layout import COMPATIBLE_VERSION
from levin.checkpoint.migrate import MIGRATIONS
from levin.data.loaders import known_length
from levin.engine import Engine, build_engine
from levin.precision import DoublePrecision, Precision
from levin.strategies import Strategy
from levin.utilities.collections import apply_to_collection
from levin.utilities.filesystem import is_local
from levin.utilities.move import move_data_to_device
from levin.utilities.numbers import to_numbers
from levin.utilities.packages import require_package
from levin.utilities.processors import count_processors
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.types import StateDict

FLOAT16_EPSILON: float = float(torch.finfo(torch.float16).eps)
FLOAT32_EPSILON: float = float(torch.finfo(torch.float32).eps)
FLOAT64_EPSILON: float = float(torch.finfo(torch.float64).eps)
_KINETO_AVAILABLE: bool = torch.profiler.kineto_available()
_IS_WINDOWS: bool = sys.platform == "win32"
_OMEGACONF_AVAILABLE: bool = find_spec("omegaconf") is not None
_BITSANDBYTES_AVAILABLE: bool = find_spec("bitsandbytes") is not None
_EVALUATE_OUTPUT = list[Mapping[str, float]]
_OUT_DICT = dict[str, torch.Tensor]
_PREDICT_OUTPUT = Union[list[Any], list[list[Any]]]


class _TunerExitException(Exception):
    """Ends a search for a batch size or a learning rate; caught and never raised."""


class LightningEnum(StrEnum):
    """Members are strings, and equal theirs in any case."""


class Interval(LightningEnum):
    """When a Timer looks at the clock."""

    step = "step"
    epoch = "epoch"


@runtime_checkable
class Steppable(Protocol):
    """What has a ``step``."""

    def step(self, closure: object = None) -> Any:
        """Take a step."""


@runtime_checkable
class Optimizable(Steppable, Protocol):
    """What has the methods of an optimizer."""

    def state_dict(self) -> StateDict:
        """Return the state."""

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take up a state."""


class _AcceleratorConnector:
    """Says what a Trainer would run on. scvi-tools and pina-mathlab make one of these and read its flags.

    Args:
        devices: As the Trainer takes them.
        accelerator: As the Trainer takes it.
        arguments: ``strategy``, ``num_nodes``, ``precision``, ``plugins`` and ``sync_batchnorm``, as the Trainer takes them.
    """

    def __init__(
        self, devices: int | str | list[int] = "auto", accelerator: str | Accelerator = "auto", **arguments: Any
    ) -> None:
        chosen = {name: value for name, value in arguments.items() if name not in _DECIDED_ELSEWHERE}
        self._engine: Engine = build_engine(accelerator=accelerator, devices=devices, **chosen)
        self._accelerator_flag: str | Accelerator = self._engine.accelerator.name()
        if isinstance(accelerator, Accelerator):
            self._accelerator_flag = accelerator
        self._parallel_devices: list[torch.device] = list(self._engine.parallel_devices)
        on_cpu = isinstance(self._engine.accelerator, CPUAccelerator)
        self._devices_flag: int | list[int | None] = (
            len(self._parallel_devices) if on_cpu else [device.index for device in self._parallel_devices]
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def _check_and_init_precision(self) -> Precision:
        """Return the precision; nequip puts a function of its own in the place of this, which levin does not call."""
        return self._engine.precision


_DECIDED_ELSEWHERE = ("benchmark", "deterministic", "use_distributed_sampler")


def is_picklable(obj: object) -> bool:
    """Return whether ``obj`` can be pickled."""
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, RuntimeError, TypeError):
        return False
    return True


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return how many loader workers each process of this machine may have: the cores are shared, one stays free.

    Args:
        local_world_size: Processes of this machine, >= 1.
    """
    if local_world_size < 1:
        raise ValueError(f"local_world_size must be >= 1, received {local_world_size}. Use 1 for one process.")
    return max(1, count_processors() // local_world_size - 1)


def convert_tensors_to_scalars(data: object) -> Any:
    """Return ``data`` with a number in the place of each tensor of one element.

    Raises:
        ValueError: A tensor of several elements.
    """
    return apply_to_collection(data, torch.Tensor, lambda tensor: to_numbers({"": tensor})[""])


def convert_to_tensors(data: object, device: Union[str, int, torch.device]) -> Any:
    """Return ``data`` with its numbers and arrays as tensors, on ``device``: whole numbers of 32 bits, truth values of 8."""
    import numpy as np

    for kind, dtype in ((bool, torch.uint8), (int, torch.int32), (float, torch.float32)):
        data = apply_to_collection(data, kind, functools.partial(torch.tensor, dtype=dtype))
    return move_data_to_device(apply_to_collection(data, np.ndarray, torch.from_numpy), torch.device(device))


def recursive_detach(in_dict: object, to_cpu: bool = False) -> Any:
    """Return ``in_dict`` with its tensors detached.

    Args:
        in_dict: Any collection.
        to_cpu: Whether to copy them to the CPU too.
    """
    return apply_to_collection(
        in_dict, torch.Tensor, lambda tensor: tensor.detach().cpu() if to_cpu else tensor.detach()
    )


def is_cuda_out_of_memory(exception: BaseException) -> bool:
    """Return whether the exception says that the memory of a GPU is full."""
    return _says(exception, "CUDA out of memory")


def is_cudnn_snafu(exception: BaseException) -> bool:
    """Return whether the exception is what cuDNN makes of a full memory."""
    return _says(exception, "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")


def is_out_of_cpu_memory(exception: BaseException) -> bool:
    """Return whether the exception says that the memory of the machine is full."""
    return _says(exception, "DefaultCPUAllocator: can't allocate memory")


def _says(exception: BaseException, text: str) -> bool:
    return isinstance(exception, RuntimeError) and len(exception.args) == 1 and text in str(exception)


def get_cpu_stats() -> dict[str, Any]:
    """Return the load of processor, memory and swap in percent."""
    return CPUAccelerator().get_device_stats("cpu")


def sized_len(dataloader: object) -> int | None:
    """Return the length of a loader, None if it has none."""
    length = known_length(dataloader)
    return int(length) if math.isfinite(length) else None


def has_iterable_dataset(dataloader: object) -> bool:
    """Return whether a loader reads an IterableDataset."""
    return isinstance(getattr(dataloader, "dataset", None), IterableDataset)


def has_len_all_ranks(
    dataloader: object, strategy: Strategy, allow_zero_length_dataloader_with_multiple_devices: bool = False
) -> bool:
    """Return whether a loader has a length that every rank can work with.

    Args:
        dataloader: The loader of this rank.
        strategy: Knows the other ranks.
        allow_zero_length_dataloader_with_multiple_devices: Whether a rank may have no batch where others have some.

    Raises:
        RuntimeError: It has none here, some on another rank, and that is not allowed.
    """
    length = sized_len(dataloader)
    if length is None:
        return False
    total = int(strategy.reduce(torch.tensor(length, device=strategy.root_device), reduce_op="sum"))
    if total == 0:
        rank_zero_warn(f"`{type(dataloader).__name__}` has no batches on any rank. Is that what you want?")
    elif length == 0:
        if not allow_zero_length_dataloader_with_multiple_devices:
            raise RuntimeError(
                f"`{type(dataloader).__name__}` has no batches on this rank and {total} on the others. Give each rank"
                " some, or set `allow_zero_length_dataloader_with_multiple_devices` of the data module to True."
            )
        rank_zero_warn(f"`{type(dataloader).__name__}` has no batches on one rank.")
    return True


def is_shared_filesystem(strategy: Strategy, path: str | os.PathLike[str] | None = None, timeout: int = 3) -> bool:
    """Return whether all ranks see the files of a folder.

    Args:
        strategy: Knows the other ranks.
        path: The folder, by default the present one; addresses of other file systems are shared.
        timeout: Seconds that a file of rank 0 has to appear on the others.
    """
    folder = os.getcwd() if path is None else os.fspath(path)
    if not is_local(folder) or strategy.world_size == 1:
        return True
    marker = strategy.broadcast(os.path.join(folder, f".shared-{uuid.uuid4().hex}"))
    if strategy.is_global_zero:
        Path(marker).touch()
    strategy.barrier()
    end = time.monotonic() + timeout
    while not (is_seen := os.path.exists(marker)) and time.monotonic() < end:
        time.sleep(0.05)
    is_shared = strategy.reduce_boolean_decision(is_seen, all=True)
    if strategy.is_global_zero:
        os.remove(marker)
    return is_shared


def get_torchvision_model(model_name: str, **kwargs: Any) -> torch.nn.Module:
    """Return a model of torchvision by its name.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    require_package("torchvision", "`get_torchvision_model`")
    models: Any = importlib.import_module("torchvision.models")
    model: torch.nn.Module = models.get_model(model_name, **kwargs)
    return model


def merge_dicts(
    dicts: Sequence[Mapping[str, float]],
    agg_key_funcs: Mapping[str, Callable[[Sequence[float]], float]] | None = None,
    default_func: Callable[[Sequence[float]], float] = statistics.fmean,
) -> dict[str, float]:
    """Return one dict with the values of several, those of one key made one by a function.

    Args:
        dicts: The dicts.
        agg_key_funcs: The function of a key.
        default_func: The function of all other keys.

    Example:
        >>> merge_dicts([{"a": 1, "b": 3}, {"a": 3}], {"b": max})
        {'a': 2.0, 'b': 3}
    """
    functions = agg_key_funcs or {}
    keys = dict.fromkeys(key for each in dicts for key in each)
    return {key: functions.get(key, default_func)([each[key] for each in dicts if key in each]) for key in keys}


def migrate_checkpoint(
    checkpoint: StateDict, target_version: str | None = None
) -> tuple[StateDict, dict[str, list[str]]]:
    """Bring a checkpoint of an older version to the present layout, in place.

    Args:
        checkpoint: What is in the file.
        target_version: Go no further than the layout of this version.

    Returns:
        The checkpoint, and by version what was done.
    """
    written, done = checkpoint["pytorch-lightning_version"], {}
    for version, steps in MIGRATIONS:
        if Version(written) < Version(version) <= Version(target_version or version):
            for step in steps:
                step(checkpoint)
            done[version] = [step.__name__ for step in steps]
    if Version(written) < Version(COMPATIBLE_VERSION):
        checkpoint.setdefault("legacy_pytorch-lightning_version", written)
        checkpoint["pytorch-lightning_version"] = COMPATIBLE_VERSION
    return checkpoint, done


class LightningDoublePrecisionModule(torch.nn.Module):
    """Calls the steps of a module with floating tensors of double precision.

    Args:
        pl_module: The module, whose weights are double already.
    """

    def __init__(self, pl_module: torch.nn.Module) -> None:
        super().__init__()
        self.module: torch.nn.Module = pl_module

    def _call(self, name: str, *args: object, **kwargs: object) -> object:
        convert = DoublePrecision().convert_input
        return getattr(self.module, name)(*convert(args), **convert(kwargs))


for _name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
    setattr(LightningDoublePrecisionModule, _name, functools.partialmethod(LightningDoublePrecisionModule._call, _name))
