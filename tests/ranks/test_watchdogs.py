"""What the watchdogs of two ranks tell each other: both in this process, over one store."""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from levin.ranks import hang_watchdog as watch
from levin.ranks.hang_report import Report
from levin.ranks.hang_watchdog import RunLocation, Watchdog
from levin.strategies import DDPStrategy, SingleDeviceStrategy
from levin.utilities.process_group import disconnect_processes
from levin.utilities.stacks import Call

SHORT, LONG = timedelta(seconds=0.25), timedelta(hours=1)
HERE = f"(process {os.getpid()} on {socket.gethostname()})"


@pytest.fixture
def ended(monkeypatch):
    """A process group of this process alone, and what would have ended the process."""
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=LONG)
    statuses = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(watch, "GRACE_S", 0.05)
    yield statuses
    for thread in threading.enumerate():
        if isinstance(thread, Watchdog):
            thread.stop()
    disconnect_processes()


class Patient(threading.Event):
    """Is waited for on a slow machine, too."""

    def wait(self, timeout=None):
        return super().wait(20.0)


def watchdogs(first=LONG, step=SHORT, size=2) -> list[Watchdog]:
    both = [Watchdog(rank, size, first, step) for rank in range(2)]
    for watchdog in both:
        watchdog._published, watchdog._diagnosed = Patient(), Patient()
    return both


def started(**settings) -> list[Watchdog]:
    both = watchdogs(**settings)
    for watchdog in both:
        watchdog.start()
    return both


def test_an_error_that_echoes_another_ranks_says_which_one_failed_first(ended):
    first, second = started()
    second.watch_progress(lambda: RunLocation(3, "training batch 3"))
    try:
        raise KeyError("broken")
    except KeyError as error:
        second.annotate_error(error)
        assert error.args == ("broken",)
    echo = RuntimeError("gloo: Connection closed by peer", 7)
    first.annotate_error(echo)
    text, *others = echo.args
    lines = text.splitlines()
    assert lines[:3] == [
        "Rank 1 failed first.", f"rank 1 {HERE}: training batch 3", "    Traceback (most recent call last):"
    ]  # fmt: skip
    assert lines[-1] == "gloo: Connection closed by peer" and "    KeyError: 'broken'" in lines
    assert others == [7] and first.verdict == "\n".join(lines[:-1])
    # It is told once.
    first.annotate_error(echo)
    assert echo.args == (text, 7)
    for watchdog in (first, second):
        watchdog.join(10)
    assert second.verdict == first.verdict and ended == []


def test_a_rank_that_never_said_a_word_is_named(ended):
    first, _ = watchdogs()
    first.start()
    echo = dist.DistError()
    first.annotate_error(echo)
    # Whether rank 0 has written down that it fails, or still what it did before, is a matter of the moment.
    assert echo.args[0].startswith(
        "Rank 1 gives no sign of life.\nrank 1 (process 0 on ): last seen at set-up; no Python code runs in it, or its machine or the "
        "network to it is gone.\n"
    )


def test_a_failure_is_told_before_the_process_that_has_it_ends(ended):
    first, second = watchdogs()
    second.beat_s = 600.0
    second.start()
    second.annotate_error(KeyError("broken"))
    report = first._read("report")[1]
    assert (report.failure, report.is_secondary_failure, report.order) == ("KeyError: 'broken'\n", False, 1)
    # With rank 0 the store goes, so it stays until all can have read who failed first.
    first.start()
    error = ValueError("here too")
    first.annotate_error(error)
    assert first.verdict.startswith("Rank 1 failed first.\n") and error.args == ("here too",)
    assert second._read("report")[0].order == 2


def test_a_store_that_does_not_answer_is_the_reason(ended, caplog):
    _, second = watchdogs()

    def fail(*_):
        raise RuntimeError("the store is gone")

    second._store = SimpleNamespace(set=fail, check=fail)
    second._heartbeat = fail
    second._wake.wait(0)
    started_s = time.monotonic()
    second.run = lambda: (time.sleep(0.2), Watchdog.run(second))
    second.start()
    echo = RuntimeError("Socket timed out")
    with caplog.at_level(logging.DEBUG, "levin"):
        second.annotate_error(echo)
        second.join(10)
    assert caplog.messages == ["rank 1 watches no more: the store is gone"]
    assert echo.args == (
        "The store that connects the processes does not answer: the process or machine of rank 0, or the network to it, is gone.\n"
        "Socket timed out",
    )
    assert time.monotonic() - started_s < 15.0
    # One that does not run says nothing.
    late = RuntimeError("Socket timed out")
    watchdogs()[0].annotate_error(late)
    assert late.args == ("Socket timed out",)


def test_a_run_that_has_ended_well_is_told_to_the_others(ended):
    first, second = started()
    assert first.is_of(dist.group.WORLD) and not first.is_of(None)
    second.watch_progress(lambda: RunLocation(3, "the end"))
    second.stop(has_left=True)
    assert not second.is_alive() and not second.is_of(dist.group.WORLD)
    report = first._read("report")[1]
    assert (report.has_left, report.place, report.failure, report.pid) == (True, "the end", "", os.getpid())
    second.stop(has_left=True)
    # Under multiprocessing nothing follows a run; otherwise it watches over what does.
    first.end_run()
    assert first.is_of(dist.group.WORLD)
    first._heartbeat()
    assert first._read("state")[0].place == "after the run"
    first.begin(SimpleNamespace(timeout=LONG, step_timeout=SHORT))
    first._heartbeat()
    assert first._read("state")[0].place == "set-up"
    first._is_raising = True
    first.end_run()
    assert not first.is_alive() and 0 not in first._read("report")


def test_what_ends_a_program_is_told_and_shown_as_before(ended, monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *given: shown.append(given))
    at_exit = []
    monkeypatch.setattr(atexit, "register", lambda *call, **how: at_exit.append((*call, how)))
    first, second = started()
    # A script that ends well leaves the others.
    assert at_exit == [(watchdog.stop, {"has_left": True}) for watchdog in (first, second)]
    error = KeyError("x")
    sys.excepthook(KeyError, error, None)
    assert shown == [(KeyError, error, None)]
    for watchdog in (first, second):
        assert watchdog._is_raising


def timeout(group=None) -> timedelta:
    return (group or dist.group.WORLD)._get_backend(torch.device("cpu")).options._timeout


def test_groups_wait_for_a_step_from_the_first_batch_to_the_end_of_the_run(ended):
    first, _ = watchdogs()
    users = dist.new_group([0], timeout=timedelta(minutes=7))
    place = [RunLocation(4, "batch 4")]
    first.watch_progress(lambda: place[0])
    first._heartbeat()
    assert (timeout(), first._is_short) == (LONG, False)
    place[0] = RunLocation(5, "batch 5")
    first._heartbeat()
    assert (timeout(), timeout(users), first._is_short) == (SHORT, timedelta(minutes=7), True)
    first.end_run()
    assert (timeout(), first._is_short) == (LONG, False)
    # Between runs it does not begin again.
    first._progress = (lambda: place[0]), 0
    first._heartbeat()
    assert timeout() == LONG
    first.begin(SimpleNamespace(timeout=LONG, step_timeout=SHORT))
    first.watch_progress(lambda: place[0])
    place[0] = RunLocation(6, "batch 6")
    first._heartbeat()
    assert timeout() == SHORT
    first.stop()
    assert (timeout(), first._is_short) == (LONG, False)


def test_a_beat_says_where_this_process_is_and_since_when(ended, monkeypatch):
    first, second = watchdogs()
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    first.watch_progress(lambda: RunLocation(4, "batch 4"))
    first._heartbeat()
    now[0] += 3.0
    first._heartbeat()
    # Through the same connection: another one may ask before the store has taken in what this one sent.
    report = first._read("state")[0]
    assert (report.rank, report.host, report.pid, report.place) == (0, socket.gethostname(), os.getpid(), "batch 4")
    assert (report.stuck_s, report.stack, report.is_in_collective, report.is_alive) == (3.0, "", False, True)
    assert "test_a_beat_says" in report.line and report.call
    dist.all_reduce(torch.zeros(5))
    first._heartbeat()
    report = first._read("state")[0]
    assert report.stuck_s == 0.0 and report.collective == "" and sum(report.counts.values()) >= 1
    now[0] += watch.DEADLOCK_S / 4 + 0.1
    first._heartbeat()
    report = first._read("state")[0]
    if hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):
        assert report.collective == watch.last_collective()
    assert "test_a_beat_says" in first._report(with_stack=True).stack
    # Of the rank that is here its machine can be asked.
    missing = second._missing()
    assert sorted(missing) == [0, 1] and not missing[0].is_alive and missing[0].place == "batch 4"
    assert (missing[1].pid, missing[1].is_alive, missing[1].process_state) == (0, False, "")


def waiting(watchdog, now, waited_s, counts=None) -> None:
    """Let a rank have waited in a collective for so long."""
    watchdog._calls = lambda: [Call("/lib/torch/distributed/c10d.py", 1, "all_reduce"), Call("mine.py", 2, "train")]
    watchdog._last, watchdog._moved_at = (RunLocation(0, ""), counts or {"0": 5}), now - waited_s


def test_a_rank_asks_when_it_has_waited_longer_than_it_may_for_one_that_is_behind(ended, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    _, second = watchdogs(first=timedelta(seconds=50), step=timedelta(seconds=20))
    state = {"0": 4}
    second._read = lambda kind: {0: Report(0, counts=state)} if kind == "state" else {}
    assert second.beat_s == 1.0
    for waited_s, is_short, expected in (
        (52.0, False, False),
        (52.1, False, True),
        (22.0, True, False),
        (22.1, True, True),
    ):
        waiting(second, now, waited_s)
        second._is_short = is_short
        assert second._should_ask() is expected, waited_s
    # Not where the others are as far, nor where it computes, nor without a limit.
    state["0"] = 5
    assert not second._should_ask()
    state.clear()
    assert second._should_ask()
    second._calls = lambda: [Call("mine.py", 2, "train"), Call("/lib/torch/distributed/c10d.py", 1, "all_reduce")]
    assert not second._should_ask()
    waiting(second, now, 1000.0)
    second._is_short, second._first_timeout = False, None
    assert not second._should_ask()
    # One that fails asks where it does not know why.
    second._is_raising = True
    assert not second._should_ask()
    second._wants_verdict = True
    assert second._should_ask()


def test_rank_zero_looks_now_and_then_whether_all_wait_for_each_other(ended, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    first, second = watchdogs(first=LONG, step=LONG)

    def stuck(rank, counts):
        return Report(rank, stuck_s=2.5, is_in_collective=True, counts=counts)

    states = {0: stuck(0, {"a": 5, "b": 2})}
    reports = {}
    for watchdog in (first, second):
        watchdog._read = lambda kind: dict(states if kind == "state" else reports)
        waiting(watchdog, now, watch.DEADLOCK_S)
    assert not first._should_ask() and first._next_comparison_s == watch.DEADLOCK_S
    for watchdog in (first, second):
        waiting(watchdog, now, 5.1)
    # Not before all have spoken.
    assert not first._should_ask() and first._next_comparison_s == pytest.approx(10.1)
    states[1] = stuck(1, {"a": 4, "b": 3})
    assert not first._should_ask(), "it has just looked"
    waiting(first, now, 10.2)
    assert not second._should_ask() and not first._store.check(["is_deadlock"])
    assert first._should_ask() and first._store.check(["is_deadlock"])
    # One that has left is waited for in vain as well; one that failed is none of these.
    states[1] = Report(1, counts={"a": 4, "b": 2})
    waiting(first, now, 20.0)
    assert not first._should_ask()
    reports[1] = Report(1, has_left=True, counts={"a": 4, "b": 2})
    waiting(first, now, 40.0)
    assert first._should_ask()
    reports[1].has_left = False
    waiting(first, now, 80.0)
    assert not first._should_ask()


@pytest.fixture
def slept(monkeypatch):
    """The time, which goes on by what is slept alone."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda s: now.append(now.pop() + s))
    return now


@pytest.mark.parametrize(
    ("rank", "alarm", "is_deadlock", "waited_s", "grace_s"),
    [(0, "0", False, 4, 0.05), (0, "1", True, 8, 0.05), (1, "0", False, 8, 0.05), (1, "1", True, 4, 0.0)],
)
def test_who_asks_waits_for_the_others_and_they_wait_for_what_it_finds(
    ended, slept, rank, alarm, is_deadlock, waited_s, grace_s
):
    watchdog, graces = watchdogs(step=LONG)[rank], []
    watchdog._wait_until_told, watchdog._end_unless_raised = (lambda: None), graces.append
    watchdog._store.set("alarm", alarm)
    if is_deadlock:
        watchdog._store.set("is_deadlock", "")
    watchdog._find_out()
    assert slept[0] == pytest.approx(waited_s, abs=0.11) and graces == [grace_s]
    assert watchdog.verdict.startswith(f"Rank {1 - rank} gives no sign of life.") and watchdog._diagnosed.is_set()
    assert "test_who_asks" in watchdog._read("report")[rank].stack and watchdog._store.check([f"told/{rank}"])
    # Who comes later takes what was found.
    later = watchdogs(step=LONG)[rank]
    later._wait_until_told, later._end_unless_raised = (lambda: None), graces.append
    later._store.set("alarm", alarm)
    later._store.set("verdict", "found")
    before = slept[0]
    later._find_out()
    assert later.verdict == "found" and slept[0] == before


@pytest.mark.parametrize(
    ("report", "missing", "waited_s"),
    [
        (None, None, 0),
        (Report(1), None, 4),
        (Report(0), None, 0),
        (Report(1, has_left=True), None, 0),
        (Report(1, failure="KeyError"), None, 0),
        (Report(1, failure="gloo", is_secondary_failure=True), None, 4),
        (None, Report(1), 4),
        (None, Report(1, process_state="it has ended"), 0),
    ],
)
def test_the_store_stays_until_those_that_wait_have_been_told(ended, slept, report, missing, waited_s):
    first = watchdogs(step=LONG)[0]
    first._store.set("told/0", "")
    first._read = lambda kind: {} if report is None else {report.rank: report}
    first._missing = lambda: {} if missing is None else {1: missing}
    first._wait_until_told()
    assert slept[0] == pytest.approx(waited_s, abs=0.11)


@pytest.mark.parametrize(
    ("change", "is_ended"),
    [
        ({}, True),
        ({"_is_raising": True}, False),
        ({"is_over": True}, False),
        ({"_is_between_runs": True}, False),
        ({"_is_between_runs": True, "waits": True}, True),
    ],
    ids=str,
)
def test_a_process_that_does_not_raise_is_ended_when_the_others_have_given_up(
    ended, monkeypatch, capsys, tmp_path, change, is_ended
):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    first, _ = watchdogs()
    first.verdict = "Rank 1 is late."
    first._calls = lambda: [Call("/lib/torch/autograd/x.py" if change.get("waits") else "mine.py", 1, "f")]
    for name in change.keys() & {"_is_raising", "_is_between_runs"}:
        setattr(first, name, True)
    if "is_over" in change:
        first._is_over.set()
    first._end_unless_raised(0.01)
    reason = "Ended after 0.01 s of grace. Rank 1 is late."
    assert ended == [1] * is_ended and capsys.readouterr().err == f"[rank 0] {reason}\n" * is_ended
    if is_ended:
        assert reason in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


def test_a_process_that_outlives_its_agent_ends(ended, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    first, _ = watchdogs()
    first._heartbeat()
    assert ended == []
    agent = os.getppid()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    first._heartbeat()
    assert ended == [1]
    assert capsys.readouterr().err == (
        f"[rank 0] torchrun's agent (process {agent}), which started this process, is gone.\n"
    )
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    watchdogs()[0]._heartbeat()
    assert ended == [1]


@pytest.mark.parametrize(
    ("size", "first", "step", "beat_s"),
    [
        (2, LONG, LONG, 1.0), (1500, LONG, LONG, 1.5), (2, LONG, timedelta(seconds=2), 0.4), (2, timedelta(seconds=1), LONG, 0.2),
        (2, None, timedelta(seconds=2), 0.4), (2, LONG, timedelta(seconds=0.1), 0.05),
    ],
)  # fmt: skip
def test_beats_are_as_frequent_as_the_shortest_wait_and_the_number_of_ranks_ask_for(ended, size, first, step, beat_s):
    assert Watchdog(0, size, first, step).beat_s == pytest.approx(beat_s)


def test_alone_there_is_nobody_to_watch():
    assert watch.start_watchdog(SingleDeviceStrategy("cpu")) is None
    assert watch.start_watchdog(DDPStrategy()) is None


def test_the_next_run_goes_on_with_the_same_watchdog(ended, monkeypatch):
    monkeypatch.setattr(watch, "_present", None)
    strategy = DDPStrategy(timeout=LONG, step_timeout=SHORT)
    strategy.environment = SimpleNamespace(world_size=lambda: 2, global_rank=lambda: 0)
    first = watch.start_watchdog(strategy)
    assert first.is_alive() and first.name == "levin-watch" and first.daemon and first.beat_s == 0.05
    first.end_run()
    assert watch.start_watchdog(strategy) is first
    first._heartbeat()
    assert first._read("state")[0].place == "set-up"
    first.stop()
    second = watch.start_watchdog(strategy)
    assert second is not first and second.is_alive()
    # Runs are kept apart.
    assert first._store.check(["state/0"]) and not second._read("report")
    atexit.unregister(second.stop)
