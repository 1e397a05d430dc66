"""Signals that come while a checkpoint is being written in the background."""

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
from levin import Trainer
from levin.checkpoint.verify import verify
from levin.ranks.signals import FILE_NAME
from tests.checkpoint.signalled_saving import train

ROOT = Path(__file__).parents[2]
SOURCE = Path(levin.__file__).parents[1]
PROGRAM = Path(__file__).parent / "signalled_saving.py"
DEADLINE_S = 60
pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the signals of POSIX"),
    pytest.mark.filterwarnings(
        "ignore:Checkpoint directory", "ignore:The 'train_dataloader' does not have many workers"
    ),
]
WAYS = ["async_save", pytest.param("plugin", marks=pytest.mark.slow)]
SLOW_WAYS = [pytest.param("async_save", marks=pytest.mark.slow), "plugin"]


def start_writing(folder: Path, way: str, write_s: float) -> subprocess.Popen[str]:
    """Start, and wait until a file is half written."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), str(folder), way, str(write_s)], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), str(ROOT)])},
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_S
    while not (folder / "writing").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list((folder / "saved").glob(".levin-*.tmp"))) == 1
    return process


def finish(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=DEADLINE_S)[0]
    finally:
        process.kill()


def files(folder: Path) -> set[str]:
    """Return the names of all checkpoints, every one of which is whole."""
    found = sorted((folder / "saved").glob("*.ckpt"))
    for path in found:
        verify(path)
    return {path.name for path in found}


def assert_goes_on_exactly(folder: Path, way: str, name: str, undisturbed: Trainer) -> None:
    resumed = train(folder, way)
    assert resumed.ckpt_path == str(folder / "saved" / name)
    expected = undisturbed.lightning_module.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.lightning_module.state_dict().items())
    assert resumed.callback_metrics == undisturbed.callback_metrics


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Trainer:
    return train(tmp_path_factory.mktemp("undisturbed"), "plugin")


@pytest.mark.parametrize("way", WAYS)
def test_a_request_to_end_waits_for_the_file_under_way(undisturbed, tmp_path, way):
    process = start_writing(tmp_path, way, 1.5)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 143, output
    assert {"epoch=0-step=8.ckpt", FILE_NAME, "on_exception.ckpt"} <= files(tmp_path)
    assert not list(tmp_path.rglob(".levin-*.tmp"))
    (tmp_path / "saved" / "on_exception.ckpt").unlink()  # it holds the same, and is newer
    assert_goes_on_exactly(tmp_path, way, FILE_NAME, undisturbed)


@pytest.mark.parametrize("way", SLOW_WAYS)
def test_ctrl_c_waits_for_the_file_under_way(undisturbed, tmp_path, way):
    process = start_writing(tmp_path, way, 1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)  # ignored meanwhile
    output = finish(process)
    assert process.returncode == 1, output
    assert {"epoch=0-step=8.ckpt", "on_exception.ckpt"} <= files(tmp_path)
    assert not list(tmp_path.rglob(".levin-*.tmp"))
    assert_goes_on_exactly(tmp_path, way, "on_exception.ckpt", undisturbed)


@pytest.mark.parametrize("way", WAYS)
def test_a_second_request_leaves_at_once_and_no_half_file(undisturbed, tmp_path, way):
    process = start_writing(tmp_path, way, 30)
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)  # the batch is finished, and what can be saved at once is saved
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    told_s = time.monotonic()
    output = finish(process)
    assert process.returncode == 143, output
    assert time.monotonic() - told_s < 5
    # The plugin writes one file after the other, that of the signal too; the callback's writer is its own.
    newest = FILE_NAME if way == "async_save" else "epoch=0-step=4.ckpt"
    assert files(tmp_path) == {"epoch=0-step=4.ckpt", newest}
    assert_goes_on_exactly(tmp_path, way, newest, undisturbed)
