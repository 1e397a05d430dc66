"""`levin launch`, run as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import levin
from levin.launchers import torchrun
from levin.launchers.torchrun import complete, first_failure, named_options
from levin.utilities.processors import count_processors

SOURCE = Path(levin.__file__).parents[1]


def launch(folder: Path, *words: object, program: str = "") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "OMP_NUM_THREADS")}
    (folder / "program.py").write_text(program)
    return subprocess.run(
        [sys.executable, "-m", "levin", "launch", *map(str, words)], cwd=folder, text=True, capture_output=True,
        env={**environment, "PYTHONPATH": str(SOURCE)}, timeout=120,
    )  # fmt: skip


def settings(*words: str):
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    given = parser.parse_args(list(words))
    named = named_options(parser, words)
    complete(given, named)
    return given


def test_a_script_runs_in_each_process_as_the_main_program(tmp_path):
    done = launch(
        tmp_path, "--nproc-per-node", 2, "program.py", "--lr", "0.1",
        program="""
import os, sys
from multiprocessing.reduction import ForkingPickler

class Here:
    pass

assert sys.modules["__main__"].Here is Here
ForkingPickler.dumps(Here())
names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID")
open("rank-" + os.environ["RANK"], "w").write(" ".join([*sys.argv, *(os.environ[name] for name in names)]))
print("said by", os.environ["RANK"])
""",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads = max(1, count_processors() // 2)
    for rank in range(2):
        words = (tmp_path / f"rank-{rank}").read_text().split()
        assert words[:6] == ["program.py", "--lr", "0.1", str(rank), "2", str(threads)]
    assert "said by 0" in done.stdout
    assert "said by 1" not in done.stdout
    (other,) = (tmp_path / "levin_logs").glob("*/attempt_0/1/stdout.log")
    assert other.read_text() == "said by 1\n"


def test_the_failing_processs_own_traceback_is_shown_first(tmp_path):
    done = launch(
        tmp_path, "--nproc-per-node=2", "program.py",
        program="""
import os, time
if os.environ["RANK"] == "1":
    raise KeyError("broken here")
time.sleep(100)
""",
    )  # fmt: skip
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("Rank 1 failed first") :]
    assert 'program.py", line 4' in told
    assert "KeyError: 'broken here'" in told


def test_a_process_that_leaves_no_traceback_is_told_with_its_last_words(tmp_path):
    done = launch(
        tmp_path, "--nproc-per-node=2", "program.py",
        program="""
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(100)
""",
    )  # fmt: skip
    assert done.returncode == 128 + 9
    told = done.stderr[done.stderr.index("Rank 1 failed first") :]
    assert "ended by SIGKILL" in told
    assert "last words" in told


def test_a_killed_process_is_named_before_those_that_failed_for_want_of_it(tmp_path):
    # Both are found dead at one look; only the one that failed in consequence has left a time.
    done = launch(
        tmp_path, "--nproc-per-node=2", "--monitor-interval=4", "program.py",
        program="""
import os, pathlib, signal, threading
if os.environ["RANK"] == "1":
    pathlib.Path("pid").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)
while not pathlib.Path("pid").exists():
    threading.Event().wait(0.01)
raise RuntimeError("nobody answers")
""",
    )  # fmt: skip
    assert done.returncode == 128 + 9
    told = done.stderr[done.stderr.index("Rank 1 failed first") :]
    assert "After it: rank 0 (exit status 1)." in told


@pytest.mark.parametrize(
    ("found", "first"),
    [
        ({0: (-15, 21), 1: (-9, 22)}, 1),  # rank 0 had written its error when torchrun ended it
        ({0: (-15, 22), 1: (-9, 22)}, 1),
        ({0: (143, 21), 1: (1, 22)}, 1),  # ended in good order when torchrun asked it to
        ({0: (-9, 52), 1: (1, 21)}, 1),  # torchrun's own SIGKILL, to a process that hung
        ({0: (-6, 22), 1: (1, 21)}, 1),  # given up by its communication after the error of another
        ({0: (1, 22), 1: (1, 21), 2: (-15, 20)}, 1),
        ({0: (-15, 22), 1: (-15, 21)}, 1),
        ({0: (1, 22), 1: (-9, 25)}, 1),  # found dead at a later look
    ],
)
def test_who_failed_first_is_found_within_one_second(found, first):
    failures = {rank: SimpleNamespace(exitcode=code, timestamp=time) for rank, (code, time) in found.items()}
    assert first_failure(failures) == first


def failure(folder: Path, rank: int, code: int, traceback: str | None = None, timestamp: int = 21):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    written = folder / f"error-{rank}.json"
    if traceback is not None:
        extra = {"timestamp": str(timestamp), "py_callstack": traceback}
        written.write_text(json.dumps({"message": {"message": "Short", "extraInfo": extra}}))
    return ProcessFailure(rank, 100 + rank, code, str(written))


@pytest.fixture
def failing(tmp_path, monkeypatch, capsys):
    """Run a command whose processes end so, and return its status and what it says."""

    def run(error: BaseException) -> tuple[int, str]:
        def end(given):
            assert given.nproc_per_node == "2"
            raise error

        monkeypatch.setattr("torch.distributed.run.run", end)
        (tmp_path / "train.py").write_text("")
        words = ["--nproc-per-node", "2", "--log-dir", str(tmp_path / "logs"), str(tmp_path / "train.py")]
        with mock.patch.dict(os.environ):
            return torchrun.main(words), capsys.readouterr().err

    return run


def test_what_is_said_of_a_failure_with_a_traceback(tmp_path, failing):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    others = {rank: failure(tmp_path, rank, -15 if rank % 2 else 3, "Late", 30) for rank in (0, *range(2, 10))}
    found = {1: failure(tmp_path, 1, 7, "Traceback of rank 1\nKeyError: 'here'\n"), **others}
    listed = ", ".join(f"{rank} ({'ended by SIGTERM' if rank % 2 else 'exit status 3'})" for rank in (0, *range(2, 9)))
    assert failing(ChildFailedError("train.py", found)) == (
        7,
        "Rank 1 failed first: process 101, exit status 7.\nTraceback of rank 1\nKeyError: 'here'\n"
        f"After it: rank {listed}, ....\n",
    )
    found.pop(9)
    assert failing(ChildFailedError("train.py", found))[1].endswith(f"After it: rank {listed}.\n")


def test_what_is_said_of_a_failure_without_a_traceback(tmp_path, failing):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    error = ChildFailedError("train.py", {1: failure(tmp_path, 1, -9)})
    assert failing(error) == (137, "Rank 1 failed first: process 101, ended by SIGKILL.\n")
    for attempt, lines in enumerate((["an earlier attempt"], [f"line {number}" for number in range(30)])):
        log = tmp_path / f"logs/none_x/attempt_{attempt}/1/stderr.log"
        log.parent.mkdir(parents=True)
        log.write_text("\n".join(lines))
        os.utime(log, (attempt, attempt))
    last = "\n".join(f"    line {number}" for number in range(10, 30))
    told = f"Rank 1 failed first: process 101, ended by SIGKILL.\nIt left no traceback. The end of {log}:\n{last}\n"
    assert failing(error) == (137, told)
    # What another program wrote in the place of the error.
    (tmp_path / "error-1.json").write_text(json.dumps({"message": "Short"}))
    assert failing(ChildFailedError("train.py", {1: failure(tmp_path, 1, -9)})) == (137, told)


def test_what_is_said_of_a_signal(failing):
    from torch.distributed.elastic.multiprocessing.api import SignalException

    told = "Ended by SIGTERM, which was passed on to the processes.\n"
    assert failing(SignalException("got it", signal.SIGTERM)) == (143, told)


def test_processes_that_end_well_and_what_is_told_to_torchrun(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("torch.distributed.run.run", seen.append)
    monkeypatch.setattr(torchrun, "count_processors", lambda: 7)
    with mock.patch.dict(os.environ):
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.pop("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", None)
        # A module, a program and a function are not looked for as files.
        for words in (["-m", "absent"], ["--no-python", "absent"], ["--run-path", "absent"]):
            assert torchrun.main(["--nproc-per-node=3", *words]) == 0
        assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]) == ("2", "1")
        torchrun.main(["--nproc-per-node=auto", "-m", "absent"])
        os.environ.update(OMP_NUM_THREADS="5", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="0")
        torchrun.main(["--nproc-per-node=9", "-m", "absent"])
        assert (os.environ["OMP_NUM_THREADS"], os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]) == ("5", "0")
        del os.environ["OMP_NUM_THREADS"]
        torchrun.main(["--nproc-per-node=9", "-m", "absent"])
        assert os.environ["OMP_NUM_THREADS"] == "1"
    assert [given.redirects for given in seen[2:5]] == ["1:3,2:3", "0", ",".join(f"{rank}:3" for rank in range(1, 9))]


def test_defaults_are_set_only_where_the_user_left_them_open(monkeypatch):
    monkeypatch.setattr("levin.launchers.torchrun._num_gpus", lambda: 0)
    given = settings("train.py", "--lr", "1")
    assert (given.nproc_per_node, given.standalone, given.log_dir, given.redirects) == ("1", True, "levin_logs", "0")
    assert (given.module, given.training_script) == (True, "levin.launchers.recorded")
    assert given.training_script_args == ["script", "train.py", "--lr", "1"]
    given = settings(
        "--nproc_per_node=4", "--nnodes", "2", "--rdzv-endpoint", "a:1", "--log-dir", "x", "--tee=3", "-m", "t"
    )
    assert (given.nproc_per_node, given.standalone, given.log_dir, given.redirects) == ("4", False, "x", "0")
    assert given.training_script_args == ["module", "t"]
    assert not settings("--nnodes", "2", "train.py").standalone
    for option in ("--rdzv-endpoint=a:1", "--node-rank=0", "--master-addr=a", "--master-port=1"):
        assert not settings(option, "train.py").standalone, option
    # What is no script of Python's own way of starting stays what it is.
    for way in ("--no-python", "--run-path"):
        given = settings(way, "train.py", "x")
        assert (given.training_script, given.training_script_args) == ("train.py", ["x"])
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert settings("train.py").redirects == "1:3,2:3"
    monkeypatch.setattr("levin.launchers.torchrun._num_gpus", lambda: 8)
    monkeypatch.delenv("PET_NPROC_PER_NODE")
    assert settings("train.py").nproc_per_node == "8"


def test_an_unknown_option_is_refused(capsys):
    from levin.__main__ import main

    with pytest.raises(SystemExit):
        main(["launch", "--nprocs", "2", "train.py"])
    assert "--nprocs" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["launch"], ["fabric", "run"]])
def test_a_script_that_is_not_there_is_said_before_a_process_starts(words):
    from levin.__main__ import main

    with pytest.raises(SystemExit, match="'absent.py' is no script that exists"):
        main([*words, "absent.py"])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_said_in_the_status(tmp_path, number, status):
    (tmp_path / "program.py").write_text("import time; open('up', 'w').close(); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", "levin", "launch", "--nproc-per-node", "1", "program.py"], cwd=tmp_path, text=True,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(SOURCE)},
        # A process that a shell starts in the background ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "up").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert f"Ended by {number.name}, which was passed on to the processes." in errors
    assert "SignalException" not in errors
