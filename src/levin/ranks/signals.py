"""Signals that end a run: the batch is finished, the run is saved, and the process leaves with status 143.

A handler only notes what came; the loops look at ``trainer.received_sigterm`` after each batch. During set-up there is
nothing to finish, and the run ends at once.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from levin.checkpoint.select import hpc_checkpoints
from levin.environments.slurm import SLURMEnvironment
from levin.launchers.launcher import SIGTERM_STATUS, Launcher
from levin.protocols import Run
from levin.utilities.exceptions import SIGTERMException, causes
from levin.utilities.rank_zero import log, rank_zero_info
from levin.utilities.states import TrainerFn

FILE_NAME = "sigterm.ckpt"
"""The checkpoint of a run that was asked to terminate; ``ckpt_path="auto"`` finds it, the next one replaces it."""

# Launchers forward what a scheduler sends to every process as well, so that one request may come twice.
_SAME_REQUEST_S = 1.0
_INTERRUPT_STATUS = 128 + 2


class Signals:
    """What this process was told by signals during one call of the Trainer."""

    def __init__(self) -> None:
        # Whether a signal waits for the end of a batch; during set-up it does not.
        self.waits_for_batch: bool = False
        self.is_before_training: bool = True
        # Whether batches are worked on, so that all ranks leave at the same one.
        self.is_looping: bool = False
        self.wants_requeue: bool = False
        self.is_requeued: bool = False
        self.first_s: Optional[float] = None

    def is_repeated(self) -> bool:
        """Note a request to stop, and return whether there was another one before."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now
        return now - self.first_s > _SAME_REQUEST_S


@contextmanager
def signal_handlers(run: Run) -> Iterator[None]:
    """Listen to SIGTERM and, under SLURM with automatic requeueing, to the signal that announces the end of the job.

    The user's own handlers are called too; of the signal of SLURM they stay alone. A second request ends the process at
    once. Handlers are put in place in the main thread only, and the old ones come back.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGTERM"):
        yield
        return
    previous = {signal.SIGTERM: _handler_before()}
    signal.signal(signal.SIGTERM, _SigtermHandler(run, previous[signal.SIGTERM]))
    environment = run.strategy.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        number = environment.requeue_signal
        found = signal.getsignal(number)
        if found in (signal.SIG_DFL, signal.SIG_IGN, None):
            previous[number] = found
            signal.signal(number, _requeue_handler(run))
            rank_zero_info(f"SLURM requeues this job after {number.name}.")
        else:
            rank_zero_info(f"There is a handler for {number.name} already: levin does not requeue the job.")
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def second_interrupt_ends(launcher: Launcher | None, is_shutdown: bool) -> Iterator[None]:
    """Let Ctrl-C be answered in peace, unless it is pressed again: then this process and those it started end.

    Afterwards Ctrl-C works as before, for those who catch the exit (notebooks).

    Args:
        launcher: What started other processes; None where there are none.
        is_shutdown: What runs is the answer to the first one, which is not heard again. Otherwise that raises as ever, or
            the user's own handler answers; then the second one ends only what did not come to it in between.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not (is_shutdown or callable(previous)):
        yield
        return
    interrupts = _Interrupts(launcher, None if is_shutdown else previous)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGINT, interrupts.answer)
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=interrupts.watch, args=[reader], name="levin-interrupt", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
        writer.close()
        thread.join()


class _Interrupts:
    """When Ctrl-C was pressed, and whether the main thread came to it.

    Args:
        launcher: What started other processes.
        previous: The handler that answers; None where it was pressed already, and the shutdown is the answer.
    """

    def __init__(self, launcher: Launcher | None, previous: Any) -> None:
        self._launcher = launcher
        self._previous = previous
        self._pressed_s: float = -math.inf if previous else time.monotonic()
        self._answered_s: float = -math.inf

    def answer(self, number: int, frame: object) -> None:
        """Do in the main thread what was done before; a KeyboardInterrupt only begins to be an answer."""
        if self._previous not in (None, signal.default_int_handler):
            self._answered_s = time.monotonic()
        if self._previous is not None:
            self._previous(number, frame)

    def watch(self, reader: socket.socket) -> None:
        """Do in a thread what the main one cannot, which may wait for ever for another process and then runs no handler."""
        while received := reader.recv(64):
            now = time.monotonic()
            is_open = self._pressed_s > self._answered_s + _SAME_REQUEST_S
            if signal.SIGINT in received and is_open and now - self._pressed_s > _SAME_REQUEST_S:
                if self._launcher is not None:
                    self._launcher.kill(signal.SIGKILL)
                os._exit(_INTERRUPT_STATUS)
            if signal.SIGINT in received and not is_open:
                self._pressed_s = now
        reader.close()


class _SigtermHandler:
    """What is done on SIGTERM.

    Args:
        run: In the middle of a call.
        previous: The handler before, which is called too.
    """

    def __init__(self, run: Run, previous: object) -> None:
        self.owner: int = os.getpid()
        self.previous: Any = previous
        self._run = run

    def __call__(self, number: int, frame: object) -> None:
        signals, told = self._run.signals, self._run.told
        if os.getpid() != self.owner:
            # A process that was forked off, such as a worker of a loader: it has no batch to finish.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if signals.is_requeued:
            log.info("SIGTERM is not heeded: the job is saved and in the queue again.")
            return
        if signals.is_repeated():
            os._exit(SIGTERM_STATUS)
        is_first, told.received_sigterm = not told.received_sigterm, True
        if is_first:
            _let_workers_end()
            launcher = self._run.strategy.launcher
            # Ranks that train are told by the agreement. A signal of ours would come late where this process was busy,
            # and to a process that has the scheduler's it would be the second request.
            is_agreed = signals.waits_for_batch and launcher is not None and not launcher.runs_elsewhere
            if launcher is not None and not is_agreed and hasattr(launcher, "kill"):
                launcher.kill(number)
        if callable(self.previous):
            self.previous(number, frame)
        if is_first and not signals.waits_for_batch:
            raise SIGTERMException


def listen_for_sigterm(run: Any) -> None:
    """Note SIGTERM in ``run.told`` from now on, for a loop that asks between its batches; a second one ends the process.

    Args:
        run: Has ``signals``, ``told`` and ``strategy``, as a :class:`~levin.protocols.Run` has.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _SigtermHandler(run, _handler_before()))


def _handler_before() -> Any:
    """Return the handler of SIGTERM that is not levin's own in the process which forked this one."""
    found = signal.getsignal(signal.SIGTERM)
    while isinstance(found, _SigtermHandler) and found.owner != os.getpid():
        found = found.previous
    return found


def _requeue_handler(run: Run) -> Callable[[int, object], None]:
    owner = os.getpid()

    def on_requeue(number: int, frame: object) -> None:
        if os.getpid() != owner:
            return
        run.signals.wants_requeue = run.told.received_sigterm = True
        if not run.signals.waits_for_batch:
            raise SIGTERMException

    return on_requeue


def _let_workers_end() -> None:
    """Take the end of a loader's workers, which the same signal may have reached, for no error while a batch is finished."""
    if hasattr(signal, "SIGCHLD") and getattr(signal.getsignal(signal.SIGCHLD), "__module__", "").startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def as_ended(run: Run, error: BaseException) -> BaseException:
    """Return ``error``, or a :class:`SIGTERMException` where the signal to this process is what caused it elsewhere.

    Args:
        run: In the middle of a call.
        error: What was raised.
    """
    if not run.told.received_sigterm or isinstance(error, SIGTERMException):
        return error
    launcher = run.strategy.launcher
    if isinstance(error, RuntimeError) and launcher is not None and launcher.runs_elsewhere:
        return SIGTERMException()
    # Torch tells of a lost worker wherever this process is just then, perhaps where the error becomes another one.
    is_lost = any(isinstance(cause, RuntimeError) and "DataLoader worker" in str(cause) for cause in causes(error))
    return SIGTERMException() if is_lost else error


def save_for_restart(run: Run) -> None:
    """Save a fit that was asked to terminate, and put the job back in the queue if that is what was asked for.

    The file lies in the folder of the first checkpoint callback, or in ``default_root_dir``. There is none if the Trainer
    has no checkpoint callback, except for a job that is requeued. Before the first batch there is nothing to save: the job
    is put back as it is. An evaluation begins again; the fit before it is saved, so that the job does not train twice.
    """
    signals, strategy, is_fit = run.signals, run.strategy, run.state.fn == TrainerFn.FITTING
    if run.settings.fast_dev_run:
        return
    if not signals.is_looping:
        # The scheduler tells every rank; in set-up they cannot be asked.
        if signals.wants_requeue and signals.is_before_training and strategy.is_global_zero:
            signals.is_requeued = True
            requeue()
        return
    if strategy.reduce_boolean_decision(signals.wants_requeue, all=False):
        if is_fit or run.trainer.global_step:
            path: Optional[str] = strategy.broadcast(_next_hpc_path(run.settings.default_root_dir))
            run.trainer.save_checkpoint(str(path))
            strategy.finish_saves()
        # After the file, since a logger may wait for its service.
        for logger in run.loggers:
            logger.finalize("finished")
        signals.is_requeued = True
        if strategy.is_global_zero:
            requeue()
    elif is_fit and (path := _path_for_restart(run)) is not None:
        run.trainer.save_checkpoint(path)
        strategy.finish_saves()
        rank_zero_info(f"Saved a checkpoint to {path}, from which fit(ckpt_path='auto') goes on.")


def _path_for_restart(run: Run) -> Optional[str]:
    callbacks: list[object] = run.checkpoint_callbacks
    if not callbacks:
        return None
    folders = (getattr(callback, "dirpath", None) for callback in callbacks if not _saves_weights_only(callback))
    folder = next((folder for folder in folders if folder), run.settings.default_root_dir)
    return os.path.join(str(folder), FILE_NAME)


def _saves_weights_only(callback: object) -> bool:
    # `ckpt_path="auto"` does not look into its folder.
    return bool(getattr(callback, "save_weights_only", False))


def _next_hpc_path(folder: str) -> str:
    number = max((number for number, _ in hpc_checkpoints(folder)), default=0) + 1
    return os.path.join(folder, f"hpc_ckpt_{number}.ckpt")


def requeue() -> None:
    """Put this job of SLURM back in the queue: ``scontrol requeue <job>``."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array is not None and task is not None else os.environ.get("SLURM_JOB_ID", "")
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        log.error(f"{' '.join(command)!r} failed: {error}. Requeue the job yourself.")
        return
    if done.returncode == 0:
        log.info(f"Requeued job {job}.")
    else:
        log.error(
            f"{' '.join(command)!r} ended with status {done.returncode}: {done.stderr.strip()} Requeue the job yourself."
        )
