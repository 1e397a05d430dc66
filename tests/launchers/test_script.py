"""Scripts that are started again for every process, run as users run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import levin
from levin.environments import KubeflowEnvironment, LightningEnvironment
from levin.launchers import SubprocessLauncher
from levin.launchers.restart import hydra_arguments, script_command
from levin.launchers.script import end_processes

SOURCE = Path(levin.__file__).parents[1]

PROGRAM = """
import os, sys, time
from levin.environments import LightningEnvironment
from levin.launchers import SubprocessLauncher

def work(folder):
    rank = os.environ.get("LOCAL_RANK")
    names = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with open(os.path.join(folder, f"rank-{rank}"), "w") as file:
        file.write(" ".join(os.environ[name] for name in names) + " | " + " ".join(sys.argv[1:]))
    return rank

if __name__ == "__main__":
    environment = LightningEnvironment()
    launcher = SubprocessLauncher(environment, num_processes=2, num_nodes=1)
    folder = sys.argv[1]
    {body}
"""


def write_program(path: Path, body: str) -> Path:
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ").strip()
    path.write_text(PROGRAM.replace("{body}", body))
    return path


def start(*arguments: object, cwd: Path | None = None) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), *([str(cwd)] if cwd else [])])
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], env=environment, cwd=cwd, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_script_runs_once_per_process(tmp_path):
    program = write_program(
        tmp_path / "program.py",
        """
        print("result", launcher.launch(work, folder))
        # The processes are there: a second launch starts no others.
        launcher.launch(work, folder)
        SubprocessLauncher(environment, 2, 1).launch(work, folder)
        """,
    )
    process = start(program, tmp_path, "--lr", "0.1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(out.split()) == sorted("result 0 result 1".split())
    first, second = ((tmp_path / f"rank-{rank}").read_text().split(" | ") for rank in range(2))
    assert first[0].split()[1:] == second[0].split()[1:]
    assert first[0].split()[:4] == ["0", "0", "2", "127.0.0.1"]
    assert first[1] == second[1] == f"{tmp_path} --lr 0.1"


def test_a_module_runs_again_as_a_module(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write_program(package / "__main__.py", "launcher.launch(work, folder)")
    process = start("-m", "package", tmp_path, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert {path.name for path in tmp_path.glob("rank-*")} == {"rank-0", "rank-1"}


WANDERING = """
import os, sys
{before}
os.chdir("deeper")
from levin.environments import LightningEnvironment
from levin.launchers import SubprocessLauncher

def work(folder):
    with open(os.path.join(folder, f"rank-{os.environ['LOCAL_RANK']}"), "w") as file:
        file.write(" ".join([os.getcwd(), sys._xoptions["mark"], *arguments]))

arguments = sys.argv[1:]
del sys.argv[1:]
if __name__ == "__main__":
    SubprocessLauncher(LightningEnvironment(), num_processes=2, num_nodes=1).launch(work, arguments[0])
"""


@pytest.mark.parametrize(
    ("way", "before"),
    [("script", ""), ("folder", "import levin.launchers"), ("archive", ""), ("module", "")],
    ids=["a script", "a folder, levin imported before", "an archive", "a module"],
)
def test_a_program_that_goes_elsewhere_and_clears_its_arguments_runs_the_same_on_all_ranks(tmp_path, way, before):
    (tmp_path / "deeper").mkdir()
    program = WANDERING.replace("{before}", before)
    if way == "archive":
        with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
            archive.writestr("__main__.py", program)
    else:
        path = {"script": "train.py", "folder": "app/__main__.py", "module": "pkg/train.py"}[way]
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(program)
    target = {"script": ["train.py"], "folder": ["app/"], "archive": ["app.zip"], "module": ["-m", "pkg.train"]}[way]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(SOURCE), "PWD": str(tmp_path)}
    command = [sys.executable, "-X", "mark=1", *target, str(tmp_path), "--lr", "0.1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert (tmp_path / f"rank-{rank}").read_text() == f"{tmp_path / 'deeper'} 1 {tmp_path} --lr 0.1"


def test_what_another_program_runs_is_started_without_that_program(tmp_path):
    write_program(tmp_path / "train.py", "launcher.launch(work, folder)")
    process = start("-m", "runpy", "train", tmp_path, cwd=tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "rank-1").read_text().endswith(f"| {tmp_path}")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failure_ends_all_with_its_own_traceback_first(tmp_path, rank):
    program = write_program(
        tmp_path / "program.py",
        f"""
        def fail(folder):
            if os.environ["LOCAL_RANK"] == "{rank}":
                raise KeyError("broken here")
            time.sleep(0.1)
            for _ in range(600):
                if os.environ["LOCAL_RANK"] == "0" and launcher._processes[0].poll() is not None:
                    raise RuntimeError("Connection closed by peer")
                time.sleep(0.1)
        launcher.launch(fail, folder)
        """,
    )
    start_s = time.monotonic()
    process = start(program, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert time.monotonic() - start_s < 40
    assert "KeyError: 'broken here'" in err
    if rank == 1:
        assert err.index("broken here") < err.index("Connection closed by peer")
        assert "The process with local rank 1 failed with exit status 1. Its own error stands above." in err


def test_a_first_process_that_waits_for_ever_is_ended(tmp_path):
    program = write_program(
        tmp_path / "program.py",
        """
        import levin.launchers.script as script
        script.GRACE_S = 0.5
        def wait(folder):
            if os.environ["LOCAL_RANK"] == "1":
                sys.exit(7)
            time.sleep(100)
        launcher.launch(wait, folder)
        """,
    )
    process = start(program, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "The process with local rank 1 failed with exit status 7. Ending the others." in err


def test_an_error_after_the_run_ends_the_other_processes(tmp_path):
    program = write_program(
        tmp_path / "program.py",
        """
        launcher.launch(work, folder)
        if os.environ["LOCAL_RANK"] == "0":
            raise ValueError("after the run")
        open(os.path.join(folder, f"waiting-{os.getpid()}"), "w").close()
        time.sleep(100)
        """,
    )
    process = start(program, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "after the run" in err


@pytest.mark.parametrize("ranks", ["0", "01"])
def test_the_status_of_a_program_that_ends_in_the_run_is_that_of_the_command(tmp_path, ranks):
    program = write_program(
        tmp_path / "program.py",
        f"""
        def leave(folder):
            if os.environ["LOCAL_RANK"] in "{ranks}":
                sys.exit(85)
            time.sleep(100)
        launcher.launch(leave, folder)
        """,
    )
    process = start(program, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 85, err


def test_the_command_ends_when_all_processes_have_ended(tmp_path):
    program = write_program(
        tmp_path / "program.py",
        """
        launcher.launch(work, folder)
        if os.environ["LOCAL_RANK"] == "1":
            time.sleep(1.0)
            open(os.path.join(folder, "late"), "w").close()
            sys.exit(3)
        """,
    )
    process = start(program, tmp_path)
    process.communicate(timeout=60)
    assert (tmp_path / "late").exists()
    assert process.returncode == 3


def test_signals_can_be_passed_on(tmp_path):
    program = write_program(
        tmp_path / "program.py",
        """
        import signal
        def on_signal(number, frame):
            open(os.path.join(folder, "signalled-" + os.environ["LOCAL_RANK"]), "w").close()
        def wait(folder):
            signal.signal(signal.SIGUSR1, on_signal)
            work(folder)
            while not os.path.exists(os.path.join(folder, "rank-1")):
                time.sleep(0.02)
            launcher.kill(signal.SIGUSR1)
            while not os.path.exists(os.path.join(folder, "signalled-1")):
                time.sleep(0.02)
        launcher.launch(wait, folder)
        """,
    )
    process = start(program, tmp_path)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    program = write_program(
        tmp_path / "program.py",
        """
        import signal
        # As in a terminal: a process that a shell starts in the background ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def wait(folder):
            with open(os.path.join(folder, f"up-{os.getpid()}"), "w"):
                time.sleep(100)
        launcher.launch(wait, folder)
        """,
    )
    process = start(program, tmp_path)
    while len(list(tmp_path.glob("up-*"))) < 2:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    pids = [int(path.name.split("-")[1]) for path in tmp_path.glob("up-*")]
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_nothing_is_started_where_the_processes_exist(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    launcher = SubprocessLauncher(LightningEnvironment(), num_processes=4, num_nodes=1)
    assert launcher.launch(lambda value: value + 1, 2) == 3
    assert SubprocessLauncher(KubeflowEnvironment(), 4, 1).launch(int) == 0
    assert launcher._processes == []
    assert not launcher.is_interactive_compatible


def test_one_process_leaves_the_environment_alone(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = dict(os.environ)
    assert SubprocessLauncher(LightningEnvironment(), num_processes=1, num_nodes=1).launch(int) == 0
    assert dict(os.environ) == before


@pytest.mark.parametrize("argument", ["-c", "", "/nowhere/at/all.py"])
def test_a_process_without_a_script_cannot_be_started_again(monkeypatch, argument):
    monkeypatch.setattr(sys, "argv", [argument])
    monkeypatch.setattr("__main__.__spec__", None)
    if argument.endswith(".py"):
        monkeypatch.setattr("__main__.__file__", argument, raising=False)
    else:
        monkeypatch.delattr("__main__.__file__", raising=False)
    with pytest.raises(ValueError, match=r"cannot be started again: .* Write the program into a file"):
        script_command(1)


@pytest.mark.parametrize("module", ["joblib.externals.loky.backend.popen_loky_posix", "submitit.core._submit"])
def test_a_worker_that_has_its_task_from_elsewhere_cannot_be_started_again(module, monkeypatch):
    monkeypatch.setattr("__main__.__spec__", SimpleNamespace(name=module))
    with pytest.raises(ValueError, match=rf"it is a worker of {module.partition('.')[0]}"):
        script_command(1)


def test_processes_that_do_not_end_are_made_to():
    ignoring = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    start_s = time.monotonic()
    end_processes([process], grace_s=0.2)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert time.monotonic() - start_s < 10


@pytest.mark.parametrize(
    ("given", "mode", "expected"),
    [
        (["a=1", "-cn", "small", "b=2"], "RUN", ["--config-name=small", "a=1", "b=2"]),
        (
            ["--run", "a=1", "-cd", "d", "--config-na", "small", "-p", "x"],
            "RUN",
            ["--config-name=small", "--config-dir=d", "--package=x", "a=1"],
        ),
        (["a=1,2", "--multi"], "MULTIRUN", ["a=2", "b=3", "hydra.job.chdir=True"]),
        (
            ["-m", "a=1,2", "-cp", "conf", "b=3"],
            "MULTIRUN",
            ["--config-path=conf", "a=2", "b=3", "hydra.job.chdir=True"],
        ),
    ],
)
def test_another_process_gets_one_job_of_hydra(given, mode, expected):
    overrides = SimpleNamespace(task=["a=2", "b=3"], hydra=["hydra.job.chdir=True", f"hydra.mode={mode}"])
    job = SimpleNamespace(overrides=overrides, runtime=SimpleNamespace(output_dir="/an out/0"))
    arguments = hydra_arguments(given, job, 1)
    more = ["hydra.mode=MULTIRUN", "hydra.mode=RUN"] if mode == "MULTIRUN" else []
    place = ["hydra.run.dir='/an out/0'", "hydra.job.name=train_ddp_process_1", "hydra.output_subdir=null"]
    assert arguments == [*expected, *more, *place]
