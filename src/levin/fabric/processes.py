"""The processes of a Fabric: how they are started, which of them this one is, and what they say to each other."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from levin.accelerators import Accelerator, CPUAccelerator
from levin.checkpoint import CheckpointIO
from levin.engine import build_engine
from levin.fabric.settings import is_launched_by_command, with_environment
from levin.precision import MixedPrecision, Precision
from levin.precision.mixed import ForwardMixedPrecision
from levin.ranks.hang_watchdog import RunLocation, Watchdog, start_watchdog
from levin.ranks.signals import Signals, listen_for_sigterm
from levin.strategies import Strategy, StrategyRegistry
from levin.utilities.collections import apply_to_collection, as_list
from levin.utilities.properties import reads
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import StopFlags
from levin.utilities.types import Group, Tree

_SHARDED = ("fsdp", "fsdp_cpu_offload")


def _do_nothing(fabric: Processes) -> None:
    """Stand in for the function of ``launch`` where a script goes on by itself."""


def _answer_dp(strategy: Strategy) -> None:
    """Say what became of ``strategy="dp"``, one process that copies its module to several GPUs in every step.

    Raises:
        ValueError: There are GPUs.
    """
    if not isinstance(strategy.accelerator, CPUAccelerator):
        raise ValueError(
            "strategy='dp' copies the module to every GPU in every step, which nobody should wait for, received "
            f"accelerator={strategy.accelerator.name()!r}. Use strategy='ddp', with a process for each GPU."
        )
    rank_zero_warn("strategy='dp' is for several GPUs of one process, received accelerator='cpu'. Using 'ddp'.")


def _saving_folders(name: str, plugins: object) -> Strategy:
    """Return a strategy that was asked for by name, and that saves folders here by default, where a Trainer's saves one file."""
    writes_files = any(isinstance(plugin, CheckpointIO) and not plugin.is_collective for plugin in as_list(plugins))
    kind: Any = StrategyRegistry.get_class(name)
    found: Strategy = kind(
        **StrategyRegistry[name]["init_params"], state_dict_type="full" if writes_files else "sharded"
    )
    return found


class Requests:
    """What a process was asked to do from outside.

    Args:
        strategy: The strategy.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self.signals = Signals()
        self.signals.waits_for_batch = True
        self.told = StopFlags()


class Processes:
    """What a Fabric knows of its processes; a subclass may define :meth:`run`, and calling it starts them.

    Args:
        settings: ``accelerator``, ``strategy``, ``devices``, ``num_nodes`` and ``precision``, as the code has them.
        plugins: As the code has them.
    """

    def __init__(self, settings: dict[str, Any], plugins: Any) -> None:
        settings = with_environment(settings)
        name = settings["strategy"]
        if name == "dp":
            settings["strategy"] = "ddp"
        elif name == "fsdp" and settings["accelerator"] == "tpu":
            settings["strategy"] = "xla_fsdp"
        elif name in _SHARDED:
            settings["strategy"] = _saving_folders(name, plugins)
        self._strategy: Strategy = build_engine(**settings, plugins=plugins).strategy
        precision = self._strategy.precision
        if type(precision) is MixedPrecision:
            self._strategy.precision = ForwardMixedPrecision(precision.precision, precision.device, precision.scaler)
        if name == "dp":
            _answer_dp(self._strategy)
        self._watchdog: Watchdog | None = None
        self._is_launched: bool = False
        self._is_running: bool = False
        self._requests: Requests | None = None
        if is_launched_by_command():
            if type(self).run is not Processes.run:
                raise TypeError(
                    f"{type(self).__name__}.run() launches processes, received a process that the command line started. "
                    "Start the script by itself, or call the functions of Fabric without run()."
                )
            self._enter()

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "run" in vars(cls):
            setattr(cls, "run", _launching(vars(cls)["run"]))  # noqa: B010  (a method is assigned)

    # What it is made of

    accelerator: Accelerator = reads("_strategy.accelerator", "The hardware.")
    strategy: Strategy = reads("_strategy", "What wraps modules and talks to the other processes.")
    # Names that packages read (litgpt, kraken, sheeprl).
    _accelerator: Accelerator = reads("_strategy.accelerator", "The hardware.")
    _precision: Precision = reads("_strategy.precision", "The format of the numbers.")
    device: torch.device = reads("_strategy.root_device", "The device of this process.")
    global_rank: int = reads("_strategy.global_rank", "Index of this process among all.")
    local_rank: int = reads("_strategy.local_rank", "Index of this process on its machine.")
    node_rank: int = reads("_strategy.node_rank", "Index of this machine.")
    world_size: int = reads("_strategy.world_size", "Number of processes over all machines.")
    is_global_zero: bool = reads("_strategy.is_global_zero", "Whether this process is the first of all.")

    @property
    def received_sigterm(self) -> bool:
        """Whether any process was asked to terminate; all processes ask together, between two batches.

        From the first time that this is asked, SIGTERM is noted and does not end the process: save, and leave with status
        143. A second one ends it.
        """
        if self._requests is None:
            self._requests = Requests(self._strategy)
            listen_for_sigterm(self._requests)
        return self._strategy.reduce_boolean_decision(self._requests.told.received_sigterm, all=False)

    # Processes

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Do the work; a subclass defines it, and calling it launches the processes first."""

    def launch(self, function: Callable[..., object] = _do_nothing, *args: object, **kwargs: object) -> Any:
        """Start the processes.

        Args:
            function: Runs in each process, with this object as its first argument. Without one, the script is started
                again for each process and goes on after this line.
            args: Passed to ``function``.
            kwargs: Passed to ``function``.

        Returns:
            What ``function`` returned; that of rank 0 where other processes ran it.

        Raises:
            RuntimeError: The command line has started the processes already.
            TypeError: ``function`` cannot be called or takes no argument, or the strategy cannot do without one.
        """
        if is_launched_by_command():
            raise RuntimeError("The command line has started the processes already. Leave out fabric.launch().")
        if not callable(function):
            raise TypeError(f"launch needs a function, received {function!r}. Pass your_fn, not your_fn().")
        if not inspect.signature(function).parameters:
            raise TypeError(
                f"launch passes the Fabric to the function, received {function!r}, which takes no argument. "
                "Define it as your_fn(fabric)."
            )
        launcher = self._strategy.launcher
        if launcher is not None and launcher.runs_elsewhere and function is _do_nothing:
            raise TypeError(
                f"{type(self._strategy).__name__} starts processes that run one function, received none. "
                "Call fabric.launch(your_fn)."
            )
        return self._launch(function, self, *args, **kwargs)

    def _launch(self, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        launcher = self._strategy.launcher
        if launcher is None:
            return self._run_launched(function, *args, **kwargs)
        return launcher.launch(self._run_launched, function, *args, **kwargs)

    def _run_launched(self, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        self._enter()
        if self._watchdog is None or not multiprocessing.parent_process():
            return function(*args, **kwargs)
        # Processes of multiprocessing end without the hooks of a script.
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            self._watchdog.annotate_error(error)
            raise
        finally:
            self._watchdog.stop(has_left=True)

    def _locate(self) -> RunLocation:
        """Return where this process is, for the other processes' messages; the watchdog asks from its own thread."""
        return RunLocation(0, "the loop")

    def _watch(self) -> None:
        """Look out for other processes that hang or are gone, until the script ends."""
        self._watchdog = watchdog = start_watchdog(self._strategy)
        if watchdog is None:
            return
        watchdog.watch_progress(self._locate)

    def _enter(self) -> None:
        self._strategy.setup_environment()
        self._watch()
        # A function that talks to nobody could be over in rank 0, where the others still meet.
        self._strategy.barrier("launch")
        self._is_launched = True

    def _check_launched(self) -> None:
        if not self._is_launched and self._strategy.is_distributed:
            raise RuntimeError(
                f"{type(self._strategy).__name__} runs in processes that are not there yet. Call fabric.launch() before, "
                "or start the script with levin fabric run."
            )

    # Talking to the other processes

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print, in the first process of each machine."""
        if self.local_rank == 0:
            print(*args, **kwargs)

    def barrier(self, name: str | None = None) -> None:
        """Wait until all processes are here."""
        self._check_launched()
        self._strategy.barrier(name)

    def broadcast(self, obj: object, src: int = 0) -> Any:
        """Return the object of rank ``src`` in every process."""
        self._check_launched()
        return self._strategy.broadcast(obj, src=src)

    def all_gather(self, data: object, group: Group = None, sync_grads: bool = False) -> Tree:
        """Return the tensors of all processes along a new first dimension; of one process as they are.

        Args:
            data: A tensor, a number, or a collection of these.
            group: The processes that take part; all when None.
            sync_grads: Whether gradients flow back to the process that a part came from.
        """
        self._check_launched()
        return self._strategy.all_gather(self._tensors(data), group=group, sync_grads=sync_grads)

    def all_reduce(self, data: object, group: Group = None, reduce_op: object = "mean") -> Tree:
        """Return the tensors reduced over all processes.

        Args:
            data: A tensor, a number, or a collection of these.
            group: The processes that take part; all when None.
            reduce_op: ``"mean"``, ``"sum"``, ``"min"``, ``"max"``, or a ``ReduceOp``.
        """
        self._check_launched()
        return self._strategy.reduce(self._tensors(data), group=group, reduce_op=reduce_op)

    def _tensors(self, data: object) -> Tree:
        """Return tensors on the device in the place of numbers, and of tensors that are elsewhere."""
        return apply_to_collection(data, (Tensor, bool, int, float), torch.as_tensor, device=self.device)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Let rank 0 go through the block before the others enter it.

        Args:
            local: Whether to let the first process of each machine go first, for files on its own disk.
        """
        rank = self.local_rank if local else self.global_rank
        if rank > 0:
            self.barrier()
        yield
        if rank == 0:
            self.barrier()
        self.barrier()


def _launching(run: Callable[..., object]) -> Callable[..., object]:
    """Return a ``run`` that launches the processes, in each of which it is ``run`` itself."""

    @functools.wraps(run)
    def launched(self: Processes, *args: object, **kwargs: object) -> object:
        if self._is_running:
            return run(self, *args, **kwargs)
        # By its name, since what goes to another process has to be found there.
        return self._launch(_run, self, *args, **kwargs)

    return launched


def _run(fabric: Processes, *args: object, **kwargs: object) -> object:
    fabric._is_running = True
    try:
        return fabric.run(*args, **kwargs)
    finally:
        fabric._is_running = False
