"""What all strategies with several processes have in common: ranks, the process group, collectives."""

from __future__ import annotations

import atexit
import faulthandler
import os
from abc import ABC
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing import get_all_start_methods
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from levin.checkpoint.io import save_tree
from levin.launchers import MultiProcessingLauncher, SubprocessLauncher
from levin.strategies import collectives
from levin.strategies.contexts import environment_variables
from levin.strategies.control_group import ControlGroup
from levin.strategies.same_module import check_same_module
from levin.strategies.strategy import Strategy
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.process_group import disconnect_processes, is_connected
from levin.utilities.processors import count_processors
from levin.utilities.rank_zero import rank_zero_info, set_rank
from levin.utilities.seed import reset_seed
from levin.utilities.types import Group, StateDict, Tree

if TYPE_CHECKING:
    from levin.accelerators.accelerator import Accelerator
    from levin.checkpoint.io import CheckpointIO
    from levin.environments.environment import ClusterEnvironment
    from levin.precision.precision import Precision

T = TypeVar("T")

DEFAULT_TIMEOUT = timedelta(minutes=30)
DEFAULT_STEP_TIMEOUT = timedelta(minutes=10)
START_METHODS = ("popen", "spawn", "fork", "forkserver")
UNEVEN_RULES = ("longest", "shortest", "error")
# Which of torch's transports carries tensors of which device.
_BACKENDS = {"cuda": "nccl", "cpu": "gloo"}


class ParallelStrategy(Strategy, ABC):
    """One process per device, on one or several machines, connected by torch.distributed.

    Args:
        accelerator: The hardware.
        parallel_devices: One device per process of this machine.
        cluster_environment: Who starts the processes.
        checkpoint_io: Writes and reads checkpoints.
        precision: The number format.
        precision_plugin: Another name for ``precision``.
        process_group_backend: torch.distributed's transport; NCCL on CUDA, otherwise Gloo, when None.
        timeout: How long a process waits for the others before it gives up, until its first batch is done.
        step_timeout: The same from then on. When None, 10 minutes, or ``timeout`` where another one is given.
        uneven: When an epoch of training ends for ranks with different numbers of batches. ``"longest"``: when all are
            done, those that are done earlier go on with batches that count for nothing. ``"shortest"``: when the first
            is done, with a warning about what is left out. ``"error"``: with an error.

    Raises:
        ValueError: ``timeout`` or ``uneven`` is of another form.
    """

    is_distributed = True

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision: Precision | None = None,
        precision_plugin: Precision | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = DEFAULT_TIMEOUT,
        step_timeout: timedelta | None = None,
        uneven: str = "longest",
    ) -> None:
        super().__init__(accelerator, checkpoint_io, precision, precision_plugin)
        if uneven not in UNEVEN_RULES:
            raise MisconfigurationException(
                f"uneven must be one of {', '.join(map(repr, UNEVEN_RULES))}, received {uneven!r}. "
                "Use 'longest' to train on all batches of all ranks."
            )
        self.uneven: str = uneven
        for name, value in (("timeout", timeout), ("step_timeout", step_timeout)):
            if not isinstance(value, (timedelta, type(None))) or (value is not None and value <= timedelta(0)):
                raise MisconfigurationException(
                    f"{name} must be a timedelta > 0, received {value!r}. Use datetime.timedelta(seconds=...)."
                )
        self.user_parts.environment = cluster_environment
        self.user_parts.parallel_devices = parallel_devices
        self.environment = cluster_environment
        self.parallel_devices: list[torch.device] = list(parallel_devices or [])
        self.timeout = timeout
        self.control = ControlGroup(timeout)
        self._data_control: ControlGroup | None = None
        if step_timeout is None:
            step_timeout = DEFAULT_STEP_TIMEOUT if timeout is None or timeout == DEFAULT_TIMEOUT else timeout
        self.step_timeout: timedelta = step_timeout
        self._process_group_backend = process_group_backend
        # Set in processes that a launcher of ours started without going through the environment.
        self._started_local_rank: int | None = None

    def take_devices(self, parallel_devices: list[torch.device]) -> None:
        """Take one device per process of this machine."""
        self.parallel_devices = list(parallel_devices)
        self.set_world_ranks()

    def launch_by(self, start_method: str) -> None:
        """Set the launcher.

        Args:
            start_method: ``"popen"`` starts the script again; another one starts processes that run one function.
        """
        environment = self.known_environment
        if start_method == "popen":
            self._launcher = SubprocessLauncher(environment, self.num_processes, self.num_nodes)
        else:
            self._launcher = MultiProcessingLauncher(environment, self.num_processes, start_method, self.enter_process)

    @property
    def known_environment(self) -> ClusterEnvironment:
        """The cluster environment.

        Raises:
            RuntimeError: None was given and no engine has chosen one yet.
        """
        if self.environment is None:
            raise RuntimeError(f"{type(self).__name__} has no cluster environment. Pass it to Trainer(strategy=...).")
        return self.environment

    # Where this process stands

    @property
    def num_processes(self) -> int:
        """Number of processes of this machine."""
        return len(self.parallel_devices)

    @property
    @override
    def root_device(self) -> torch.device:
        if not self.parallel_devices:
            raise RuntimeError(
                f"{type(self).__name__} has no devices yet. Pass it to Trainer(strategy=...), or give it parallel_devices=..."
            )
        return self.parallel_devices[self.local_rank]

    @property
    @override
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    @property
    @override
    def world_size(self) -> int:
        return self.environment.world_size() if self.environment is not None else 1

    @property
    @override
    def global_rank(self) -> int:
        return self.environment.global_rank() if self.environment is not None else 0

    @property
    @override
    def local_rank(self) -> int:
        if self._started_local_rank is not None:
            return self._started_local_rank
        return self.environment.local_rank() if self.environment is not None else 0

    @property
    @override
    def node_rank(self) -> int:
        return self.environment.node_rank() if self.environment is not None else 0

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """``num_replicas`` and ``rank`` for samplers."""
        return {"num_replicas": self.data_parallel.size, "rank": self.data_parallel.rank}

    @property
    def process_group_backend(self) -> str:
        """torch.distributed's transport."""
        return self._process_group_backend or _BACKENDS.get(self.root_device.type, "gloo")

    @property
    def supports_inference_mode(self) -> bool:  # type: ignore[override]  # a constant in single-process strategies
        """Whether the transport can send tensors made under ``torch.inference_mode``: Gloo cannot."""
        return "gloo" not in self.process_group_backend

    def set_world_ranks(self) -> None:
        """Tell the environment and rank-zero functions where this process stands."""
        if self.environment is None:
            return
        self.environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
        self.environment.set_world_size(self.num_nodes * self.num_processes)
        set_rank(self.environment.global_rank())

    def enter_process(self, local_rank: int) -> None:
        """Take note that this process was started as number ``local_rank`` of its machine."""
        self._started_local_rank = local_rank
        self.set_world_ranks()

    # From set-up to teardown

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Connect this process with the others."""
        self.set_world_ranks()
        share_processors(self.num_processes)
        connect_processes(self.known_environment, self.process_group_backend, self.timeout)
        self.control.is_closed = False
        self._data_control = None
        # All processes start from the same weights and draw the same numbers.
        reset_seed()

    def teardown(self) -> None:
        """Free the device and what was written into the process environment. The process group stays for the next run."""
        super().teardown()
        if self.environment is not None:
            self.environment.teardown()

    # Talking to the other processes

    def reduce(self, tensor: Tree, group: Group = None, reduce_op: object = "mean") -> Tree:
        """Return the tensor reduced over all processes; see :func:`levin.strategies.collectives.reduce`.

        Raises:
            ValueError: They have different shapes or types, or another ``reduce_op``.
        """
        if self.control.is_closed:
            return tensor
        control = self.control if group is None else None
        return collectives.reduce(tensor, group, reduce_op, self._transport_device, True, control)

    def all_gather(self, tensor: Tree, group: Group = None, sync_grads: bool = False) -> Tree:
        """Return the tensors of all processes; see :func:`levin.strategies.collectives.all_gather`.

        Raises:
            ValueError: They have different shapes or types.
        """
        is_alone = self.control.is_closed
        if not is_alone:
            collectives.check_same_shapes(tensor, group, control=self.control if group is None else None)
        return collectives.all_gather(tensor, group, sync_grads, self._transport_device, is_alone)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return the object of rank ``src`` in every process; before the processes are connected, ``obj``."""
        if not is_connected() or self.control.is_closed:
            return obj
        return collectives.broadcast_object(obj, src=src, device=self._transport_device)

    def barrier(self, name: str | None = None) -> None:
        """Wait until all processes are here; before they are connected, return at once."""
        if not is_connected() or self.control.is_closed:
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            self.meet("a barrier")

    @override
    def meet(self, what: str) -> None:
        if is_connected():
            self.control.exchange([], what)

    def check_same_module(self, module: Module, for_training: bool = True) -> None:
        """Raise in all processes where a module, which is to be wrapped or cut, is not the same in all of them."""
        if is_connected():
            check_same_module(module, self.control, for_training)

    @property
    def data_control(self) -> ControlGroup:
        """Like :attr:`control`, between the processes of :attr:`data_parallel`."""
        ranks = self.data_parallel.ranks
        if ranks is None:
            return self.control
        if self._data_control is None:
            self._data_control = ControlGroup(self.timeout, ranks)
            self._data_control.is_closed = self.control.is_closed
        return self._data_control

    def num_collectives(self) -> int:
        """Return how many collectives this process has taken part in with those that see different data."""
        return collectives.num_collectives(self.data_parallel.group)

    @override
    def abandon_peers(self) -> None:
        self.control.is_closed = True
        if self._data_control is not None:
            self._data_control.is_closed = True

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        if self.control.is_closed:
            return decision
        return collectives.agree(decision, all_must=all, device=self._transport_device)

    @property
    def _transport_device(self) -> torch.device | None:
        # Gloo carries tensors of any device; the others only those of their own.
        return None if self.process_group_backend == "gloo" else self.root_device

    # State

    def save_checkpoint(
        self, checkpoint: dict[str, object], filepath: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        """Write a checkpoint; all processes call this, and all know when it has failed.

        A folder that all of them write into has the name that rank 0 gives it.

        Raises:
            Exception: In the process that failed, what the CheckpointIO raised.
            RuntimeError: In the others, that it did.
        """
        is_alone = self.control.is_closed
        if self.checkpoint_io.is_collective:
            filepath = self.broadcast(filepath)

        def save() -> None:
            save_tree(self.checkpoint_io, checkpoint, filepath, storage_options, self.is_global_zero, is_alone)

        self._do_and_tell(save, f"Saving {os.fspath(filepath)!r}")

    def finish_saves(self) -> None:
        """Wait for what is being saved in the background; all processes call this, and all know when it has failed."""
        self._do_and_tell(super().finish_saves, "Saving in the background")

    def _do_and_tell(self, function: Callable[[], None], what: str) -> None:
        """Call ``function`` and raise in all processes if it has raised in one."""
        error: Exception | None = None
        try:
            function()
        except Exception as raised:  # raised again once all processes know
            error = raised
        failed = [row[0] for row in self.control.exchange([float(error is not None)], "a save")]
        if error is not None:
            raise error
        if any(failed):
            raise RuntimeError(f"{what} failed on rank {failed.index(1.0)}, which tells why.")

    def optimizer_state(self, optimizer: Optimizer, module: Module | None = None) -> StateDict:
        """Return the state of an optimizer; parts that torch's ZeroRedundancyOptimizer spread are gathered on rank 0."""
        consolidate = getattr(optimizer, "consolidate_state_dict", None)
        if consolidate is None:
            return super().optimizer_state(optimizer, module)
        consolidate()
        return optimizer.state_dict() if self.is_global_zero else {}


def check_start_method(start_method: str) -> None:
    """Raise when processes cannot be started in this way on this machine.

    Args:
        start_method: See :meth:`ParallelStrategy.launch_by`.

    Raises:
        ValueError: It is unknown, or the machine has no such thing.
    """
    if start_method not in START_METHODS:
        raise MisconfigurationException(
            f"start_method must be one of {', '.join(START_METHODS)}, received {start_method!r}. "
            "Use 'popen' for scripts and 'fork' for notebooks."
        )
    if start_method == "popen":
        return
    if start_method not in get_all_start_methods():
        raise MisconfigurationException(
            f"start_method={start_method!r} is not supported on this machine, which has {get_all_start_methods()}. "
            "Use 'spawn', or strategy='ddp_spawn'."
        )


def connect_processes(environment: ClusterEnvironment, backend: str, timeout: timedelta | None) -> None:
    """Make the process group; once there is one, do nothing.

    Args:
        environment: Knows the rank of this process and where rank 0 listens.
        backend: torch.distributed's transport.
        timeout: How long a process waits for the others; torch's default when None.

    Raises:
        RuntimeError: torch was built without torch.distributed, or the processes cannot connect.
    """
    if not dist.is_available():
        raise RuntimeError(
            "Several processes need torch.distributed, which this torch was built without. "
            "Use devices=1, or install another build of torch."
        )
    rank, world_size = environment.global_rank(), environment.world_size()
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RuntimeError(
                f"This process shall be rank {rank} of {world_size}, but it is rank {dist.get_rank()} of "
                f"{dist.get_world_size()} in the process group that it has. Call torch.distributed.destroy_process_group() "
                "before, or use the same devices and num_nodes."
            )
        return
    # The flight recorder: torch keeps the last collectives in memory, and NCCL writes them to a file when one is late.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # Gloo ends a process where ranks send tensors of different sizes to each other: then it says where it was.
    if not faulthandler.is_enabled():
        with suppress(OSError, AttributeError):  # stderr is no file
            faulthandler.enable()
    with environment_variables(MASTER_ADDR=environment.main_address, MASTER_PORT=str(environment.main_port)):
        store = environment.store(timeout)
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, store=store)
    # torch warns, and NCCL may hang, when a process leaves without this.
    atexit.register(disconnect_processes)
    rank_zero_info(f"{world_size} processes are connected through {backend}.")


def share_processors(num_processes: int) -> None:
    """Give each process of this machine its part of the processors, unless ``OMP_NUM_THREADS`` says how many.

    Args:
        num_processes: Number of processes of this machine.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    num_threads = max(1, count_processors() // num_processes)
    torch.set_num_threads(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
