"""Tests that run in several processes, connected by Gloo, with a deadline.

    @world_size(2)
    def test_ranks_agree(tmp_path):
        assert dist.get_world_size() == 2

Every rank runs the whole test. Fixtures are made once and sent to the ranks, so they have to be picklable.
"""

from __future__ import annotations

import faulthandler
import functools
import importlib.util
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from levin.utilities.process_group import disconnect_processes

cuts_on_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="FSDP on the CPU needs torch.cpu.Stream.record_event (not in 2.6)",
)
"""Mark of tests that cut modules by FSDP on the CPU."""

# How long other ranks get to report after the first failure.
_ECHO_S = 2.0


def world_size(size: int, timeout_s: float = 60.0, connect: bool = True) -> Callable[[Callable[..., None]], Any]:
    """Run a test in ``size`` processes; it passes when it passes in all of them.

    Args:
        size: Number of processes.
        timeout_s: After so many seconds the test fails, with the stacks of the ranks that still run.
        connect: Whether the ranks start with a process group.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            run_ranks(test, size, fixtures, timeout_s=timeout_s, connect=connect)

        return run

    return decorate


def run_ranks(
    function: Callable[..., Any],
    size: int,
    kwargs: dict[str, Any] | None = None,
    timeout_s: float = 60.0,
    connect: bool = True,
) -> list[Any]:
    """Return what ``function(**kwargs)`` returned in each of ``size`` ranks; fail with the ranks' tracebacks.

    Args:
        function: Defined at the top level of a file.
        size: Number of processes.
        kwargs: Sent to every rank.
        timeout_s: The deadline.
        connect: Whether the ranks start with a process group.
    """
    # The server has imported torch once and forks from there: a rank starts in milliseconds and inherits no thread.
    context: Any = multiprocessing.get_context(os.environ.get("LEVIN_TEST_START_METHOD", "forkserver"))
    context.set_forkserver_preload(["torch", "torch.nn.parallel", "torch.distributed.fsdp", "pytest"])
    port = _free_port()
    source = (sys.modules[function.__module__].__file__, function.__qualname__)
    with tempfile.TemporaryDirectory() as folder:
        ranks = {}
        processes = []
        for rank in range(size):
            reader, writer = context.Pipe(duplex=False)
            arguments = (source, kwargs or {}, rank, size, port, connect, timeout_s, folder, writer)
            process = context.Process(target=_run_rank, args=arguments)
            process.start()
            writer.close()
            ranks[reader] = rank
            processes.append(process)
        try:
            reports, is_late = _collect(ranks, timeout_s)
        finally:
            for process in processes:
                process.join(0.5 if process.is_alive() else None)
                if process.is_alive():
                    process.kill()
                process.join()
        if is_late or len(reports) < size or any(not report["ok"] for report in reports.values()):
            pytest.fail(_describe(reports, processes, timeout_s if is_late else None, Path(folder)), pytrace=False)
        return [reports[rank]["result"] for rank in range(size)]


def _collect(ranks: dict[Any, int], timeout_s: float) -> tuple[dict[int, dict[str, Any]], bool]:
    deadline = time.monotonic() + timeout_s
    is_late = False
    reports: dict[int, dict[str, Any]] = {}
    waiting = dict(ranks)
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            is_late = not any(not report["ok"] for report in reports.values())
            break
        for reader in ready:
            rank = waiting.pop(reader)
            try:
                report = reader.recv()
            except EOFError:
                report = {"ok": False, "text": "ended without a report", "time": time.time(), "result": None}
            reports[rank] = report
            if not report["ok"]:
                deadline = min(deadline, time.monotonic() + _ECHO_S)
    return reports, is_late


def _describe(reports: dict[int, Any], processes: list[Any], timeout_s: float | None, folder: Path) -> str:
    parts = [] if timeout_s is None else [f"Not all ranks ended within {timeout_s:g} s."]
    for rank, report in sorted(reports.items(), key=lambda item: item[1]["time"]):
        if not report["ok"]:
            parts.append(f"--- rank {rank} (exit status {processes[rank].exitcode}) ---\n{report['text']}")
    for rank in range(len(processes)):
        stacks = folder / f"stacks-{rank}"
        if rank not in reports:
            text = stacks.read_text() if stacks.exists() else ""
            parts.append(f"--- rank {rank} was still running ---\n{text}")
    return "\n".join(parts)


def _run_rank(
    source: tuple[str, str],
    kwargs: dict[str, Any],
    rank: int,
    size: int,
    port: int,
    connect: bool,
    timeout_s: float,
    folder: str,
    writer: Any,
) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size)
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    with open(os.path.join(folder, f"stacks-{rank}"), "w") as stacks:
        faulthandler.dump_traceback_later(max(0.1, timeout_s - 1.0), file=stacks)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                warnings.filterwarnings("ignore", category=FutureWarning)
                warnings.filterwarnings(
                    "ignore", message=".*sync_dist=True", category=UserWarning
                )  # a hint, tested once
                warnings.filterwarnings("ignore", "DTensor random operators may not")  # torch 2.6, on the CPU
                warnings.filterwarnings(
                    "ignore", "TypedStorage is deprecated"
                )  # torch 2.6 asks for it in a sharded save
                function = _find(*source)
                if connect:
                    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
                result = function(**kwargs)
                disconnect_processes()
            report = {"ok": True, "text": "", "time": time.time(), "result": result}
        except BaseException:
            report = {"ok": False, "text": traceback.format_exc(), "time": time.time(), "result": None}
        finally:
            faulthandler.cancel_dump_traceback_later()
    writer.send(report)
    writer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # Connections to ranks that are gone would hold up an orderly exit.
    os._exit(0 if report["ok"] else 1)


def _find(path: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return getattr(found, "__wrapped__", found)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
