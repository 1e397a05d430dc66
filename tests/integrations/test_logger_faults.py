"""Steps of a run while the process, the disk or the service of its logger is slow or away, side by side."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed import _free_port
from tests.integrations.test_loggers import run_program, trackio_rows, wandb_history, wandb_records
from tests.integrations.times import print_times

pytestmark = pytest.mark.timeout(900)
NUM_STEPS = 400
PROGRAM = """
import os, signal, sqlite3, sys, threading, time, warnings
from pathlib import Path
import psutil
from levin.loggers import CometLogger, CSVLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from tests.integrations.test_loggers import Line, loader, trainer
from tests.integrations.times import Clock
folder, results, service, condition, num_steps = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]

def tell(number):
    for process in psutil.Process().children(recursive=True):
        if process.name() == "wandb-core":
            process.send_signal(number)
            (results / "told").touch()

def lock():
    # Once the run is in the database, and for longer than the steps take.
    logger.log_metrics({"first": 1.0})
    database = sqlite3.connect(folder / "p.db", isolation_level=None, timeout=60, check_same_thread=False)
    while not database.execute("select * from sqlite_master where name = 'metrics'").fetchall():
        time.sleep(0.1)
    database.execute("BEGIN IMMEDIATE")
    threading.Timer(5, lambda: [database.execute("ROLLBACK"), (results / "told").touch()]).start()

when = {"stopped": {50: lambda: tell(signal.SIGSTOP)}, "killed": {50: lambda: tell(signal.SIGKILL)}}
clock = Clock(when.get(condition))
warnings.simplefilter("default", UserWarning)
began = time.perf_counter()
if condition == "no logger":
    logger = False
else:
    logger = {
        "comet": lambda: CometLogger(
            project="p", online=None if "COMET_API_KEY" in os.environ else False, offline_directory=str(folder)
        ),
        "csv": lambda: CSVLogger(folder, version=0),
        "tensorboard": lambda: TensorBoardLogger(folder, version=0),
        "trackio": lambda: TrackioLogger("p", name="r", auto_log_cpu=False),
        "wandb": lambda: WandbLogger(project="p", save_dir=folder, offline=True),
    }[service]()
if condition == "database locked":
    lock()
try:
    trainer(folder, logger, max_epochs=1, callbacks=[clock], enable_checkpointing=False).fit(Line(), loader(int(num_steps)))
except OSError as error:
    (results / "error").write_text(str(error))
(results / "whole").write_text(str(time.perf_counter() - began))
tell(signal.SIGCONT)
clock.write(results / "times")
"""


@contextmanager
def mounted(folder: Path, *arguments: str) -> Iterator[None]:
    folder.mkdir()
    if subprocess.run(["mount", *arguments, str(folder)], capture_output=True).returncode:
        pytest.skip("needs root, to mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """One that waits for the real disk at every write, and one that is full after 128 KiB."""
    image = tmp_path / "image"
    with image.open("w") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    folders = {"slow disk": tmp_path / "slow", "full disk": tmp_path / "full"}
    with (
        mounted(folders["slow disk"], "-o", "loop,sync", str(image)),
        mounted(folders["full disk"], "-t", "tmpfs", "-o", "size=128k", "levin"),
    ):
        yield folders


@pytest.mark.parametrize(
    ("service", "conditions"),
    [
        ("wandb", ["no logger", "healthy", "stopped", "killed", "full disk"]),
        ("comet", ["no logger", "healthy", "deaf at the start", "refuses", "full disk"]),
        ("trackio", ["no logger", "healthy", "slow disk", "database locked", "full disk"]),
    ],
)
def test_trackers_whose_process_disk_or_service_fails_slow_nothing(service, conditions, tmp_path, disks):
    deaf = socket.create_server(("127.0.0.1", 0), backlog=64)  # connections are made, and nobody reads them
    addresses = {"deaf at the start": deaf.getsockname()[1], "refuses": _free_port()}
    times, whole_s, said = {}, {}, {}
    for condition in conditions:
        variables = {}
        if condition in addresses:
            url = f"http://127.0.0.1:{addresses[condition]}/"
            variables = {"COMET_URL_OVERRIDE": url, "COMET_API_KEY": "a" * 25}
        results = measure(service, condition, tmp_path, disks, **variables)
        assert not (results / "error").exists()
        is_told = service == "wandb" and condition != "no logger" or condition == "database locked"
        assert (results / "told").exists() == is_told
        times[condition] = json.loads((results / "times").read_text())
        whole_s[condition] = float((results / "whole").read_text())
        said[condition] = (results / "said").read_text()
    deaf.close()
    print_times(service, times, whole_s)
    for condition, seconds in times.items():
        # A logger that waits for the process, the disk or the service would never come here, or wait in a step.
        assert whole_s[condition] < 20 and len(seconds) == NUM_STEPS - 1 and max(seconds) < 0.25, condition
        folder = disks.get(condition, tmp_path / condition)
        if service == "wandb" and condition in ("healthy", "stopped"):
            assert len(wandb_history(wandb_records(folder))) >= NUM_STEPS
        if service == "trackio" and condition in ("healthy", "slow disk", "database locked"):
            assert [step for _, step, values in trackio_rows(folder) if "loss" in values] == list(range(NUM_STEPS))
        assert ("The process of wandb is gone" in said[condition]) == (condition == "killed")
        if service == "trackio":
            assert ("database or disk is full" in said[condition]) == (condition == "full disk"), said[condition]


@pytest.mark.parametrize("service", ["csv", "tensorboard"])
def test_files_of_values_are_written_in_the_step_and_a_full_disk_ends_the_run(service, tmp_path, disks):
    # A part of the run fits into what is left.
    (disks["full disk"] / "others").write_bytes(bytes(120 << 10))
    times, whole_s = {}, {}
    for condition in ("no logger", "healthy", "slow disk", "full disk"):
        results = measure(service, condition, tmp_path, disks)
        times[condition] = json.loads((results / "times").read_text())
        whole_s[condition] = float((results / "whole").read_text())
        if condition == "no logger":
            continue
        rows = rows_of(service, disks.get(condition, results))
        if condition == "full disk":
            assert "No space left on device" in (results / "error").read_text()
            # All that was logged until then, whole.
            assert len(rows) < NUM_STEPS and rows == list(range(len(times[condition])))
        else:
            assert rows == list(range(NUM_STEPS)) and not (results / "error").exists()
    print_times(service, times, whole_s)
    assert all(max(seconds) < 0.25 for condition, seconds in times.items() if condition != "slow disk")


def measure(service: str, condition: str, tmp_path: Path, disks: dict[str, Path], **variables: str) -> Path:
    """Train under a condition; the folder with what is known of it."""
    results = tmp_path / condition
    results.mkdir()
    folder = disks.get(condition, results)
    done = run_program(PROGRAM, folder, results, service, condition, NUM_STEPS, TRACKIO_DIR=str(folder), **variables)
    (results / "said").write_text(done.stdout + done.stderr)
    return results


def rows_of(service: str, folder: Path) -> list[int]:
    """The steps with a loss that a run has left."""
    folder = folder / "lightning_logs" / "version_0"
    if service == "csv":
        with (folder / "metrics.csv").open() as file:
            return [int(row["step"]) for row in csv.DictReader(file) if float(row["loss"]) >= 0]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.step for event in events.Scalars("loss")]
