"""The process group of torch.distributed: whether there is one, and how it is taken down."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

# How long a process that ends waits for its threads of Gloo, and how often it looks; longer than Python lets a thread run.
_THREADS_END_S = 60.0
_THREADS_LOOK_S = 0.02
_THREADS_UNSEEN_S = 0.2


def is_connected() -> bool:
    """Return whether this process has a process group."""
    return dist.is_available() and dist.is_initialized()


def disconnect_processes() -> None:
    """Take the process group down; without one, do nothing."""
    if is_connected():
        _let_gloo_threads_finish()
        dist.destroy_process_group()
        # Those of a group that the user keeps live on, and on a loaded machine one may not have had its turn until here.
        _let_gloo_threads_finish()


def _let_gloo_threads_finish() -> None:
    """Wait until no thread of Gloo is at work.

    A thread that has done its collective may still have to free the tensors, for which it needs the interpreter. When
    Python ends before, the thread ends the process by SIGABRT, and a run that was complete counts as failed. torch 2.6
    waits for the thread, when the group goes, without giving the interpreter to it: for ever.

    A thread that waits for the interpreter looks asleep, as one does that has nothing to do; but it gets the interpreter
    while this function sleeps, and is then at work or has been. So only those are done that slept all that time.
    """
    if not _sleep_of_gloo_threads():
        time.sleep(_THREADS_UNSEEN_S)  # torch 2.6 gives its threads no names: there is nothing to look at
        return
    deadline = time.monotonic() + _THREADS_END_S
    before: dict[str, str] | None = None
    while time.monotonic() < deadline:
        now = _sleep_of_gloo_threads()
        if now == before and "" not in now.values():
            return
        before = now
        time.sleep(_THREADS_LOOK_S)


def _sleep_of_gloo_threads() -> dict[str, str]:
    """Return what Linux says of each thread: how often it went to sleep, "" while it is awake; elsewhere nothing."""
    found = {}
    for path in Path("/proc/self/task").glob("*/status"):
        with suppress(OSError):  # the thread is gone
            status = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
            # Its other thread waits for the network, and looks up a hundred times a second; it has no tensors.
            if status["Name"].strip() == "pt_gloo_runloop":
                is_asleep = status["State"].split()[0] == "S"
                found[path.parent.name] = status["voluntary_ctxt_switches"].strip() if is_asleep else ""
    return found
