"""The processes of a Fabric: how they are started, which of them this one is, and what they say to each other."""

from __future__ import annotations

import atexit
import functools
import inspect
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from levin.accelerators import Accelerator, CPUAccelerator
from levin.checkpoint import CheckpointIO
from levin.engine import build_engine
from levin.fabric.settings import is_launched_by_command, with_environment
from levin.ranks.hang_watchdog import RunLocation, Watchdog, start_watchdog
from levin.ranks.signals import Signals, listen_for_sigterm
from levin.strategies import Strategy
from levin.utilities.collections import apply_to_collection
from levin.utilities.rank_zero import rank_zero_warn
from levin.utilities.states import StopFlags
from levin.utilities.types import Tree

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


def _saving_folders(name: str, plugins: Any) -> Strategy:
    """Return a strategy that was asked for by name, and that saves folders here by default, where a Trainer's saves one file."""
    from levin.strategies.fsdp import FSDPStrategy  # slow to import

    given = plugins if isinstance(plugins, (list, tuple)) else [plugins]
    writes_files = any(isinstance(plugin, CheckpointIO) and not plugin.is_collective for plugin in given)
    kind: Literal["full", "sharded"] = "full" if writes_files else "sharded"
    return FSDPStrategy(cpu_offload="offload" in name, state_dict_type=kind)


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
        is_dp = settings["strategy"] == "dp"
        if is_dp:
            settings["strategy"] = "ddp"
        elif settings["strategy"] == "fsdp" and settings["accelerator"] == "tpu":
            settings["strategy"] = "xla_fsdp"
        elif settings["strategy"] in _SHARDED:
            settings["strategy"] = _saving_folders(settings["strategy"], plugins)
        self._strategy: Strategy = build_engine(**settings, plugins=plugins).strategy
        if is_dp:
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

    @property
    def accelerator(self) -> Accelerator:
        """The hardware."""
        return self._strategy.accelerator

    @property
    def strategy(self) -> Strategy:
        """What wraps modules and talks to the other processes."""
        return self._strategy

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self._strategy.root_device

    @property
    def global_rank(self) -> int:
        """Index of this process among all."""
        return self._strategy.global_rank

    @property
    def local_rank(self) -> int:
        """Index of this process on its machine."""
        return self._strategy.local_rank

    @property
    def node_rank(self) -> int:
        """Index of this machine."""
        return self._strategy.node_rank

    @property
    def world_size(self) -> int:
        """Number of processes over all machines."""
        return self._strategy.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the first of all."""
        return self._strategy.is_global_zero

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
        previous = sys.excepthook

        def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            watchdog.annotate_error(error)
            previous(kind, error, trace)

        sys.excepthook = tell
        atexit.register(watchdog.stop, has_left=True)

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

    def all_gather(self, data: object, group: object = None, sync_grads: bool = False) -> Tree:
        """Return the tensors of all processes along a new first dimension; of one process as they are.

        Args:
            data: A tensor, a number, or a collection of these.
            group: The processes that take part; all when None.
            sync_grads: Whether gradients flow back to the process that a part came from.
        """
        self._check_launched()
        gather = functools.partial(self._strategy.all_gather, group=group, sync_grads=sync_grads)
        return self._over_tensors(data, gather)

    def all_reduce(self, data: object, group: object = None, reduce_op: object = "mean") -> Tree:
        """Return the tensors reduced over all processes.

        Args:
            data: A tensor, a number, or a collection of these.
            group: The processes that take part; all when None.
            reduce_op: ``"mean"``, ``"sum"``, ``"min"``, ``"max"``, or a ``ReduceOp``.
        """
        self._check_launched()
        return self._over_tensors(data, functools.partial(self._strategy.reduce, group=group, reduce_op=reduce_op))

    def _over_tensors(self, data: object, function: Callable[[Tensor], object]) -> object:
        def apply(leaf: object) -> object:
            return function(
                leaf.to(self.device) if isinstance(leaf, Tensor) else torch.tensor(leaf, device=self.device)
            )

        return apply_to_collection(data, (Tensor, bool, int, float), apply)

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
