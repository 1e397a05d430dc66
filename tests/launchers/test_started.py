"""The launcher of scripts beside small programs that stand for its processes, in this process."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest

from levin.environments import LightningEnvironment
from levin.launchers import SubprocessLauncher, script
from levin.utilities.exceptions import SIGTERMException

OURS = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LEVIN_HYDRA_JOB")
HANGING = "import time; time.sleep(60)"
HERE = """
import json, os, sys
json.dump([dict(os.environ), os.getcwd()], open(f"rank-{os.environ['LOCAL_RANK']}.tmp", "w"))
os.rename(f"rank-{os.environ['LOCAL_RANK']}.tmp", f"rank-{os.environ['LOCAL_RANK']}")
"""


@pytest.fixture
def started(tmp_path, monkeypatch):
    """A function that makes a launcher whose processes run the given programs; what happens at the exit of this process."""
    at_exit, left = [], []
    monkeypatch.setattr(script, "_POLL_S", 0.02)
    monkeypatch.setattr(script, "_ECHO_S", 1.0)
    monkeypatch.setattr(script.atexit, "register", at_exit.append)
    monkeypatch.setattr(script.os, "_exit", left.append)
    monkeypatch.delattr(sys, "last_value", raising=False)
    made: list[SubprocessLauncher] = []

    def make(*programs: str) -> SubprocessLauncher:
        def command(local_rank):
            return [sys.executable, "-I", "-S", "-c", programs[local_rank - 1]], str(tmp_path)

        monkeypatch.setattr(script, "script_command", command)
        made.append(SubprocessLauncher(LightningEnvironment(), len(programs) + 1, num_nodes=2))
        return made[-1]

    with mock.patch.dict(os.environ):
        for name in OURS:
            os.environ.pop(name, None)
        yield SimpleNamespace(launcher=make, at_exit=at_exit, left=left)
    for launcher in made:
        if launcher._watcher is not None:
            launcher._watcher.stop()
            launcher._watcher.join()
        for process in launcher._processes:
            process.kill()
            process.wait()


def wait_for(happened) -> None:
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def codes(launcher: SubprocessLauncher) -> list[int | None]:
    return [process.poll() for process in launcher._processes]


def test_each_process_knows_where_it_stands(started, tmp_path):
    os.environ["NODE_RANK"] = "1"
    launcher = started.launcher(HERE, HERE)
    before = dict(os.environ)
    assert launcher.launch(lambda *args, **kwargs: (args, kwargs), 1, trainer="not passed on", a=2) == ((1,), {"a": 2})
    assert launcher.launch(len, "ab") == 2  # they are there: no others are started
    assert len(launcher._processes) == 2
    (leave,) = started.at_exit
    leave()
    port = str(launcher._environment.main_port)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "1", "WORLD_SIZE": "6"}
    for rank in (1, 2):
        environment, folder = json.loads((tmp_path / f"rank-{rank}").read_text())
        assert environment == {
            **before,
            **shared,
            "LOCAL_RANK": str(rank),
            **{k: environment[k] for k in ("LC_CTYPE",) if k in environment},
        }
        assert folder == str(tmp_path)
    assert dict(os.environ) == {**before, **shared, "LOCAL_RANK": "0"}
    assert started.left == [] and codes(launcher) == [0, 0]
    launcher._watcher.join(10)
    assert not launcher._watcher.is_alive()  # all have ended well, there is no more to watch
    copied = pickle.loads(pickle.dumps(launcher))
    assert (copied._processes, copied._watcher, copied._num_processes) == ([], None, 3)


def test_signals_reach_those_that_run(started):
    launcher = started.launcher(HANGING, "pass")
    launcher.launch(int)
    launcher._processes[1].wait()
    launcher.kill(signal.SIGUSR1)
    launcher._processes[0].wait(20)
    assert codes(launcher) == [-signal.SIGUSR1, 0]


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("sys.exit(7)", RuntimeError),
        ("sys.exit(143)", SIGTERMException),
        ("os.kill(os.getpid(), 15)", SIGTERMException),
    ],
)
def test_an_error_that_is_the_echo_of_another_process_names_that_one(started, end, error):
    launcher = started.launcher(HANGING, f"import os, sys, time; time.sleep(0.3); {end}")

    def feel() -> None:
        raise ConnectionError("closed by peer")

    with pytest.raises(error) as caught:
        launcher.launch(feel)
    assert isinstance(caught.value.__cause__, ConnectionError)
    if error is RuntimeError:
        told = "The process with local rank 2 failed with exit status 7. Its own error stands above."
        assert str(caught.value) == told
    assert codes(launcher)[0] == -signal.SIGTERM and started.left == []


@pytest.mark.parametrize("error", [ConnectionError, KeyboardInterrupt])
def test_an_error_of_ones_own_ends_the_others(started, monkeypatch, error):
    monkeypatch.setattr(script, "_ECHO_S", 0.1)
    # Whoever is interrupted does not ask who else has failed.
    launcher = started.launcher(HANGING, HANGING if error is ConnectionError else "import sys; sys.exit(1)")

    def fail() -> None:
        if error is KeyboardInterrupt:
            launcher._processes[1].wait()
        raise error("mine")

    with pytest.raises(error, match="mine"):
        launcher.launch(fail)
    wait_for(lambda: codes(launcher)[0] == -signal.SIGTERM)


def test_without_other_processes_an_error_is_ones_own(started):
    launcher = SubprocessLauncher(LightningEnvironment(), 1, num_nodes=1)
    for error in (KeyError("mine"), SIGTERMException()):
        with pytest.raises(type(error)) as caught:
            launcher.launch(mock.Mock(side_effect=error))
        assert caught.value is error
    assert started.at_exit == [] and "WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 1), ("sys.exit(143)", 143)])
def test_a_first_process_that_hangs_is_ended_with_the_others(started, monkeypatch, caplog, end, status):
    monkeypatch.setattr(script, "GRACE_S", 0.2)
    launcher = started.launcher(f"import sys; {end}", HANGING)
    with caplog.at_level("ERROR", logger="levin"):
        launcher.launch(lambda: wait_for(lambda: started.left))
    assert started.left == [status]
    assert codes(launcher) == [143 if status == 143 else 3, -signal.SIGTERM]
    told = f"The process with local rank 1 failed with exit status {143 if status == 143 else 3}. Ending the others."
    assert caplog.messages == [told]


def test_a_first_process_that_ends_by_itself_is_not_made_to(started, monkeypatch):
    monkeypatch.setattr(script, "GRACE_S", 20.0)
    launcher = started.launcher("import sys; sys.exit(3)", HANGING)
    launcher.launch(lambda: wait_for(lambda: codes(launcher)[1] is not None))
    launcher._watcher.stop()
    launcher._watcher.join(10)
    assert started.left == []


def test_processes_that_leave_together_are_waited_for(started, monkeypatch):
    monkeypatch.setattr(script, "GRACE_S", 4.0)
    launcher = started.launcher("import sys, time; time.sleep(1.0); sys.exit(0)", HANGING)
    with pytest.raises(SIGTERMException):
        launcher.launch(mock.Mock(side_effect=SIGTERMException))
    assert codes(launcher) == [None, None]  # they do at the same batch what this one did
    (leave,) = started.at_exit
    leave()
    assert started.left == [143] and codes(launcher) == [0, -signal.SIGTERM]


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (("pass", "import sys; sys.exit(3)"), 3),
        (("import sys; sys.exit(3)", "import sys; sys.exit(3)"), 3),
        (("import sys; sys.exit(4)", "import sys; sys.exit(3)"), 1),
        (("pass", "import os; os.kill(os.getpid(), 9)"), 1),
        (("pass", "import sys; sys.exit(143)"), 143),
        (("pass", "pass"), None),
    ],
)
def test_the_exit_status_tells_of_those_that_ended_after_this_process(started, ends, status):
    launcher = started.launcher(*ends)
    launcher.launch(lambda: launcher._watcher.stop())
    (leave,) = started.at_exit
    leave()
    assert started.left == ([] if status is None else [status])


def test_a_program_that_ends_in_the_run_gives_the_status(started):
    launcher = started.launcher(HANGING)
    processes = launcher._processes
    with pytest.raises(SystemExit):
        launcher.launch(lambda: sys.exit(3))
    (leave,) = started.at_exit
    leave()
    assert processes == [] and started.left == []


def test_processes_that_hear_no_signal_are_not_waited_for_long_after_an_error_of_this_one(started, tmp_path):
    is_deaf = tmp_path / "deaf"
    ignores = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    launcher = started.launcher(f"{ignores}; open({str(is_deaf)!r}, 'w'); {HANGING}")

    def fail():
        while not is_deaf.exists():
            time.sleep(0.02)
        raise KeyError("meant")

    start_s = time.monotonic()
    with pytest.raises(KeyError, match="meant"):
        launcher.launch(fail)
    assert codes(launcher) == [-signal.SIGKILL] and time.monotonic() - start_s < 9


def test_after_an_error_of_this_process_nobody_is_waited_for(started, monkeypatch):
    launcher = started.launcher(HANGING)
    launcher.launch(int)
    monkeypatch.setattr(sys, "last_value", KeyError(), raising=False)
    (leave,) = started.at_exit
    leave()
    assert codes(launcher) == [-signal.SIGTERM] and started.left == []


@pytest.mark.parametrize("folder", ["/one", "/two"])
def test_processes_of_one_job_of_hydra_are_let_go_in_the_next(started, monkeypatch, folder):
    job = SimpleNamespace(runtime=SimpleNamespace(output_dir="/one"))
    monkeypatch.setattr(script, "hydra_job", lambda: job)
    left: list[bool] = []
    launcher = started.launcher("import time; time.sleep(0.3)")
    os.environ["MASTER_ADDR"] = "127.0.0.1"  # the user's own
    before = dict(os.environ)
    launcher.launch(int)
    (process,) = launcher._processes
    added = ["LOCAL_RANK", "MASTER_PORT", "NODE_RANK", "WORLD_SIZE"]
    told = {"folder": "/one", "added": added, "pids": [process.pid]}
    assert json.loads(os.environ["LEVIN_HYDRA_JOB"]) == told
    job.runtime.output_dir = folder
    monkeypatch.setattr(script, "disconnect_processes", lambda: left.append(process.poll() == 0))
    inside = dict(os.environ)
    script.leave_hydra_job()
    if folder == "/one":
        assert dict(os.environ) == inside and left == []
    else:
        assert dict(os.environ) == before and left == [True]
        script.leave_hydra_job()
        assert left == [True]


def test_processes_of_another_job_that_do_not_end_are_not_waited_for_without_end(started, monkeypatch):
    monkeypatch.setattr(script, "GRACE_S", 0.1)
    monkeypatch.setattr(script, "disconnect_processes", lambda: None)
    monkeypatch.setattr(script, "hydra_job", lambda: None)
    os.environ["LEVIN_HYDRA_JOB"] = json.dumps({"folder": "/one", "added": [], "pids": [os.getpid()]})
    script.leave_hydra_job()
    assert "LEVIN_HYDRA_JOB" in os.environ
    monkeypatch.setattr(script, "hydra_job", lambda: SimpleNamespace(runtime=SimpleNamespace(output_dir="/two")))
    script.leave_hydra_job()
    assert "LEVIN_HYDRA_JOB" not in os.environ


def test_processes_that_are_asked_to_end_get_the_time_for_it():
    handling = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(5)))\n"
        "print(1, flush=True)\n" + HANGING
    )
    command = [sys.executable, "-I", "-S", "-c", handling]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        script.end_processes([process])
        assert process.returncode == 5


def test_waiting_for_processes_ends_in_time():
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", HANGING])
    try:
        start_s = time.monotonic()
        script.wait_for_processes([process, process], 0.3)
        assert 0.3 <= time.monotonic() - start_s < 5
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
