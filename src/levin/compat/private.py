"""Private helpers of Lightning's that released packages import, each named with one that does."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch

from levin.checkpoint import CheckpointIO, TorchCheckpointIO
from levin.loggers.utilities import flatten
from levin.module import LightningModule
from levin.strategies.sharding import make_weights
from levin.trainer.compiled import is_compiled, to_uncompiled
from levin.utilities.types import PathLike, StateDict


class _NotYetLoadedTensor:
    """For type hints and ``isinstance``: what :func:`_lazy_load` gives are tensors, read by the system when used (litgpt)."""


def _lazy_load(filename: str | os.PathLike[str]) -> Any:
    """Return the checkpoint in a local file, whose tensors take no memory until they are used (litgpt)."""
    return torch.load(filename, map_location="cpu", mmap=True, weights_only=True)


def _materialize_meta_tensors(module: torch.nn.Module, device: torch.device) -> None:
    """Give whatever is on the meta device memory and its first values (litgpt)."""
    for child in list(module.modules()):
        make_weights(child, device)


def _flatten_dict(params: Mapping[str, object], delimiter: str = "/", parent_key: str = "") -> dict[str, object]:
    """Return nested hyper-parameters as one flat dict (anemoi-training).

    Example:
        >>> _flatten_dict({"model": {"width": 8}}, delimiter=".")
        {'model.width': 8}
    """
    return flatten({parent_key: params} if parent_key else params, delimiter)


def _sanitize_callable_params(params: Mapping[str, object]) -> dict[str, object]:
    """Return ``params`` with what functions without arguments give, or the names of the others, in their place (nemo).

    Example:
        >>> _sanitize_callable_params({"width": lambda: 8, "layer": torch.nn.Linear})
        {'width': 8, 'layer': 'Linear'}
    """
    return {key: _called(value) if callable(value) else value for key, value in params.items()}


def _called(function: Callable[..., object]) -> object:
    name: str = getattr(function, "__name__", type(function).__name__)
    try:
        result = function()
    except Exception:  # it takes arguments, or is not meant to be called: its name says what it is
        return name
    return name if callable(result) else result


def is_param_in_hook_signature(
    hook_fx: Callable[..., object], param: str, explicit: bool = False, min_args: Optional[int] = None
) -> bool:
    """Return whether a method takes an argument (lightning-bolts).

    Args:
        hook_fx: The method.
        param: Name of the argument.
        explicit: Whether it must be named, so that ``*args`` does not count.
        min_args: A method with as many arguments besides ``self`` counts as well.
    """
    spec = inspect.getfullargspec(inspect.unwrap(hook_fx))
    has_enough = min_args is not None and len(spec.args) - 1 >= min_args
    return param in spec.args or has_enough or (not explicit and spec.varargs is not None)


def _is_dir(fs: Any, path: str | os.PathLike[str], strict: bool = False) -> bool:
    """Return whether a path is a folder of a file system of fsspec (sheeprl)."""
    return bool(fs.isdir(os.fspath(path)))


def _maybe_unwrap_optimized(model: object) -> LightningModule:
    """Return the LightningModule inside of what ``torch.compile`` may have wrapped (viscy)."""
    if is_compiled(model):
        return to_uncompiled(model)
    if not isinstance(model, LightningModule):
        raise TypeError(f"model must be a LightningModule, compiled or not, received {type(model).__name__}.")
    return model


def _convert_fp_tensor(tensor: torch.Tensor, dst_type: torch.dtype) -> torch.Tensor:
    """Return a tensor of numbers with a point in another format, others as they are (nemo)."""
    return tensor.to(dst_type) if torch.is_floating_point(tensor) else tensor


@contextmanager
def _jit_is_scripting() -> Iterator[None]:
    """Do nothing: levin's properties need no care while torch looks at them (nemo)."""
    yield


class _WrappingCheckpointIO(CheckpointIO):
    """Does what another CheckpointIO does; to be subclassed (nemo).

    Args:
        checkpoint_io: The other one; torch's files by default.
    """

    def __init__(self, checkpoint_io: Optional[CheckpointIO] = None) -> None:
        self.checkpoint_io: CheckpointIO = checkpoint_io or TorchCheckpointIO()

    def save_checkpoint(self, checkpoint: StateDict, path: PathLike, storage_options: Any | None = None) -> None:
        """Save ``checkpoint`` under ``path``."""
        self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(
        self, path: PathLike, map_location: Any | None = None, weights_only: bool | None = None
    ) -> StateDict:
        """Return the checkpoint that was saved under ``path``."""
        return self.checkpoint_io.load_checkpoint(path, map_location, weights_only)

    def remove_checkpoint(self, path: PathLike) -> None:
        """Remove the checkpoint under ``path``."""
        self.checkpoint_io.remove_checkpoint(path)
