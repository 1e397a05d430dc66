"""Watching over the other processes: says which one is late or gone, instead of a bare timeout."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from levin.ranks.hang_report import (
    Report,
    diagnose,
    format_stack,
    is_deadlock,
    is_secondary_failure,
    last_collective,
    state_of_process,
)
from levin.strategies.parallel import ParallelStrategy
from levin.strategies.strategy import Strategy
from levin.utilities.rank_zero import log
from levin.utilities.stacks import ThreadCalls, calls_in
from levin.utilities.user_frames import call_under_way

# What another process has to answer within, in beats.
_ANSWER_BEATS = 4
# When all ranks have waited so long without a move, rank 0 compares where they wait.
DEADLOCK_S = 5.0
# How long the main thread gets to raise the error of its collective, before the process is ended.
GRACE_S = 10.0
# How long this process waits for a store that does not answer.
_STORE_TIMEOUT = timedelta(seconds=10)
# Where the main thread is while it waits for a collective.
_WAITING_IN = ("/torch/distributed/", "/torch/autograd/", "/torch/nn/parallel/", "/levin/strategies/")


class RunLocation(NamedTuple):
    """Where a process is in its run.

    Args:
        num_batches: Batches done; 0 before the first is complete.
        text: The same, and more, for people.
    """

    num_batches: int
    text: str


class Watchdog(threading.Thread):
    """A thread that tells the other processes about this one, and finds out which of them is to blame.

    The training loop does nothing for it. About once a second the thread looks where the main thread is, and writes
    that into the store that connected the processes. When a collective fails, or this process waits in one for longer
    than it may, each rank writes down what it does; one of them compares, and all of them get to know the result.

    Args:
        rank: This process.
        world_size: Number of processes.
        first_timeout: How long a collective may take until the first batch is done; torch's default when None.
        step_timeout: How long from then on.
    """

    def __init__(self, rank: int, world_size: int, first_timeout: timedelta | None, step_timeout: timedelta) -> None:
        super().__init__(name="levin-watch", daemon=True)
        self._rank, self._world_size = rank, world_size
        self._first_timeout, self._step_timeout = first_timeout, step_timeout
        limit_s = min(step_timeout.total_seconds(), (first_timeout or step_timeout).total_seconds())
        # Many ranks write into one store: the more there are, the more seldom.
        self.beat_s = min(max(1.0, world_size / 1000), max(0.05, limit_s / 5))
        self._world: object = dist.group.WORLD  # until it watches no more
        # A connection of its own: the other one may be busy for as long as the main thread waits.
        plain = _connected_again(distributed_c10d._get_default_store())
        plain.set_timeout(_STORE_TIMEOUT)
        # Each rank counts its runs, and all have made as many.
        run = plain.add(f"levin/runs/{rank}", 1)
        self._store: Any = distributed_c10d.PrefixStore(f"levin/watch/{run}", plain)
        self._ends_the_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        # Under torchrun; a process that outlives its agent would go on writing into the folder of the job that replaces it.
        self._agent_pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._calls = ThreadCalls()
        # Where this process is, and how many batches it had done when it began.
        self._progress: tuple[Callable[[], RunLocation], int] = (_in_set_up, 0)
        self._is_short = False
        self._shortened: dict[Any, timedelta] = {}
        self._shortening = threading.Lock()
        # Of the groups that were taken down, too: others may wait in them.
        self._counts: dict[str, int] = {}
        self._last: tuple[RunLocation, dict[str, int]] = (RunLocation(0, ""), {})
        self._moved_at = time.monotonic()
        self._next_comparison_s = DEADLOCK_S
        self._failure: Report | None = None
        self._is_raising = False
        self._wants_verdict = False
        self._is_between_runs = False
        self._is_over = threading.Event()
        self._wake = threading.Event()
        self._published = threading.Event()
        self._diagnosed = threading.Event()
        self.verdict = ""

    # What the main thread calls

    def watch_progress(self, place: Callable[[], RunLocation]) -> None:
        """Ask ``place`` from now on where this process is; it runs in this thread."""
        self._progress = place, place().num_batches

    def annotate_error(self, error: BaseException) -> None:
        """Tell the others that this process fails with ``error``; when it is the echo of another's, say so in it.

        Args:
            error: Its message begins with the verdict afterwards.
        """
        if self._is_raising or not self.is_alive():
            return
        self._is_raising = True
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__)[-12:])
        self._wants_verdict = is_secondary_failure(error)
        call, line = call_under_way(reversed(calls_in(traceback.walk_tb(error.__traceback__))))
        self._failure = self._report(failure=text, is_secondary_failure=self._wants_verdict, call=call, line=line)
        self._wake.set()
        if not self._wants_verdict:
            self._published.wait(2.0)
            if self._ends_the_store and isinstance(error, Exception):
                # With this process goes what the others would read the reason from.
                self._wants_verdict = True
                self._wake.set()
                self._diagnosed.wait(2.0 * _ANSWER_BEATS * self.beat_s + 2.0)
            return
        self._diagnosed.wait(2.0 * _ANSWER_BEATS * self.beat_s + 2.0)
        verdict = self.verdict or (
            "The store that connects the processes does not answer: the process or machine of rank 0, or the network to "
            "it, is gone."
        )
        error.args = (f"{verdict}\n{error.args[0] if error.args else ''}", *error.args[1:])

    def begin(self, strategy: ParallelStrategy) -> None:
        """Watch over a run of a strategy from now on."""
        self._first_timeout, self._step_timeout = strategy.timeout, strategy.step_timeout
        self._progress, self._is_between_runs = (_in_set_up, 0), False

    def end_run(self) -> None:
        """Watch over what follows the run, which has ended here: other ranks may be waited for there, too."""
        if self._is_raising or multiprocessing.parent_process() is not None:
            # Nothing follows, and processes of multiprocessing end without a word.
            self.stop(has_left=True)
            return
        self._progress, self._is_between_runs = (_after_the_run, 0), True
        self._lengthen()

    def is_of(self, world: object) -> bool:
        """Whether it goes on watching over this process group of all."""
        return self._world is world and self.is_alive() and not self._is_raising and not self._is_over.is_set()

    def stop(self, has_left: bool = False) -> None:
        """Watch no more.

        Args:
            has_left: Whether the run has ended well here; others that still wait are told.
        """
        atexit.unregister(self.stop)
        if self._is_over.is_set():
            return
        if has_left and not self._is_raising:
            self._failure = self._report(has_left=True)
        self._is_over.set()
        self._wake.set()
        if self.is_alive() and threading.current_thread() is not self:
            # As long as the store may take to answer: a thread that is left in torch's code would abort the process.
            self.join(_STORE_TIMEOUT.total_seconds())
        self._lengthen()
        # The run, and the groups of all: others learn by the end of their connections that this process has failed.
        self._progress, self._world = (_after_the_run, 0), None

    # What the thread does

    def start(self) -> None:
        """Begin, until the script ends, and tell the others what it ends with."""
        previous = sys.excepthook

        def tell(kind: type[BaseException], error: BaseException, trace: Any) -> None:
            self.annotate_error(error)
            previous(kind, error, trace)

        sys.excepthook = tell
        # A thread that is still in torch's code when Python ends would end the process with an error.
        atexit.register(self.stop, has_left=True)
        super().start()

    def run(self) -> None:
        """Beat until the run is over, and look for the one to blame when something is wrong."""
        try:
            while not self._is_over.is_set():
                self._heartbeat()
                if self._should_ask():
                    self._store.compare_set("alarm", "", str(self._rank))
                if self._store.check(["alarm"]):
                    self._find_out()
                    return
                self._wake.wait(self.beat_s)
                self._wake.clear()
            self._publish_failure()
        except RuntimeError as error:
            # The store is gone. Whoever waits for the verdict is told so, and the collectives end by their own timeout.
            log.debug("rank %s watches no more: %s", self._rank, error)
            self._diagnosed.set()

    def _heartbeat(self) -> None:
        if self._agent_pid is not None and os.getppid() != self._agent_pid:
            self._end(f"torchrun's agent (process {self._agent_pid}), which started this process, is gone.")
        (place, num_before), counts = self._progress, self._count_collectives()
        now = (place(), counts)
        if now != self._last:
            self._last, self._moved_at, self._next_comparison_s = now, time.monotonic(), DEADLOCK_S
        if now[0].num_batches > num_before:
            self._shorten()
        self._store.set(f"state/{self._rank}", self._report().dump())
        self._publish_failure()

    def _shorten(self) -> None:
        """Let the groups that wait as long as the first step may take wait as long as a step from now on."""
        with self._shortening:
            self._is_short = not (self._is_between_runs or self._is_over.is_set())
            for group in list(distributed_c10d._world.pg_map) if self._is_short else ():
                if group in self._shortened:
                    continue
                with suppress(RuntimeError):
                    timeout = group._get_backend(group._device_types[0]).options._timeout
                    self._shortened[group] = timeout
                    # One that the user made with a timeout of its own keeps it.
                    if timeout == (self._first_timeout or timeout):
                        distributed_c10d._set_pg_timeout(self._step_timeout, group)

    def _lengthen(self) -> None:
        """Let them wait as before the run."""
        with self._shortening:
            self._is_short = False
            for group, timeout in self._shortened.items() if dist.is_initialized() else ():
                # One that was taken down meanwhile is none any more.
                with suppress(ValueError):
                    distributed_c10d._set_pg_timeout(timeout, group)
            self._shortened.clear()

    def _count_collectives(self) -> dict[str, int]:
        groups: dict[Any, str] = dict(distributed_c10d._world.pg_names)
        for group, name in groups.items():
            # One that the main thread is making or taking down at this moment has nothing to say.
            with suppress(RuntimeError):
                self._counts[name] = group._get_sequence_number_for_group()
        return dict(self._counts)

    def _publish_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is None:
            return
        if failure.failure:
            failure.order = self._store.add("num_failures", 1)
        self._store.set(f"report/{self._rank}", failure.dump())
        self._published.set()

    def _should_ask(self) -> bool:
        """Whether this process fails without knowing why, or has waited for the others for longer than it may."""
        if self._is_raising:
            return self._wants_verdict
        waited_s = time.monotonic() - self._moved_at
        if self._rank == 0 and waited_s > self._next_comparison_s:
            self._next_comparison_s = waited_s + DEADLOCK_S
            left = {rank: report for rank, report in self._read("report").items() if report.has_left}
            states = {**self._read("state"), **left}
            if len(states) == self._world_size and is_deadlock(states.values(), DEADLOCK_S / 2):
                self._store.set("is_deadlock", "")
                return True
        limit = self._step_timeout if self._is_short else self._first_timeout
        if limit is None or waited_s <= limit.total_seconds() + 2 * self.beat_s:
            return False
        counts = self._last[1]
        others = self._read("state").values()
        return self._waits() and any(r.counts.get(name, 0) < count for r in others for name, count in counts.items())

    def _waits(self) -> bool:
        return "nccl" in dist.get_backend_config() or self._is_in_collective()

    def _is_in_collective(self) -> bool:
        innermost = [call.filename.replace(os.sep, "/") for call in self._calls()[:1]]
        return any(part in name for name in innermost for part in _WAITING_IN)

    def _find_out(self) -> None:
        """Write down what this process does, wait for what the others write, and diagnose."""
        if not self._store.check([f"report/{self._rank}"]):
            self._store.set(f"report/{self._rank}", self._report(with_stack=True).dump())
        is_first = self._store.get("alarm") == str(self._rank).encode()
        deadline = time.monotonic() + _ANSWER_BEATS * self.beat_s * (1 if is_first else 2)
        while time.monotonic() < deadline and not self._store.check(["verdict"]):
            if is_first and all(not r.is_alive and r.process_state for r in self._missing().values()):
                break
            time.sleep(min(0.1, self.beat_s))
        if not self._store.check(["verdict"]):
            self._store.set("verdict", diagnose({**self._missing(), **self._read("report")}.values()))
        self.verdict = self._store.get("verdict").decode()
        # Then no collective will raise. Rank 0 hears of the others' end by its own, and says why.
        grace_s = 0.0 if self._rank and self._store.check(["is_deadlock"]) else GRACE_S
        self._store.set(f"told/{self._rank}", "")
        if self._ends_the_store:
            self._wait_until_told()
        self._diagnosed.set()
        self._end_unless_raised(grace_s)

    def _wait_until_told(self) -> None:
        """Keep the store until the others have read the verdict, or need none."""
        deadline = time.monotonic() + _ANSWER_BEATS * self.beat_s
        while time.monotonic() < deadline:
            reports = self._read("report")
            waiting = [r for r in reports.values() if not (r.has_left or (r.failure and not r.is_secondary_failure))]
            if all(self._store.check([f"told/{report.rank}"]) for report in waiting) and not any(
                not report.process_state for report in self._missing().values()
            ):
                return
            time.sleep(min(0.1, self.beat_s))

    def _end_unless_raised(self, grace_s: float) -> None:
        """Wait for the main thread to raise; when it does not, end the process: the others have given up."""
        if self._is_over.wait(grace_s) or self._is_raising or not threading.main_thread().is_alive():
            return
        if self._is_between_runs and not self._is_in_collective():
            return  # it does something of its own
        self._end(f"Ended after {grace_s:g} s of grace. {self.verdict}")

    def _end(self, reason: str) -> None:
        record_error(RuntimeError(reason))
        sys.stderr.write(f"[rank {self._rank}] {reason}\n")
        sys.stderr.flush()
        os._exit(1)

    def _report(self, with_stack: bool = False, **more: Any) -> Report:
        place, counts = self._last
        if with_stack or more:
            place, counts = self._progress[0](), self._count_collectives()
        calls = self._calls()
        stuck_s = time.monotonic() - self._moved_at
        call, line = call_under_way(calls)
        more = {"call": call, "line": line, **more}
        return Report(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            place=place.text,
            stuck_s=stuck_s,
            counts=counts,
            is_in_collective=self._is_in_collective(),
            collective=last_collective() if with_stack or stuck_s > DEADLOCK_S / 4 else "",
            stack=format_stack(calls) if with_stack else "",
            **more,
        )

    def _read(self, kind: str) -> dict[int, Report]:
        ranks = [rank for rank in range(self._world_size) if self._store.check([f"{kind}/{rank}"])]
        found = self._store.multi_get([f"{kind}/{rank}" for rank in ranks]) if ranks else []
        return {rank: Report.load(text) for rank, text in zip(ranks, found)}

    def _missing(self) -> dict[int, Report]:
        """Return what is known of the ranks that have not written a report."""
        reports, states = self._read("report"), self._read("state")
        missing = {rank: states.get(rank, Report(rank)) for rank in range(self._world_size) if rank not in reports}
        for report in missing.values():
            report.is_alive = False
            if report.host == socket.gethostname():
                report.process_state = state_of_process(report.pid)
        return missing


def _connected_again(store: object) -> Any:
    """Return the same store through a connection of its own."""
    if hasattr(store, "clone"):
        return store.clone()
    # Torch 2.6 and before. The prefix of the store is not to be read there; what it keeps apart are attempts of torchrun.
    kinds: Any = dist  # whose stores torch gives no types
    base = store._underlying_non_prefix_store if isinstance(store, kinds.PrefixStore) else store
    if isinstance(base, kinds.TCPStore):
        base = kinds.TCPStore(base.host, base.port, is_master=False, wait_for_workers=False, timeout=_STORE_TIMEOUT)
    elif isinstance(base, kinds.FileStore):
        base = kinds.FileStore(base.path)
    return kinds.PrefixStore(f"levin/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", base)


def _in_set_up() -> RunLocation:
    return RunLocation(0, "set-up")


def _after_the_run() -> RunLocation:
    return RunLocation(0, "after the run")


# That of this process, which outlives a run.
_present: Watchdog | None = None


def start_watchdog(strategy: Strategy) -> Watchdog | None:
    """Start watching over the processes that a strategy has connected, or go on; alone there is nobody to watch."""
    global _present
    if not isinstance(strategy, ParallelStrategy) or strategy.world_size < 2:
        return None
    if _present is not None and _present.is_of(dist.group.WORLD):
        _present.begin(strategy)
        return _present
    _present = Watchdog(strategy.global_rank, strategy.world_size, strategy.timeout, strategy.step_timeout)
    _present.start()
    return _present


def record_error(error: BaseException) -> None:
    """Write an error where torchrun looks for it, when torchrun started this process."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
