"""Who is to blame, given what each rank reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from levin.ranks.hang_report import (
    Report,
    diagnose,
    format_stack,
    is_deadlock,
    is_secondary_failure,
    last_collective,
    state_of_process,
)
from levin.utilities.stacks import Call, calls_in
from levin.utilities.user_frames import call_under_way


def reports(**of_rank_one) -> list[Report]:
    others = [Report(rank, place="step 7", counts={"0": 9}, collective="all_reduce of [[5]] #9") for rank in (0, 2)]
    return [*others, Report(1, host="b", pid=77, **of_rank_one)]


WAITING = "rank 0 (process 0 on ): step 7, for 0 s, in all_reduce of [[5]] #9.\n... and 1 more ranks that wait."
SECOND = "rank 2 (process 0 on ): step 7, for 0 s, in all_reduce of [[5]] #9."


def test_the_rank_that_has_begun_fewer_collectives_is_late():
    everyone = reports(place="training_step, step 6", counts={"0": 8}, stuck_s=12.4, stack="File x\n  wait()\n")
    late = "training_step, step 6, for 12 s; it has begun 8 collectives, the others up to 9. It does:\n    File x\n      wait()"
    assert diagnose(everyone) == (
        f"Rank 1 is late, the others wait for it.\nrank 1 (process 77 on b): {late}\n{WAITING}"
    )
    everyone[1].counts, everyone[1].place = {"0": 8}, "set-up"
    assert diagnose(everyone) == (
        f"Ranks 1, 2 are late, the others wait for them.\nrank 1 (process 77 on b): {late}\n"
        "rank 2 (process 0 on ): set-up, for 0 s; it has begun 8 collectives, the others up to 9.\n"
        "rank 0 (process 0 on ): step 7, for 0 s, in all_reduce of [[5]] #9."
    )


def test_a_rank_that_answers_nothing_is_named_with_what_its_machine_says():
    everyone = reports(place="step 6", is_alive=False, process_state="it has ended")
    first = "rank 1 (process 77 on b): last seen at step 6; it has ended."
    assert diagnose(everyone) == f"Rank 1 gives no sign of life.\n{first}\n{WAITING}"
    everyone[0].is_alive, everyone[0].place = False, ""
    assert diagnose(everyone) == (
        "Ranks 0, 1 give no sign of life.\nrank 0 (process 0 on ): last seen at set-up; no Python code runs in it, or its machine "
        f"or the network to it is gone.\n{first}\n{SECOND}"
    )


def test_a_failure_comes_before_its_echoes_and_before_what_they_leave():
    everyone = reports(failure="KeyError: 'x'\n  more\n", order=3, place="training_step, step 6")
    everyone[0].failure, everyone[0].is_secondary_failure, everyone[0].order = (
        "RuntimeError: Connection closed by peer",
        True,
        1,
    )
    first = "Rank 1 failed first.\nrank 1 (process 77 on b): training_step, step 6\n    KeyError: 'x'\n      more"
    assert diagnose(everyone) == f"{first}\n{SECOND}"
    everyone[1].is_alive = False
    assert diagnose(everyone) == first
    everyone[1].is_alive, everyone[1].has_left = True, True
    assert diagnose(everyone) == first


def test_of_two_failures_the_first_is_told():
    everyone = reports(failure="KeyError: 'second'", order=2)
    everyone[0].failure, everyone[0].order = "ValueError: first", 1
    first = "Rank 0 failed first.\nrank 0 (process 0 on ): step 7\n    ValueError: first"
    assert diagnose(everyone) == f"{first}\n{SECOND}"


def test_a_rank_that_has_ended_its_run_well_is_named():
    everyone = reports(place="the end", has_left=True, is_alive=False)
    one = "rank 1 (process 77 on b): its run ended at the end."
    assert diagnose(everyone) == f"Rank 1 left the run, the others wait.\n{one}\n{WAITING}"
    for report in everyone:
        report.has_left, report.counts = True, {"0": 9}
    assert diagnose(everyone).startswith("All ranks are alive and at the same place")


def test_different_collectives_at_the_same_count():
    text = diagnose(reports(place="step 7", counts={"0": 9}, collective="broadcast of [[2]] #9"))
    assert text == (
        "The ranks went different ways and wait for each other.\nrank 0 (process 0 on ): step 7, for 0 s, in all_reduce of [[5]] #9.\n"
        f"rank 1 (process 77 on b): step 7, for 0 s, in broadcast of [[2]] #9.\n{SECOND}"
    )


def test_ranks_that_are_each_ahead_in_another_group_wait_for_each_other():
    everyone = reports(place="the end of the epoch", counts={"0": 8, "1": 5}, stack="File x\n  vote()", stuck_s=3)
    for other in everyone[:2]:
        other.counts = {"0": 9, "1": 4}
    assert diagnose(everyone) == (
        "The ranks went different ways and wait for each other.\nrank 0 (process 0 on ): step 7, for 0 s, in all_reduce of [[5]] #9.\n"
        "rank 1 (process 77 on b): the end of the epoch, for 3 s, in a collective. It does:\n    File x\n      vote()\n"
        + SECOND
    )


def test_everybody_at_the_same_place_means_the_network():
    text = diagnose(reports(place="step 7", counts={"0": 9}, stuck_s=8))
    assert text == (
        "All ranks are alive and at the same place: the network between them is broken.\n"
        "rank 0 (process 0 on ): step 7, for 0 s, in all_reduce of [[5]] #9.\n"
        f"rank 1 (process 77 on b): step 7, for 8 s, in no collective.\n{SECOND}"
    )


def test_a_thousand_ranks_are_told_in_a_few_lines():
    everyone = [Report(rank, counts={"0": 9}, place="step 7") for rank in range(1000)]
    for rank in range(500, 530):
        everyone[rank].counts = {"0": 8}
    lines = diagnose(everyone).splitlines()
    assert lines[0].startswith("Ranks 500, 501, 502, 503, 504, 505, 506, 507, ... are late")
    assert "... and 22 more ranks." in lines
    assert lines[-1] == "... and 969 more ranks that wait."
    assert len(lines) == 12


def test_a_report_travels_as_text():
    report = Report(3, host="a", stack="x\ny", failure="é", order=2)
    assert Report.load(report.dump().encode()) == report


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.1]:3"), True),
        (RuntimeError("unbound_buffer.cc:129] Timed out waiting 3000ms for send operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("peer"), False),
        (ConnectionError("REFUSED: the store is gone"), True),
        (NotImplementedError("gloo has no such thing"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_is_the_echo_of_another_rank(error, expected):
    assert is_secondary_failure(error) is expected


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system has no /proc")
def test_the_machine_says_what_became_of_a_process():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert "stopped" not in state_of_process(process.pid)
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 20
        while "stopped by a signal" not in state_of_process(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert state_of_process(process.pid) == "it has ended"


def test_a_stack_shows_the_users_calls_and_the_innermost():
    def inner():
        return format_stack(calls_in(traceback.walk_stack(sys._getframe())))

    text = inner()
    assert "test_a_stack_shows_the_users_calls" in text
    assert text.rstrip().endswith("return format_stack(calls_in(traceback.walk_stack(sys._getframe())))")
    calls = [
        Call("<frozen a>", 1, "wait"),
        Call("<frozen b>", 2, "step"),
        *(Call("mine.py", n, "train") for n in range(20)),
    ]
    shown = [
        *(f'  File "mine.py", line {n}, in train' for n in reversed(range(13))),
        '  File "<frozen a>", line 1, in wait',
    ]
    assert format_stack(calls).splitlines() == shown


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"profiling_name": "gloo:all_reduce", "input_sizes": [[5]], "collective_seq_id": 9}, "all_reduce of [[5]] #9"),
        (
            {"profiling_name": "recv", "is_p2p": True, "p2p_seq_id": 3, "collective_seq_id": 9, "output_sizes": [[2]]},
            "recv of [[2]] #3",
        ),
    ],
    ids=["all", "two"],
)
def test_the_collective_that_was_begun_last_is_read_from_torchs_record(monkeypatch, entry, expected):
    text = [json.dumps({"entries": [{"record_id": 1}, {**entry, "record_id": 2}, {}]}), "{}"]
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_fr_trace_json", lambda: text[0], raising=False)
    assert last_collective() == expected
    del text[0]
    assert last_collective() == ""
    monkeypatch.delattr(torch._C._distributed_c10d, "_dump_fr_trace_json")
    assert last_collective() == ""


def test_a_system_without_proc_says_whether_a_process_is_there(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert (state_of_process(os.getpid()), state_of_process(ended.pid)) == ("", "it has ended")

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert state_of_process(1) == ""


@pytest.mark.parametrize(
    ("counts", "collective", "expected"),
    [
        ({"0": 9, "control": 2}, "all_reduce of [[5]] #9", False),  # all at the same
        ({"0": 9, "control": 2}, "all_reduce of [[7]] #9", False),  # parts of different sizes
        ({"0": 9, "control": 2}, "broadcast of [[5]] #9", True),
        ({"0": 9, "control": 2}, "broadcast of [[5]] #8", False),  # in a thread beside the training
        ({"0": 8, "control": 2}, "broadcast of [[5]] #8", False),  # one is slow
        ({"0": 8, "control": 3}, "all_gather of [[16]] #3", True),
    ],
)
def test_ranks_wait_in_vain_where_they_went_different_ways(counts, collective, expected):
    first = Report(
        0, stuck_s=9, is_in_collective=True, counts={"0": 9, "control": 2}, collective="all_reduce of [[5]] #9"
    )
    second = Report(1, stuck_s=9, is_in_collective=True, counts=counts, collective=collective)
    assert is_deadlock([first, second], 5) == expected
    assert not is_deadlock([first, Report(1, stuck_s=9, counts={"0": 8, "control": 3})], 5), "one of them works"
    assert is_deadlock([first, second], 9) == expected and not is_deadlock([first, second], 9.1)


def test_a_call_between_two_lines_is_named_by_its_function():
    call, line = call_under_way([Call("<frozen step>", 3, "step"), Call("mine.py", 0, "train")])
    assert (call, line) == ("step", "`step` (mine.py, train)")


def test_ranks_may_go_on_without_one_that_has_left_in_groups_of_their_own():
    left = Report(2, has_left=True, counts={"0": 9, "control": 3})
    two = [Report(rank, stuck_s=9, is_in_collective=True, counts={"0": 9, "control": 3, "two": 5}) for rank in (0, 1)]
    assert not is_deadlock([*two, left], 5)
    two[0].counts["control"] = two[1].counts["control"] = 4
    assert is_deadlock([*two, left], 5), "they wait for it"


def test_what_some_ranks_alone_have_called_is_told_with_the_way_out():
    everyone = reports(
        counts={"0": 9}, call="Trainer.save_checkpoint", line="`trainer.save_checkpoint(x)` (a.py:3, end)"
    )
    for report in everyone[:2]:
        report.call, report.line = "Trainer.fit", "`trainer.fit(model)` (a.py:9, main)"
    advice = (
        ". Make them on all ranks, not below `if trainer.is_global_zero:` or the like; what writes a file does so on rank 0 alone by "
        "itself."
    )
    fit, save = "`trainer.fit(model)` (a.py:9, main)", "`trainer.save_checkpoint(x)` (a.py:3, end)"
    assert diagnose(everyone).splitlines()[-1] == (
        f"All ranks have to make the same calls, received {fit} on ranks 0, 2; {save} on rank 1{advice}"
    )
    # One that has left makes no call.
    everyone[2].has_left = True
    assert diagnose(everyone).splitlines()[-1] == (
        f"All ranks have to make the same calls, received {fit} on ranks 0, 2{advice}"
    )
    everyone[2].has_left, everyone[1].failure = False, "KeyError"
    assert "same calls" not in diagnose(everyone)
    everyone[1].failure, everyone[2].call = "", "Trainer.fit"
    assert "same calls" not in diagnose(everyone)
