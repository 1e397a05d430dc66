"""Under torchrun's restarts a training goes on after a process has died, as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).parent / "elastic_program.py"


def run(folder: Path, *options: object, death: tuple[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *map(str, options), str(PROGRAM), str(folder), *map(str, death or ())], cwd=folder, text=True,
        capture_output=True, env={**environment, "PYTHONPATH": str(ROOT / "src")}, timeout=200,
    )  # fmt: skip


def seen(folder: Path) -> dict[int, tuple[int, list[int]]]:
    """Return for each step its epoch and the samples that all ranks together saw; what was done again counts once."""
    found: dict[int, tuple[int, list[int]]] = {}
    attempts = sorted({path.name.split("-")[1] for path in folder.glob("seen-*")})
    for attempt in attempts:
        lines = [line.split() for path in folder.glob(f"seen-{attempt}-*") for line in path.read_text().splitlines()]
        steps = {int(line[0]) for line in lines}
        found = {step: values for step, values in found.items() if step < min(steps)}
        for step in sorted(steps):
            mine = [line for line in lines if int(line[0]) == step]
            found[step] = (int(mine[0][1]), sorted(int(number) for line in mine for number in line[2:]))
    return found


def samples_of_epochs(folder: Path) -> dict[int, list[int]]:
    epochs: dict[int, list[int]] = {}
    for epoch, samples in seen(folder).values():
        epochs.setdefault(epoch, []).extend(samples)
    return {epoch: sorted(samples) for epoch, samples in epochs.items()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder, "-m", "levin", "launch", "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("launcher", "death"),
    [
        (("-m", "levin", "launch"), (8, 1)),  # in the middle of the second epoch
        (("-m", "torch.distributed.run", "--standalone"), (3, 0)),
    ],
)
def test_a_killed_process_changes_nothing(undisturbed, tmp_path, launcher, death):
    folder = tmp_path / "disturbed"
    done = run(folder, *launcher, "--nproc-per-node", 2, "--max-restarts", 1, death=death)
    assert done.returncode == 0, done.stderr
    assert (folder / "died").exists()
    assert "Restoring states from the checkpoint" in done.stderr + done.stdout
    assert seen(folder) == seen(undisturbed)
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(folder)[name], value), name


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_another_number_of_processes_sees_every_sample_once(tmp_path, size):
    folder = tmp_path / "disturbed"
    done = run(folder, "-m", "levin", "launch", "--nproc-per-node", 2, death=(8, 1))
    assert done.returncode == 128 + 9, done.stderr
    done = run(folder, "-m", "levin", "launch", "--nproc-per-node", size)
    assert done.returncode == 0, done.stderr
    assert samples_of_epochs(folder) == {0: [*range(24)], 1: [*range(24)]}
