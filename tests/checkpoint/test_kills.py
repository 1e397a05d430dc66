"""Whatever moment a training process is killed at, every checkpoint on the disk is whole and training goes on from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint import killed_training

ROOT = Path(__file__).parents[2]


def kill(folder: Path, way: str, num_kills: int) -> dict[str, int]:
    seed = int.from_bytes(os.urandom(4), "little")
    command = [sys.executable, "-m", "tests.checkpoint.killed_training", str(folder), way, str(num_kills), str(seed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}:\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
@pytest.mark.parametrize("way", ["blocking", "async_save", "plugin"])
def test_every_file_is_whole_after_a_kill(tmp_path, way):
    found = kill(tmp_path, way, 2)
    assert found["step"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked")
@pytest.mark.parametrize("way", ["blocking", "async_save", "plugin"])
def test_every_file_is_whole_after_a_hundred_kills(tmp_path, way):
    found = kill(tmp_path, way, 100)
    assert found["step"] >= killed_training.MIN_STEPS
    assert found["while_writing"] >= 5, "hardly a kill has come while a file was written"
