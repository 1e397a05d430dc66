"""Private helpers of Lightning's that released packages import, each named with one that does."""

from __future__ import annotations

import inspect
import logging
import os
from abc import ABCMeta
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Optional, Union

import torch

from levin.callbacks import ModelCheckpoint
from levin.checkpoint import CheckpointIO, TorchCheckpointIO
from levin.counters import EvaluationLoop
from levin.environments import ClusterEnvironment
from levin.launchers import MultiProcessingLauncher, SubprocessLauncher
from levin.loggers.uploads import new_checkpoints
from levin.loggers.utilities import flatten
from levin.module import LightningModule
from levin.precision import Precision
from levin.protocols import Trainer
from levin.strategies import LayerSync, ParallelStrategy
from levin.strategies.sharding import WeightMaker
from levin.trainer.compiled import is_compiled, to_uncompiled
from levin.trainer.results_table import print_results
from levin.utilities.interactive import is_interactive
from levin.utilities.registry import Registry
from levin.utilities.states import RunningStage, TrainerFn
from levin.utilities.types import PathLike, StateDict

_logger = logging.getLogger("lightning.pytorch")
"""Gets levin's lines too, which come from a logger below it (nemo)."""
_IS_INTERACTIVE: bool = is_interactive()
"""Whether a person sits at a prompt (nequip)."""
_PLUGIN_INPUT = Union[Precision, ClusterEnvironment, CheckpointIO, LayerSync, str]
"""What ``plugins`` takes (nemo)."""


class _NotYetLoadedTensor:
    """For type hints and ``isinstance``: what :func:`_lazy_load` gives are tensors, read by the system when used (litgpt)."""


def _scan_checkpoints(
    checkpoint_callback: ModelCheckpoint, logged_model_time: dict[str, float]
) -> list[tuple[float, str, Optional[float], str]]:
    """Return time, path, score and tag of the files that a logger does not have yet, oldest first (dvclive)."""
    ranked = checkpoint_callback.best_k_models
    found = new_checkpoints(checkpoint_callback, logged_model_time)
    return [(file.time, file.path, file.score, "best_k" if file.path in ranked else file.tag) for file in found]


def _get_short_description(component: object) -> Optional[str]:
    """Return the first line of a documentation, None where there is none (scprint)."""
    return inspect.cleandoc(component.__doc__ or "").partition("\n")[0] or None


def _lazy_load(filename: str | os.PathLike[str]) -> Any:
    """Return the checkpoint in a local file, whose tensors take no memory until they are used (litgpt)."""
    return torch.load(filename, map_location="cpu", mmap=True, weights_only=True)


def _materialize_meta_tensors(module: torch.nn.Module, device: torch.device) -> None:
    """Give whatever is on the meta device memory and its first values (litgpt)."""
    make_weights = WeightMaker(module, device)
    for child in list(module.modules()):
        make_weights(child)


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


def _call_lightning_module_hook(
    trainer: Trainer, hook_name: str, *args: object, pl_module: Optional[LightningModule] = None, **kwargs: object
) -> Any:
    """Return what a hook of the module returns, None where it has none of that name (nemo)."""
    hook = getattr(trainer.lightning_module if pl_module is None else pl_module, hook_name, None)
    return hook(*args, **kwargs) if callable(hook) else None


def _register_classes(registry: Registry[Any], method: str, module: ModuleType, parent: type) -> None:
    """Let the subclasses of ``parent`` in a module that have such a method of their own enter a registry (nequip).

    Args:
        registry: Where to.
        method: Name of the class method that does it.
        module: Where the classes are looked for.
        parent: Their base.
    """
    for found in vars(module).values():
        bases = found.__mro__ if isinstance(found, type) else ()
        if parent in bases and any(method in vars(base) for base in bases[: bases.index(parent)]):
            getattr(found, method)(registry)


class _AnyOfKind(ABCMeta):
    """A class here that has a constructor of Lightning's: what levin makes with its own is an instance as well."""

    def __instancecheck__(cls, instance: object) -> bool:
        return (
            isinstance(instance, cls.__mro__[1]) if cls.__module__ == __name__ else super().__instancecheck__(instance)
        )


class _MultiProcessingLauncher(MultiProcessingLauncher, metaclass=_AnyOfKind):
    """For a strategy that makes its launcher itself, in ``_configure_launcher`` (RF-DETR, lightning-habana).

    Args:
        strategy: Whose processes they are.
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``.
    """

    def __init__(self, strategy: ParallelStrategy, start_method: str = "spawn") -> None:
        super().__init__(strategy.known_environment, strategy.num_processes, start_method, strategy.enter_process)


class _SubprocessScriptLauncher(SubprocessLauncher, metaclass=_AnyOfKind):
    """The same, for a script that is started again (lightning-habana).

    Args:
        cluster_environment: Knows where rank 0 listens, and whether the processes are there already.
        num_processes: Number of processes of this machine.
        num_nodes: Number of machines.
    """

    def __init__(self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)


class _EvaluationLoop(EvaluationLoop, metaclass=_AnyOfKind):
    """May be put into the place of ``trainer.test_loop``, and shows the results as it likes (torch-uncertainty).

    Args:
        trainer: The trainer.
        trainer_fn: The method of the Trainer that it is for.
        stage: The stage that it is for.
        verbose: Without effect: the argument of ``test`` or ``validate`` counts.
        inference_mode: Without effect: the argument of the Trainer counts.
    """

    def __init__(
        self,
        trainer: Trainer,
        trainer_fn: TrainerFn,
        stage: RunningStage,
        verbose: bool = True,
        inference_mode: bool = True,
    ) -> None:
        super().__init__()
        self.trainer: Trainer = trainer
        self.verbose: bool = verbose
        self.inference_mode: bool = inference_mode

    def print_results(self, results: list[dict[str, float]], stage: str) -> None:
        """Show what ``test`` or ``validate`` returns."""
        as_tensors = [{name: torch.tensor(value) for name, value in result.items()} for result in results]
        self._print_results(as_tensors, stage)

    @staticmethod
    def _print_results(results: list[dict[str, torch.Tensor]], stage: str) -> None:
        print_results([{name: value.item() for name, value in result.items()} for result in results], stage)


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
