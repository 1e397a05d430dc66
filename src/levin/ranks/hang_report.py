"""Which of several processes holds up the others, and why: read from what each of them reports."""

from __future__ import annotations

import json
import os
import re
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from levin.utilities.stacks import Call
from levin.utilities.user_frames import describe_different_calls, is_users

# What an error of a collective looks like, when another process is the reason for it.
_ECHO = re.compile(
    r"gloo|nccl|connection (closed|reset|refused|was)|timed out|broken pipe|socket|store|peer|wait timeout",
    re.IGNORECASE,
)
_NAMED_AT_MOST = 8
_FRAMES_AT_MOST = 14
_PROCESS_STATES = {
    "T": "it was stopped by a signal (SIGSTOP or a debugger)",
    "t": "it was stopped by a debugger",
    "Z": "it has ended",
    "X": "it has ended",
    "D": "it waits for a disk or a network file system",
}


@dataclass
class Report:
    """What one rank says of itself, or, when it is silent, what it said last.

    Args:
        rank: The rank.
        host: Name of its machine.
        pid: Its process.
        place: Where it is in the run.
        stuck_s: Seconds since it last moved.
        counts: Process group -> how many collectives it has begun there.
        is_in_collective: Whether its main thread waits for the others.
        collective: The last of them.
        is_alive: Whether it still answers.
        has_left: Whether its run has ended well.
        process_state: What its machine says of the process, where that could be asked; "" otherwise.
        stack: What its main thread does; "" when unknown.
        call: The function that the user's code called last, which has not returned; "" when unknown.
        line: Where that code is, and what stands there.
        failure: The traceback it failed with; "" when it did not fail.
        is_secondary_failure: Whether that failure was that of a collective, which has its reason in another rank.
        order: Which of all failures it was, from 1 on.
    """

    rank: int
    host: str = ""
    pid: int = 0
    place: str = ""
    stuck_s: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    is_in_collective: bool = False
    collective: str = ""
    is_alive: bool = True
    has_left: bool = False
    process_state: str = ""
    stack: str = ""
    call: str = ""
    line: str = ""
    failure: str = ""
    is_secondary_failure: bool = False
    order: int = 0

    def dump(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str | bytes) -> Report:
        """Take up :meth:`dump`."""
        return cls(**json.loads(text))

    @property
    def label(self) -> str:
        """Rank, process and machine."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def diagnose(reports: Iterable[Report]) -> str:
    """Return which rank is the reason why the others do not get on, and what it does.

    Args:
        reports: One per rank.

    Example:
        >>> print(diagnose([Report(0, place="step 7", counts={"0": 9}), Report(1, place="step 6", counts={"0": 8})]))
        Rank 1 is late, the others wait for it.
        rank 1 (process 0 on ): step 6, for 0 s; it has begun 8 collectives, the others up to 9.
        rank 0 (process 0 on ): step 7, for 0 s.
    """
    everyone = sorted(reports, key=lambda report: report.rank)
    failed = sorted((r for r in everyone if r.failure and not r.is_secondary_failure), key=lambda report: report.order)
    if failed:
        first = failed[0]
        return _compose(
            f"Rank {first.rank} failed first.",
            [f"{first.label}: {first.place}\n{_indent(first.failure)}"],
            [],
            everyone,
        )
    silent = [r for r in everyone if not r.is_alive and not r.has_left]
    if silent:
        lines = [f"{r.label}: last seen at {r.place or 'set-up'}; {_why_silent(r)}." for r in silent]
        verb = "gives" if len(silent) == 1 else "give"
        return _compose(f"{_names(silent)} {verb} no sign of life.", lines, silent, everyone)
    left = [r for r in everyone if r.has_left]
    if left and len(left) < len(everyone):
        lines = [f"{r.label}: its run ended at {r.place}." for r in left]
        return _compose(f"{_names(left)} left the run, the others wait.", lines, left, everyone)
    most = _most(everyone)
    behind = [r for r in everyone if any(r.counts.get(group, 0) < count for group, count in most.items())]
    ahead = [r for r in everyone if any(r.counts.get(group, 0) > min(_counts(everyone, group)) for group in most)]
    late = [r for r in behind if r not in ahead]
    if late:
        lines = [
            f"{r.label}: {r.place}, for {r.stuck_s:.0f} s; it has begun {sum(r.counts.values())} collectives, the others up "
            f"to {sum(most.values())}.{_indented_stack(r)}"
            for r in late
        ]
        verb, them = ("is", "it") if len(late) == 1 else ("are", "them")
        return _compose(f"{_names(late)} {verb} late, the others wait for {them}.", lines, late, everyone)
    if behind or len({_kind(r.collective) for r in everyone if r.collective}) > 1:
        lines = [
            f"{r.label}: {r.place}, for {r.stuck_s:.0f} s, in {r.collective or 'a collective'}.{_indented_stack(r)}"
            for r in everyone
        ]
        return _compose("The ranks went different ways and wait for each other.", lines, everyone, everyone)
    lines = [f"{r.label}: {r.place}, for {r.stuck_s:.0f} s, in {r.collective or 'no collective'}." for r in everyone]
    return _compose(
        "All ranks are alive and at the same place: the network between them is broken.", lines, everyone, everyone
    )


def is_deadlock(reports: Iterable[Report], stuck_s: float) -> bool:
    """Return whether all ranks wait for one that has left, or for each other in different collectives: no time will help.

    Ranks that go the same way begin the collectives of their groups in the same order. So none of them can be ahead of
    another in one group and behind it in another one, and the one that all have begun last is the same.

    Args:
        reports: One per rank.
        stuck_s: For how many seconds all that have not left must not have moved.

    Example:
        >>> ahead = Report(0, stuck_s=9, is_in_collective=True, counts={"gradients": 5, "control": 2})
        >>> ended = Report(1, stuck_s=9, is_in_collective=True, counts={"gradients": 4, "control": 3})
        >>> is_deadlock([ahead, ended], 5), is_deadlock([ahead, ahead], 5)
        (True, False)
        >>> left = Report(1, has_left=True, counts={"gradients": 4})
        >>> is_deadlock([ahead, left], 5), is_deadlock([Report(0, stuck_s=9, is_in_collective=True, counts={"others": 3}), left], 5)
        (True, False)
    """
    everyone = list(reports)
    present = [report for report in everyone if not report.has_left]
    if not all(report.is_in_collective and report.stuck_s >= stuck_s for report in present):
        return False
    if len(present) < len(everyone):
        return any(_is_ahead(one, other) for one in present for other in everyone if other.has_left)
    first = everyone[0]
    if any(_is_ahead(first, report) and _is_ahead(report, first) for report in everyone):
        return True
    if any(report.counts != first.counts for report in everyone):
        return False
    # Not by what is sent, which may be different on each.
    names = {report.collective.split(" ")[0] for report in everyone}
    numbers = {report.collective.rpartition("#")[2] for report in everyone}
    return len(names) > 1 and len(numbers) == 1


def _is_ahead(one: Report, other: Report) -> bool:
    """Whether a rank has begun more collectives of a group than another one, which belongs to it."""
    return any(count > other.counts.get(group, count) for group, count in one.counts.items())


def _counts(reports: list[Report], group: str) -> list[int]:
    return [report.counts.get(group, 0) for report in reports]


def _most(reports: list[Report]) -> dict[str, int]:
    groups = {group for report in reports for group in report.counts}
    return {group: max(_counts(reports, group)) for group in groups}


def _compose(headline: str, lines: list[str], named: list[Report], everyone: list[Report]) -> str:
    shown = lines[:_NAMED_AT_MOST]
    if len(lines) > len(shown):
        shown.append(f"... and {len(lines) - len(shown)} more ranks.")
    others = [r for r in everyone if r not in named and not r.failure and r.is_alive and not r.has_left]
    if others:
        first = others[0]
        waits = f", in {first.collective}" if first.collective else ""
        shown.append(f"{first.label}: {first.place}, for {first.stuck_s:.0f} s{waits}.")
        if len(others) > 1:
            shown.append(f"... and {len(others) - 1} more ranks that wait.")
    return "\n".join([headline, *shown, *_different_calls(everyone)])


def _different_calls(everyone: list[Report]) -> list[str]:
    """Return what to do where ranks wait in calls that other ranks have not made."""
    if any(report.failure and not report.is_secondary_failure for report in everyone):
        return []
    by_call: dict[str, list[Report]] = {}
    for report in everyone:
        by_call.setdefault("" if report.has_left else report.call, []).append(report)
    lines = {ranks[0].line: [report.rank for report in ranks] for call, ranks in by_call.items() if call}
    return [describe_different_calls(lines)] if len(by_call) > 1 and lines else []


def _names(reports: list[Report]) -> str:
    ranks = [str(r.rank) for r in reports[:_NAMED_AT_MOST]]
    more = ", ..." if len(reports) > len(ranks) else ""
    return f"{'Rank' if len(reports) == 1 else 'Ranks'} {', '.join(ranks)}{more}"


def _why_silent(report: Report) -> str:
    if report.process_state:
        return report.process_state
    return "no Python code runs in it, or its machine or the network to it is gone"


def _kind(collective: str) -> str:
    return collective.split(" #")[0]


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())


def _indented_stack(report: Report) -> str:
    return f" It does:\n{_indent(report.stack)}" if report.stack else ""


def is_secondary_failure(error: BaseException) -> bool:
    """Return whether an error is that of a collective, which has its reason in another process.

    Example:
        >>> is_secondary_failure(RuntimeError("[gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3422"))
        True
        >>> is_secondary_failure(KeyError("weights"))
        False
    """
    if isinstance(error, dist.DistError):
        return True
    return type(error) in (RuntimeError, ConnectionError) and bool(_ECHO.search(str(error)))


def state_of_process(pid: int) -> str:
    """Return what keeps a process of this machine from answering, in words.

    Args:
        pid: The process.
    """
    status = Path(f"/proc/{pid}/status")
    if not Path("/proc/self/status").exists():
        return "" if _exists(pid) else "it has ended"
    try:
        text = status.read_text()
    except OSError:
        return "it has ended"
    found = re.search(r"^State:\s+(\S)", text, re.MULTILINE)
    return _PROCESS_STATES.get(found.group(1) if found else "?", "")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def format_stack(calls: Sequence[Call]) -> str:
    """Return calls, the innermost first, as text, the innermost last: those of the user's code, and the innermost."""
    shown = [call for i, call in enumerate(calls) if i == 0 or is_users(call.filename)][:_FRAMES_AT_MOST]
    return "".join(traceback.format_list([traceback.FrameSummary(*call) for call in reversed(shown)]))


def last_collective() -> str:
    """Return the name, the size and the number of the last collective, from torch's flight recorder; "" without one."""
    dump: Any = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return ""
    entries = json.loads(dump()).get("entries", [])
    if not entries:
        return ""
    last = max(entries, key=lambda entry: entry.get("record_id", 0))
    number = last.get("p2p_seq_id") if last.get("is_p2p") else last.get("collective_seq_id")
    name = str(last.get("profiling_name", "")).split(":")[-1]
    return f"{name} of {last.get('input_sizes') or last.get('output_sizes')} #{number}"
