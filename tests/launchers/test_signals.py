"""SIGTERM to a training of two processes: one checkpoint, status 143, nobody left, and a second run that is exact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import levin
from levin.checkpoint.verify import verify
from levin.ranks.signals import FILE_NAME
from tests.launchers.signalled_program import SHUTDOWN

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "signalled_program.py"
LEVIN = ("-m", "levin", "launch", "--nproc-per-node", "2")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
DEADLINE_S = 60
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs the processes and signals of Linux")


def start(folder: Path, launcher=(), strategy="ddp", step_s=0.0, moment="batch") -> subprocess.Popen[str]:
    """Start the program in a session of its own, so that all of its processes can be found."""
    folder.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.Popen(
        [sys.executable, *launcher, str(PROGRAM), str(folder), strategy, str(step_s), moment], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        env={**environment, "PYTHONPATH": str(Path(levin.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def processes_of(session: int) -> list[str]:
    """Return the command lines of all processes of a session, those that have ended left out."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(") ")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append(f"{path.name} {(path / 'cmdline').read_text()}")
        except OSError:
            continue  # it has ended
    return found


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the program and return what it printed; nothing of it is left, whatever happened."""
    try:
        output, _ = process.communicate(timeout=DEADLINE_S)
        deadline = time.monotonic() + 5  # helpers of multiprocessing notice a little later
        while (left := processes_of(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, output
        return output
    finally:
        while processes_of(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.05)


def wait_for_ranks(folder: Path, process: subprocess.Popen[str], step: int) -> list[int]:
    """Wait until both ranks are in that step or a later one, and return the numbers of their processes."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        words = [path.read_text().split() for path in sorted(folder.glob("step-[01]"))]
        if len(words) == 2 and all(int(found) >= step for _, found in words):
            return [int(pid) for pid, _ in words]
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def tell(process: subprocess.Popen[str], ranks: list[int], who: str) -> None:
    if who == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        os.kill({"started": process.pid, "rank 0": ranks[0], "rank 1": ranks[1]}[who], signal.SIGTERM)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    output = finish(process)
    assert process.returncode == 0, output
    return torch.load(folder / "weights")


slow = pytest.mark.slow
CASES = [
    pytest.param((), "ddp", "rank 0", "batch", 143, id="script-first", marks=slow),
    pytest.param((), "ddp", "rank 1", "batch", 143, id="script-second", marks=slow),
    pytest.param((), "ddp", "group", "batch", 143, id="script-group", marks=slow),
    pytest.param((), "ddp", "group", "busy", 143, id="script-group-while-the-first-is-busy"),
    pytest.param(LEVIN, "ddp", "started", "batch", 143, id="levin-launch-agent", marks=slow),
    pytest.param(LEVIN, "ddp", "group", "batch", 143, id="levin-launch-group", marks=slow),
    pytest.param(LEVIN, "ddp", "rank 1", "batch", 143, id="levin-launch-second", marks=slow),
    # The other rank must not leave before the file is written, since torchrun then sends the signal again.
    pytest.param(LEVIN, "ddp", "rank 0", "saving", 143, id="levin-launch-first-while-saving", marks=slow),
    # torchrun itself says 1, whatever its processes say.
    pytest.param(TORCHRUN, "ddp", "started", "batch", 1, id="torchrun-agent", marks=slow),
    pytest.param((), "ddp_spawn", "started", "batch", 143, id="spawn-parent", marks=slow),
    pytest.param((), "ddp_spawn", "rank 0", "batch", 143, id="spawn-first-child", marks=slow),
    pytest.param((), "ddp_spawn", "rank 1", "batch", 143, id="spawn-second-child", marks=slow),
    pytest.param((), "ddp_spawn", "group", "batch", 143, id="spawn-group", marks=slow),
    pytest.param((), "ddp_fork", "started", "batch", 143, id="fork-parent"),
    pytest.param((), "ddp_fork", "rank 1", "batch", 143, id="fork-second-child", marks=slow),
    pytest.param((), "ddp_fork", "group", "batch", 143, id="fork-group", marks=slow),
]


@pytest.mark.timeout(4 * DEADLINE_S)
@pytest.mark.parametrize(("launcher", "strategy", "who", "moment", "status"), CASES)
def test_a_signal_saves_the_run_once_and_it_goes_on_exactly(
    undisturbed, tmp_path, launcher, strategy, who, moment, status
):
    folder = tmp_path / "run"
    process = start(folder, launcher, strategy, step_s=0.3 if moment == "batch" else 1.6, moment=moment)
    tell(process, wait_for_ranks(folder, process, step=2), who)
    output = finish(process)
    assert process.returncode == status, output
    assert [path.name for path in folder.rglob("*.ckpt")] == [FILE_NAME]
    assert not list(folder.rglob("*.tmp"))
    verify(folder / "saved" / FILE_NAME)
    # Both ranks finished the same batch.
    saved_step = torch.load(folder / "saved" / FILE_NAME)["global_step"]
    assert [int((folder / f"step-{rank}").read_text().split()[1]) for rank in (0, 1)] == [saved_step - 1] * 2
    assert output.count("Saved a checkpoint to") == 1
    second = start(folder, launcher, strategy)
    output = finish(second)
    assert second.returncode == 0, output
    assert Path((folder / "resumed_from").read_text()).name == FILE_NAME
    for name, value in torch.load(folder / "weights").items():
        assert torch.equal(value, undisturbed[name]), name


@pytest.mark.timeout(2 * DEADLINE_S)
@pytest.mark.parametrize(
    ("launcher", "strategy", "who"),
    [
        pytest.param((), "ddp", "rank 0", id="script-first"),
        pytest.param((), "ddp", "rank 1", id="script-second", marks=slow),
        pytest.param((), "ddp", "group", id="script-group", marks=slow),
        pytest.param((), "ddp_spawn", "started", id="spawn-parent", marks=slow),
        pytest.param((), "ddp_spawn", "rank 1", id="spawn-second-child", marks=slow),
        pytest.param(LEVIN, "ddp", "started", id="levin-launch-agent", marks=slow),
    ],
)
def test_a_signal_during_set_up_ends_all_processes(tmp_path, launcher, strategy, who):
    folder = tmp_path / "run"
    process = start(folder, launcher, strategy, moment="setup")
    tell(process, wait_for_ranks(folder, process, step=0), who)
    told_s = time.monotonic()
    output = finish(process)
    assert process.returncode == 143, output
    assert time.monotonic() - told_s < 20
    assert not list(folder.rglob("*.ckpt"))


@pytest.mark.timeout(2 * DEADLINE_S)
@pytest.mark.parametrize(
    ("strategy", "press"),
    [
        pytest.param("ddp", os.killpg, id="script"),
        pytest.param("ddp", os.kill, id="script-first-alone"),
        pytest.param("ddp_spawn", os.killpg, id="spawn", marks=slow),
        pytest.param("ddp_fork", os.killpg, id="fork", marks=slow),
    ],
)
def test_ctrl_c_pressed_again_ends_all_processes_at_once(tmp_path, strategy, press):
    """A terminal sends it to all processes, ``kill`` to one. Rank 1 never ends its shutdown after the first one, and rank 0
    waits for it: in a collective, where no handler runs, or with the patience of a launcher."""
    folder = tmp_path / "run"
    process = start(folder, strategy=strategy, step_s=1.0, moment="stuck")
    wait_for_ranks(folder, process, step=1)
    os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + DEADLINE_S
    while (folder / "step-1").read_text().split()[1] != str(SHUTDOWN) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    pressed_s = time.monotonic()
    press(process.pid, signal.SIGINT)
    output = finish(process)
    assert time.monotonic() - pressed_s < 10
    assert process.returncode == 130, output
