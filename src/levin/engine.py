"""From the user's strings and objects to the parts that run: hardware, strategy, number format, environment.

The choices are made in this order, each checked against those before it::

    plugins      sorted by kind, one of each
    accelerator  "auto" -> tpu, mps, cuda, cpu: the first that is there
    devices      parsed by the accelerator
    environment  the user's, or the first that is detected, or LightningEnvironment
    strategy     "auto" -> one device or DDP
    precision    short forms spelled out; combinations that cannot work refused
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Optional, Union

import torch

from levin.accelerators import Accelerator, AcceleratorRegistry, CUDAAccelerator, MPSAccelerator, XLAAccelerator
from levin.checkpoint.io import CheckpointIO
from levin.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    LSFEnvironment,
    MPIEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
    XLAEnvironment,
)
from levin.launchers import MultiProcessingLauncher
from levin.launchers.script import leave_hydra_job
from levin.precision import Precision
from levin.precision.choose import check_precision_name, resolve_precision_name
from levin.strategies import LayerSync, SingleDeviceStrategy, Strategy, StrategyRegistry, TorchSyncBatchNorm
from levin.strategies.mesh import check_mesh, is_mesh, strategy_of_mesh
from levin.utilities.exceptions import MisconfigurationException, did_you_mean
from levin.utilities.interactive import is_interactive
from levin.utilities.numbers import plain_number
from levin.utilities.process_group import is_connected
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_info, rank_zero_warn, set_rank
from levin.utilities.warnings import PossibleUserWarning

_Plugin = Union[Precision, ClusterEnvironment, CheckpointIO, LayerSync]
Plugins = Optional[Union[_Plugin, list[_Plugin]]]
"""What ``plugins`` takes. Command lines and configuration files build by this type what they name."""

_DETECTED_ENVIRONMENTS: tuple[type[ClusterEnvironment], ...] = (
    TorchElasticEnvironment,
    SLURMEnvironment,
    LSFEnvironment,
    MPIEnvironment,
)


class UnavailableError(MisconfigurationException, RuntimeError):
    """The hardware that was asked for is not there. A ValueError and a RuntimeError, for those who catch either."""


class PluginTypeError(MisconfigurationException, TypeError):
    """A plugin is of no kind that levin knows. A ValueError and a TypeError, for those who catch either."""


class Engine:
    """A strategy, which holds the other parts of a run, and the devices of this machine.

    Args:
        strategy: Wraps the module and talks to the other processes.
        parallel_devices: One device per process of this machine.
    """

    def __init__(self, strategy: Strategy, parallel_devices: list[torch.device]) -> None:
        self.strategy = strategy
        self.parallel_devices = parallel_devices

    accelerator: Accelerator = reads("strategy.accelerator", "The hardware.")
    precision: Precision = reads("strategy.precision", "The number format.")
    environment: ClusterEnvironment | None = reads("strategy.environment", "Who starts the processes, if anybody.")
    layer_sync: LayerSync | None = reads(
        "strategy.layer_sync", "What makes layers aware of other processes, if anything."
    )
    num_nodes: int = reads("strategy.num_nodes", "Number of machines.")
    is_distributed: bool = reads("strategy.is_distributed", "Whether it is a strategy of several processes.")
    _parallel_devices: list[torch.device] = reads("parallel_devices", "The name by which pina-mathlab asks for them.")

    @property
    def num_devices(self) -> int:
        """Number of devices of this machine, one process each."""
        return len(self.parallel_devices)

    @property
    def device_ids(self) -> list[int]:
        """Indices of the devices; on CPU those of the processes."""
        return [position if d.index is None else d.index for position, d in enumerate(self.parallel_devices)]


@dataclass
class _Plugins:
    precision: Precision | None = None
    checkpoint_io: CheckpointIO | None = None
    environment: ClusterEnvironment | None = None
    layer_sync: LayerSync | None = None


def build_engine(
    *,
    accelerator: str | Accelerator = "auto",
    strategy: str | Strategy = "auto",
    devices: int | str | list[int] = "auto",
    num_nodes: int = 1,
    precision: str | int | None = None,
    plugins: Plugins = None,
    sync_batchnorm: bool = False,
) -> Engine:
    """Choose and check every part of a run.

    Args:
        accelerator: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"``, ``"tpu"``, ``"auto"``, another registered name, or an
            :class:`~levin.accelerators.Accelerator`.
        strategy: ``"auto"``, a registered name, the short form of a mesh (``"mesh:dp=2,tp=2"``), or a
            :class:`~levin.strategies.Strategy`.
        devices: How many, or which; ``"auto"`` for those the accelerator proposes, -1 for all.
        num_nodes: Number of machines.
        precision: ``"32-true"``, ``"64-true"``, ``"16-true"``, ``"bf16-true"``, ``"16-mixed"`` or ``"bf16-mixed"``.
        plugins: One or a list of: Precision, CheckpointIO, ClusterEnvironment, LayerSync; at most one of each.
        sync_batchnorm: Whether batch normalization works over the batches of all processes.

    Raises:
        ValueError: A value is unknown, or two of them contradict each other.
        RuntimeError: The hardware is not there (this error is a ValueError as well).
        TypeError: ``devices`` has a form that the accelerator cannot use.

    Example:
        >>> engine = build_engine(accelerator="cpu", devices=1)
        >>> engine.strategy.root_device, engine.precision.precision
        (device(type='cpu'), '32-true')
    """
    devices, num_nodes = plain_number(devices), plain_number(num_nodes)
    if not isinstance(num_nodes, int) or num_nodes < 1:
        raise MisconfigurationException(
            f"num_nodes must be an int >= 1, received {num_nodes!r}. Use 1 for a single machine."
        )
    _check_strategy(strategy)
    mesh = strategy if isinstance(strategy, str) and is_mesh(strategy) else None
    if mesh is not None:
        strategy = strategy_of_mesh(mesh)
    given_plugins = _sort_plugins(plugins, sync_batchnorm)
    if precision is not None:
        check_precision_name(precision)
    _check_conflicts(strategy, accelerator, precision, given_plugins)

    leave_hydra_job()
    chosen_accelerator = _choose_accelerator(accelerator, strategy)
    parallel_devices = _choose_devices(chosen_accelerator, devices, strategy)
    detected = _choose_environment(given_plugins, strategy, chosen_accelerator)
    chosen_strategy = _choose_strategy(strategy, chosen_accelerator, parallel_devices, num_nodes)
    if mesh is not None:
        check_mesh(mesh, len(parallel_devices) * num_nodes, len(parallel_devices), num_nodes)
    chosen_precision = given_plugins.precision or chosen_strategy.user_parts.precision
    if chosen_precision is None:
        name = resolve_precision_name("32-true" if precision is None else precision)
        chosen_precision = chosen_strategy.precision_for(name, parallel_devices[0])
    _check_combination(chosen_strategy, strategy, chosen_accelerator, parallel_devices, num_nodes, devices)

    # A single process has nobody to find; but SLURM may want it to be saved and put back in the queue.
    is_alone = isinstance(chosen_strategy, SingleDeviceStrategy) and not isinstance(detected, SLURMEnvironment)
    environment = given_plugins.environment if is_alone else detected
    chosen_strategy.assemble(
        accelerator=chosen_accelerator,
        precision=chosen_precision,
        parallel_devices=parallel_devices,
        num_nodes=int(num_nodes),
        environment=environment,
        checkpoint_io=given_plugins.checkpoint_io,
        layer_sync=given_plugins.layer_sync,
    )
    _check_processes(chosen_strategy, strategy, detected, len(parallel_devices), num_nodes, devices != "auto")
    set_rank()  # Once more, for packages that were imported since.
    return Engine(chosen_strategy, parallel_devices)


def use_deterministic(deterministic: object, benchmark: bool | None) -> None:
    """Switch torch to deterministic algorithms, and cudnn's search for the fastest ones on or off, where that is asked for."""
    if deterministic is not None:
        torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        benchmark = False if benchmark is None else benchmark
    if benchmark is not None:
        torch.backends.cudnn.benchmark = benchmark


def describe_devices(engine: Engine) -> None:
    """Print which hardware there is and which is used, and warn about a GPU that is left idle."""
    kind = "mps" if MPSAccelerator.is_available() else "cuda"
    has_gpu = MPSAccelerator.is_available() or CUDAAccelerator.is_available()
    uses_gpu = isinstance(engine.accelerator, (CUDAAccelerator, MPSAccelerator))
    has_tpu = XLAAccelerator.num_tpus() > 0
    uses_tpu = isinstance(engine.accelerator, XLAAccelerator)
    rank_zero_info(f"GPU available: {has_gpu}{f' ({kind})' if has_gpu else ''}, used: {uses_gpu}")
    rank_zero_info(f"TPU available: {has_tpu}, using: {engine.num_devices if uses_tpu else 0} TPU cores")
    if has_gpu and not uses_gpu:
        rank_zero_warn(
            "There is a GPU, and it is not used. Use `accelerator='gpu'` to run on it.", category=PossibleUserWarning
        )
    if has_tpu and not uses_tpu:
        rank_zero_warn(
            "There is a TPU, and it is not used. Use `accelerator='tpu'` to run on it.", category=PossibleUserWarning
        )


def _check_strategy(strategy: object) -> None:
    if isinstance(strategy, Strategy):
        return
    if is_mesh(strategy):
        return
    if isinstance(strategy, str) and (strategy == "auto" or strategy.lower() in StrategyRegistry):
        return
    names = ", ".join(["auto", *StrategyRegistry.available_strategies()])
    raise MisconfigurationException(
        f"strategy must be a Strategy object or one of {names}, received {strategy!r}."
        f"{did_you_mean(strategy, StrategyRegistry.available_strategies())} Use 'auto' to let levin choose."
    )


def _sort_plugins(plugins: Plugins, sync_batchnorm: bool) -> _Plugins:
    items: Iterable[object] = [] if plugins is None else plugins if isinstance(plugins, (list, tuple)) else [plugins]
    result = _Plugins()
    kinds = {
        "precision": Precision,
        "checkpoint_io": CheckpointIO,
        "environment": ClusterEnvironment,
        "layer_sync": LayerSync,
    }
    for item in items:
        field = next((name for name, kind in kinds.items() if isinstance(item, kind)), None)
        if field is None:
            raise PluginTypeError(
                "plugins must be objects of Precision, CheckpointIO, ClusterEnvironment or LayerSync, "
                f"received {item!r} of type {type(item).__name__}. Remove it, or inherit from one of these."
            )
        present = getattr(result, field)
        if present is not None:
            raise MisconfigurationException(
                f"plugins may hold one {kinds[field].__name__}, received {type(present).__name__} and "
                f"{type(item).__name__}. Keep one of them."
            )
        setattr(result, field, item)
    if sync_batchnorm:
        if result.layer_sync is not None and not isinstance(result.layer_sync, TorchSyncBatchNorm):
            raise MisconfigurationException(
                f"sync_batchnorm=True means TorchSyncBatchNorm, received the plugin {type(result.layer_sync).__name__} "
                "as well. Choose one."
            )
        result.layer_sync = result.layer_sync or TorchSyncBatchNorm()
    return result


def _check_conflicts(strategy: object, accelerator: object, precision: object, plugins: _Plugins) -> None:
    if precision is not None and plugins.precision is not None:
        raise MisconfigurationException(
            f"precision={precision!r} and the plugin {type(plugins.precision).__name__} both set the number format. "
            "Choose one."
        )
    if not isinstance(strategy, Strategy):
        return
    given = strategy.user_parts
    pairs: list[tuple[str, object, object]] = [
        ("accelerator", given.accelerator, None if accelerator == "auto" else accelerator),
        ("precision", given.precision, precision if plugins.precision is None else plugins.precision),
        ("checkpoint_io", given.checkpoint_io, plugins.checkpoint_io),
        ("cluster_environment", given.environment, plugins.environment),
    ]
    for name, inside, outside in pairs:
        if inside is not None and outside is not None:
            raise MisconfigurationException(
                f"{name} is set twice: {type(inside).__name__} in {type(strategy).__name__}({name}=...) and "
                f"{outside if isinstance(outside, (str, int)) else type(outside).__name__!s} beside the strategy. "
                "Set it in one place."
            )


def _choose_accelerator(accelerator: object, strategy: object) -> Accelerator:
    if isinstance(accelerator, Accelerator):
        return _available(accelerator)
    if not isinstance(accelerator, str) or (
        accelerator not in ("auto", "gpu") and accelerator not in AcceleratorRegistry
    ):
        names = ", ".join(["auto", "gpu", *AcceleratorRegistry])
        raise MisconfigurationException(
            f"accelerator must be an Accelerator object or one of {names}, received {accelerator!r}."
            f"{did_you_mean(accelerator, ['auto', 'gpu', *AcceleratorRegistry])} Use 'auto' to let levin choose."
        )
    if accelerator == "auto":
        if isinstance(strategy, Strategy):
            if strategy.user_parts.accelerator is not None:
                return _available(strategy.user_parts.accelerator)
            if strategy.user_parts.parallel_devices:
                return _available(_accelerator_for(strategy.user_parts.parallel_devices[0]))
        if XLAAccelerator.num_tpus():
            return AcceleratorRegistry.get("tpu")
        for name in ("mps", "cuda"):
            if AcceleratorRegistry.get_class(name).is_available():
                return AcceleratorRegistry.get(name)
        return AcceleratorRegistry.get("cpu")
    if accelerator == "gpu":
        for name in ("mps", "cuda"):
            if AcceleratorRegistry.get_class(name).is_available():
                return AcceleratorRegistry.get(name)
        raise _unavailable("gpu")
    if not AcceleratorRegistry.get_class(accelerator).is_available():
        raise _unavailable(accelerator)
    return AcceleratorRegistry.get(accelerator)


def _accelerator_for(device: torch.device) -> Accelerator:
    name = "tpu" if device.type == "xla" else device.type
    if name not in AcceleratorRegistry:
        raise MisconfigurationException(
            f"parallel_devices holds {device}, for which no accelerator is registered. Pass accelerator=..."
        )
    return AcceleratorRegistry.get(name)


def _available(accelerator: Accelerator) -> Accelerator:
    if not accelerator.is_available():
        raise _unavailable(type(accelerator).__name__)
    return accelerator


def _unavailable(name: str) -> UnavailableError:
    present = [known for known in AcceleratorRegistry if AcceleratorRegistry.get_class(known).is_available()]
    return UnavailableError(
        f"accelerator={name!r} is not available on this machine, which has {present}. "
        "Use one of these, or 'auto' to take what is there."
    )


def _choose_devices(accelerator: Accelerator, devices: object, strategy: object) -> list[torch.device]:
    if isinstance(strategy, Strategy) and strategy.user_parts.parallel_devices:
        if devices != "auto":
            raise MisconfigurationException(
                f"devices={devices!r} and {type(strategy).__name__}(parallel_devices=...) both name the devices. "
                "Set one of them."
            )
        return list(strategy.user_parts.parallel_devices)
    if devices == "auto":
        devices = accelerator.auto_device_count()
    if (isinstance(devices, (list, tuple)) and not devices) or (isinstance(devices, str) and devices.strip() == "0"):
        raise MisconfigurationException(
            f"devices must name at least one device, received {devices!r}. Use 1 or 'auto'."
        )
    found = accelerator.get_parallel_devices(accelerator.parse_devices(devices))
    if not found:
        raise MisconfigurationException(
            f"devices must name at least one device, received {devices!r}. Use 1 or 'auto'."
        )
    return found


def _choose_environment(plugins: _Plugins, strategy: object, accelerator: Accelerator) -> ClusterEnvironment:
    if plugins.environment is not None:
        return plugins.environment
    if isinstance(strategy, Strategy) and strategy.user_parts.environment is not None:
        return strategy.user_parts.environment
    for kind in _DETECTED_ENVIRONMENTS:
        if kind.detect():
            return kind()
    return XLAEnvironment() if isinstance(accelerator, XLAAccelerator) else LightningEnvironment()


def _choose_strategy(
    strategy: str | Strategy, accelerator: Accelerator, parallel_devices: list[torch.device], num_nodes: int
) -> Strategy:
    if isinstance(strategy, Strategy):
        return strategy
    name = strategy.lower()
    if name == "auto" and isinstance(accelerator, XLAAccelerator):
        name = "single_xla" if len(parallel_devices) == num_nodes == 1 else "xla"
    if name == "auto":
        if num_nodes > 1:
            name = "ddp"
        elif len(parallel_devices) == 1:
            name = "single_device"
        else:
            name = "ddp_fork" if is_interactive() else "ddp"
    if name == "single_device":
        return SingleDeviceStrategy(device=parallel_devices[0])
    return StrategyRegistry.get(name)


def _check_combination(
    chosen: Strategy,
    asked: str | Strategy,
    accelerator: Accelerator,
    parallel_devices: list[torch.device],
    num_nodes: int,
    devices: object,
) -> None:
    label = repr(asked) if isinstance(asked, str) else type(chosen).__name__
    if isinstance(accelerator, XLAAccelerator) != chosen.is_for_xla:
        raise MisconfigurationException(
            f"strategy={label} cannot be used with accelerator={accelerator.name()!r}. Use accelerator='tpu' with "
            "strategy='xla', 'xla_fsdp' or 'single_xla', and these with no other."
        )
    if chosen.is_distributed and isinstance(accelerator, MPSAccelerator):
        raise MisconfigurationException(
            f"strategy={label} cannot be used with accelerator='mps', on which processes cannot talk to each other. "
            "Use strategy='auto' with devices=1, or accelerator='cpu'."
        )
    if isinstance(chosen, SingleDeviceStrategy):
        if len(parallel_devices) > 1 or num_nodes > 1:
            raise MisconfigurationException(
                f"strategy={label} runs on one device, received devices={devices!r} and num_nodes={num_nodes}. "
                "Use devices=1 and num_nodes=1, or strategy='ddp'."
            )
        if chosen.root_device.type != parallel_devices[0].type:
            raise MisconfigurationException(
                f"{label}(device={str(chosen.root_device)!r}) does not fit the accelerator "
                f"{accelerator.name()!r}. Pass accelerator={chosen.root_device.type!r}, or strategy='auto'."
            )
        if chosen.root_device.index is not None or (isinstance(asked, Strategy) and devices == "auto"):
            parallel_devices[:] = [chosen.root_device]
        else:
            chosen.root_device = parallel_devices[0]


def _check_processes(
    chosen: Strategy,
    asked: str | Strategy,
    environment: ClusterEnvironment,
    num_devices: int,
    num_nodes: int,
    is_asked: bool,
) -> None:
    launcher = chosen.launcher
    label = repr(asked) if isinstance(asked, str) else type(chosen).__name__
    if launcher is not None and not launcher.is_interactive_compatible and is_interactive():
        raise MisconfigurationException(
            f"strategy={label} starts the script again for every process, received a Python prompt or notebook, which "
            "has none. Use strategy='ddp_notebook', or run a script."
        )
    if isinstance(launcher, MultiProcessingLauncher) and environment.creates_processes_externally:
        raise MisconfigurationException(
            f"strategy={label} starts its processes itself, received {type(environment).__name__}, in which they are "
            "there already. Use strategy='ddp'."
        )
    if chosen.global_rank >= chosen.world_size:
        raise MisconfigurationException(
            f"devices={num_devices} and num_nodes={num_nodes} make {chosen.world_size} processes, and this one would be "
            f"number {chosen.global_rank}: it is on machine {chosen.node_rank}, counted from 0 (NODE_RANK or GROUP_RANK). "
            "Set num_nodes to the number of machines, or unset these variables."
        )
    if isinstance(chosen, SingleDeviceStrategy) and (asked is chosen or asked == "single_device" or is_connected()):
        return  # one of several processes, for itself: a test, an export, a search on one rank
    # Also on one device: processes that something outside started would otherwise all do the same work unnoticed.
    try:
        environment.validate_settings(num_devices=num_devices, num_nodes=num_nodes)
    except MisconfigurationException as error:
        if not isinstance(chosen, SingleDeviceStrategy):
            raise
        if not is_asked:
            error.args = (f"{error} Or pass strategy='single_device' where this process is to work for itself.",)
            raise
        told = f"This process works for itself: {error} strategy='single_device' says that it is meant to."
        warnings.warn(told, stacklevel=5)  # by whichever rank does so
