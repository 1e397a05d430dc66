"""Starting processes that run one function, and bringing its results back."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import torch

from levin.launchers.launcher import Launcher
from levin.utilities.exceptions import MisconfigurationException, SIGTERMException
from levin.utilities.process_group import disconnect_processes
from levin.utilities.rank_zero import rank_zero_info
from levin.utilities.rng_states import collect_rng_states, set_rng_states
from levin.utilities.types import Function, Kwargs

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from levin.environments.environment import ClusterEnvironment

# How long the other processes get to end by themselves after one has failed.
GRACE_S = 10.0
# How long a failure of another process may come in late and still have been the first.
_FIRST_FAILURE_S = 0.3
# How long after the first process that ended for SIGTERM the others may still be about to.
_LEAVE_TOGETHER_S = 2.0


class MultiProcessingLauncher(Launcher):
    """Runs the function in new processes, this one only waits; results of rank 0 come back.

    With a Trainer, its ``collect_results()`` runs in the process of rank 0, and ``restore_results(results)`` in this
    one, so that weights, metrics and state are there after the call.

    Args:
        environment: Knows where rank 0 listens.
        num_processes: Number of processes to start.
        start_method: ``"spawn"``, ``"fork"`` or ``"forkserver"``.
        enter: Called first in each process with its local rank.
    """

    runs_elsewhere = True

    def __init__(
        self,
        environment: ClusterEnvironment,
        num_processes: int,
        start_method: str,
        enter: Callable[[int], None],
    ) -> None:
        self._environment = environment
        self._num_processes = num_processes
        self.start_method = start_method
        self._enter = enter
        self._processes: list[BaseProcess] = []
        # The process that may ask how they are; those that are forked off have the list too.
        self._owner: int = os.getpid()
        self._has_fitted = False

    @property
    def is_interactive_compatible(self) -> bool:
        """Whether the function may be defined at the prompt: forked processes have it already."""
        return self.start_method == "fork"

    def launch(self, function: Function, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Run the function in new processes and return the result of rank 0.

        Raises:
            NotImplementedError: A second fit of the same Trainer, whose optimizer states stayed in the first processes.
            RuntimeError: A process failed; the message holds its traceback. Or processes cannot be started in this way.
        """
        self._check(trainer)
        if self.start_method == "fork" and torch.get_num_threads() > 1:
            rank_zero_info("Forked processes compute with one thread each. Use strategy='ddp' or 'ddp_spawn' for more.")
        context: Any = multiprocessing.get_context(self.start_method)
        # A free port is chosen here, once, so that all processes agree.
        _ = self._environment.main_port
        with tempfile.TemporaryDirectory(prefix="levin-results-", ignore_cleanup_errors=True) as folder:
            call = _Call(
                function=function,
                args=args,
                kwargs=kwargs,
                trainer=trainer,
                enter=self._enter,
                result_path=os.path.join(folder, "result"),
                # A forked process has all of this already.
                settings=None if self.start_method == "fork" else _Settings.of_this_process(),
            )
            self._run(context, call)
            result, trainer_results = torch.load(call.result_path, weights_only=False, map_location="cpu")
        if trainer is not None:
            trainer.restore_results(trainer_results)
            self._has_fitted = self._has_fitted or _is_fit(trainer)
        return result

    def kill(self, signum: int) -> None:
        """Send a signal to the processes that were started."""
        for process in self._processes if os.getpid() == self._owner else ():
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signum)

    def __getstate__(self) -> dict[str, object]:
        """Leave the running processes here: they belong to this process alone."""
        return {**self.__dict__, "_processes": []}

    def _check(self, trainer: object) -> None:
        if self._has_fitted and _is_fit(trainer):
            raise NotImplementedError(
                f"fit() was called twice on one Trainer whose processes are started by {self.start_method!r}: the optimizer "
                "states of the first fit ended with its processes. Make a new Trainer and pass ckpt_path, or use "
                "strategy='ddp'."
            )
        if self.start_method == "fork" and torch.cuda.is_initialized():
            raise RuntimeError(
                "Processes cannot be forked after CUDA was used in this one: CUDA does not work in forked processes. "
                "Restart, and touch no CUDA device before this call; in scripts use strategy='ddp'."
            )

    def _run(self, context: Any, call: _Call) -> None:
        self._processes = []
        self._owner = os.getpid()
        readers: dict[Connection, int] = {}
        try:
            for local_rank in range(self._num_processes):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_run_process, args=(call, local_rank, writer), daemon=False)
                _start(process, self.start_method)
                writer.close()
                self._processes.append(process)
                readers[reader] = local_rank
            failure = _wait_for_all(self._processes, readers)
        except BaseException:  # whatever ends this process, the others do not outlive it
            _end(self._processes, grace_s=GRACE_S)
            raise
        if failure is not None:
            error = failure.error()
            if isinstance(error, SIGTERMException):
                # Ranks that train leave together: another request would only cut short what they do last.
                _join(self._processes, _LEAVE_TOGETHER_S)
            _end(self._processes, grace_s=GRACE_S)
            raise error


@dataclass
class _Settings:
    """What a new Python does not inherit."""

    is_deterministic: bool
    is_deterministic_warn_only: bool
    is_cudnn_benchmark: bool
    num_threads: int
    rng: dict[str, Any]

    @classmethod
    def of_this_process(cls) -> _Settings:
        return cls(
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
            is_deterministic_warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            is_cudnn_benchmark=torch.backends.cudnn.benchmark,
            num_threads=torch.get_num_threads(),
            rng=collect_rng_states(),
        )

    def apply(self) -> None:
        torch.use_deterministic_algorithms(self.is_deterministic, warn_only=self.is_deterministic_warn_only)
        torch.backends.cudnn.benchmark = self.is_cudnn_benchmark
        torch.set_num_threads(self.num_threads)
        set_rng_states(self.rng)


@dataclass
class _Call:
    """What each process runs."""

    function: Function
    args: tuple[Any, ...]
    kwargs: Kwargs
    trainer: Any
    enter: Callable[[int], None]
    result_path: str
    settings: _Settings | None

    def __reduce__(self) -> Any:
        """Copy tensors into the new process, unless their memory was shared by intention.

        Otherwise multiprocessing shares the memory of all of them, and the processes train each other's weights.
        """
        buffer = io.BytesIO()
        _CopyingPickler(buffer).dump(dict(vars(self)))
        return _load_call, (buffer.getvalue(),)


class _CopyingPickler(ForkingPickler):
    def reducer_override(self, obj: Any) -> Any:
        """Pickle tensors and storages by value; everything else as multiprocessing does."""
        if isinstance(obj, torch.Tensor):
            is_private = obj.device.type == "cpu" and not obj.is_shared()
        elif isinstance(obj, torch.storage.TypedStorage):
            # Its own methods warn whoever calls them.
            storage = obj._untyped_storage
            is_private = storage.device.type == "cpu" and not storage.is_shared()
        else:
            return NotImplemented
        return obj.__reduce_ex__(2) if is_private else NotImplemented


def _load_call(content: bytes) -> _Call:
    return _Call(**pickle.loads(content))


@dataclass
class _Failure:
    """What a process reports before it ends."""

    local_rank: int
    time_s: float
    text: str
    exception: bytes | None = None
    has_report: bool = True

    def error(self) -> BaseException:
        """Return the exception to raise in the waiting process: the original one where pickle could carry it."""
        message = f"The process with local rank {self.local_rank} failed:\n\n{self.text}"
        cause = RuntimeError(message)
        if self.exception is not None:
            try:
                original = pickle.loads(self.exception)
            except Exception as error:
                cause.__context__ = error
                return cause
            if isinstance(original, BaseException):
                original.__cause__ = cause
                return original
        return cause


def _run_process(call: _Call, local_rank: int, writer: Connection) -> None:
    """Run in each new process."""
    _end_with_parent()
    try:
        if call.settings is None:
            _use_one_thread()
        else:
            call.settings.apply()
        call.enter(local_rank)
        result = call.function(*call.args, **call.kwargs)
        trainer_results = None if call.trainer is None else call.trainer.collect_results()
        if local_rank == 0:
            torch.save((result, trainer_results), call.result_path)
        disconnect_processes()
    except BaseException as error:
        # Reported before anything else: the moment decides which process failed first.
        writer.send(_describe(error, local_rank))
        writer.close()
        sys.stdout.flush()
        sys.stderr.flush()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else 1
        # Connections to processes that are gone would hold up an orderly exit.
        os._exit(code)


def _describe(error: BaseException, local_rank: int) -> _Failure:
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    pickled: bytes | None = None
    with suppress(Exception):  # the class is the user's and may raise anything; its text is sent all the same
        written = pickle.dumps(error)
        pickle.loads(written)
        pickled = written
    return _Failure(local_rank=local_rank, time_s=time.time(), text=text, exception=pickled)


def _use_one_thread() -> None:
    # OpenMP's threads did not come along, but its book-keeping did: a forked process that computes with several threads
    # waits for ever for those that the first process had.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def _end_with_parent() -> None:
    """End this process when the one that started it has gone: nobody would wait for its result."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="levin-parent-watcher", daemon=True).start()


def _start(process: BaseProcess, start_method: str) -> None:
    try:
        process.start()
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "pickle" not in str(error).lower():
            raise
        raise MisconfigurationException(
            f"start_method={start_method!r} sends the function and its arguments to a new Python by pickle, received "
            f"something that it cannot carry: {error}. Define it at the top level of a file, or use start_method='fork' "
            "(strategy='ddp_fork')."
        ) from error


def _wait_for_all(processes: list[BaseProcess], readers: dict[Connection, int]) -> _Failure | None:
    """Return None when all processes ended well, otherwise the failure that came first."""
    failures: list[_Failure] = []
    open_readers = dict(readers)
    running = {process.sentinel: index for index, process in enumerate(processes)}
    deadline: float | None = None
    while running:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        ready = wait([*open_readers, *running], timeout=timeout)
        if not ready and deadline is not None:
            break
        for source in ready:
            if isinstance(source, Connection):
                _receive(source, failures)
                del open_readers[source]
            elif isinstance(source, int):
                index = running.pop(source)
                processes[index].join()
                if processes[index].exitcode != 0 and not any(f.local_rank == index for f in failures):
                    failures.append(_silent_failure(processes[index], index))
        if failures and deadline is None:
            deadline = time.monotonic() + _FIRST_FAILURE_S
    for reader in open_readers:
        if reader.poll():
            _receive(reader, failures)
    # What ends without a report did not fail because of others: that raises an error, which is reported.
    return min(failures, key=lambda failure: (failure.has_report, failure.time_s), default=None)


def _receive(reader: Connection, failures: list[_Failure]) -> None:
    try:
        failure = reader.recv()
    except EOFError:
        return  # The process ended without a report; its exit status says how.
    failures[:] = [known for known in failures if known.local_rank != failure.local_rank]
    failures.append(failure)


def _silent_failure(process: BaseProcess, local_rank: int) -> _Failure:
    code = process.exitcode or 0
    reason = f"it was ended by signal {signal.Signals(-code).name}" if code < 0 else f"its exit status was {code}"
    return _Failure(local_rank, time.time(), f"It left no traceback: {reason}.", has_report=False)


def _end(processes: list[BaseProcess], grace_s: float) -> None:
    for process in processes:
        process.terminate()
    _join(processes, grace_s)
    for process in processes:
        process.kill()
        process.join()


def _join(processes: list[BaseProcess], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))


def _is_fit(trainer: object) -> bool:
    fn = getattr(getattr(trainer, "state", None), "fn", None)
    return str(getattr(fn, "value", fn)) == "fit"
