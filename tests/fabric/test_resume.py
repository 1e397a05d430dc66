"""A loop under Fabric that is saved anywhere goes on from there as if nothing had happened."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from levin import Fabric
from levin.checkpoint import AsyncCheckpointIO
from tests.distributed import world_size

EXAMPLES = Path(__file__).parents[2] / "examples" / "fabric"


class Noisy(TensorDataset):
    """Each item has a random part, drawn from all generators."""

    def __getitem__(self, index):
        (x,) = super().__getitem__(index)
        return x + torch.rand(1) + random.random()


def make(fabric: Fabric, workers: int = 0, batch_size: int = 2):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.1))
    data = Noisy(torch.randn(20, 3))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=workers))
    val = fabric.setup_dataloaders(DataLoader(data, batch_size=5, shuffle=True))
    return {"model": model, "optimizer": optimizer, "loader": loader, "val": val, "epoch": 0, "step": 0}


def train(fabric: Fabric, state, epochs: int = 3, save_at: int | None = None, path=None, limit: int | None = None):
    seen = []
    for epoch in range(state["epoch"], epochs):
        for index, x in enumerate(state["loader"]):
            state["optimizer"].zero_grad()
            loss = state["model"](x).square().mean()
            fabric.backward(loss)
            state["optimizer"].step()
            state["step"] += 1
            seen.append(float(loss.detach()))
            if state["step"] == save_at:
                fabric.save(path, state)
            if limit is not None and index + 1 == limit:
                break
        with torch.no_grad():
            seen += [float(state["model"](x).sum()) for x in state["val"]]
        state["epoch"] = epoch + 1
        if -state["epoch"] == save_at:
            fabric.save(path, state)
    return seen, {name: value.clone() for name, value in state["model"].state_dict().items()}


def assert_resumes(fabric: Fabric, path, save_at: int, workers: int = 0, limit: int | None = None) -> None:
    torch.manual_seed(1)
    random.seed(1)
    whole, weights = train(fabric, make(fabric, workers), save_at=save_at, path=path, limit=limit)
    torch.manual_seed(2)
    random.seed(2)
    state = make(fabric, workers)
    assert fabric.load(path, state) == {}
    rest, again = train(fabric, state, limit=limit)
    assert 0 < len(rest) < len(whole)
    assert rest == whole[-len(rest) :]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


# Steps within an epoch of 10; negative numbers are ends of epochs.
@pytest.mark.parametrize("save_at", [1, 7, 10, 13, 20, -1, -2])
def test_a_run_goes_on_with_the_next_batch_and_the_next_random_number(save_at, tmp_path):
    assert_resumes(Fabric(accelerator="cpu", devices=1), tmp_path / "run.ckpt", save_at)


@pytest.mark.parametrize("save_at", [4, 13, -1])
def test_loaders_with_workers_go_on_too(save_at, tmp_path):
    assert_resumes(Fabric(accelerator="cpu", devices=1), tmp_path / "run.ckpt", save_at, workers=2)


@pytest.mark.parametrize("save_at", [3, -1])
def test_an_epoch_that_is_left_by_break_is_over(save_at, tmp_path):
    # Within it the rest of the present epoch comes first, whose limit counts from the start of this process.
    fabric = Fabric(accelerator="cpu", devices=1)
    if save_at == -1:
        assert_resumes(fabric, tmp_path / "run.ckpt", save_at, limit=4)
    loader = make(fabric)["loader"]
    for index, _ in enumerate(loader):
        if index == save_at:
            break
    state = loader.state_dict()
    other = make(fabric)["loader"]
    other.load_state_dict(state)
    assert len(list(other)) == 10


def test_the_place_is_saved_in_precision_and_in_the_background(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed", plugins=AsyncCheckpointIO())
    assert_resumes(fabric, tmp_path / "run.ckpt", 13)


def test_a_loader_that_was_never_iterated_begins_at_the_start(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    state = make(fabric)
    fabric.save(tmp_path / "run.ckpt", state)
    fabric.load(tmp_path / "run.ckpt", state)
    assert len(list(state["loader"])) == 10


def test_two_iterations_at_once_each_give_all_batches():
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(range(4)))
    pairs = [(int(one), int(two)) for one, two in zip(loader, loader, strict=True)]
    assert pairs == [(number, number) for number in range(4)]
    assert next(iter(loader)) == 0
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(6))


def test_a_stream_goes_on_after_what_was_taken():
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(Stream()))
    batches = iter(loader)
    next(batches), next(batches)
    later = fabric.setup_dataloaders(DataLoader(Stream()))
    later.load_state_dict(copy.deepcopy(loader.state_dict()))
    with pytest.warns(UserWarning, match="cannot say where it is"):
        assert [int(batch) for batch in later] == [2, 3, 4, 5]


@world_size(2, timeout_s=120)
def test_two_processes_go_on_each_at_its_own_place(tmp_path):
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    for save_at in (2, 7, -1):
        assert_resumes(fabric, tmp_path / "run.ckpt", save_at)


def saved_by_two(folder: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    loader = fabric.setup_dataloaders(DataLoader(range(20), batch_size=2, shuffle=True))
    seen = []
    for index, batch in enumerate(loader):
        seen += batch.tolist()
        if index == 1:
            fabric.save(folder / "run.ckpt", {"loader": loader})
            break
    torch.save(seen, folder / f"seen-{fabric.global_rank}")


def test_another_number_of_processes_sees_the_rest_of_the_epoch_once(tmp_path):
    from tests.distributed import run_ranks

    run_ranks(saved_by_two, 2, {"folder": tmp_path})
    fabric = Fabric(accelerator="cpu", devices=1)
    loader = fabric.setup_dataloaders(DataLoader(range(20), batch_size=2, shuffle=True))
    with pytest.warns(UserWarning, match="saved by 2 processes"):
        fabric.load(tmp_path / "run.ckpt", {"loader": loader})
    with pytest.warns(UserWarning, match="num_replicas was 2"):
        rest = [int(item) for batch in loader for item in batch]
    seen = [item for rank in range(2) for item in torch.load(tmp_path / f"seen-{rank}")]
    assert sorted(seen + rest) == list(range(20))


# ---------------------------------------------------------------- the example, killed


def start(folder: Path, *words: str, launch: bool = True) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "levin", "launch", "--nproc-per-node", "2", "--max-restarts", "5"] if launch else []
    command = [sys.executable, *launcher, str(EXAMPLES / "digits.py"), "--epochs", "2", "--save-every", "3", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


SEEDS = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(5)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_at_a_random_moment_under_levin_launch_ends_with_the_same_weights(seed, tmp_path):
    pytest.importorskip("sklearn")
    choose = random.Random(seed)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    finish(start(tmp_path / "whole", "--devices", "2"))
    process = start(tmp_path / "killed", "--devices", "2")
    path = tmp_path / "killed" / "runs" / "fabric" / "digits.ckpt"
    # After one of the 30 saves, in the middle of the next ones, of a step, or of a validation; or before the first.
    num_saves, later_s = choose.randrange(20), choose.random() * 0.2
    seen = set()
    while len(victims := children(process.pid)) < 2 or len(seen) < num_saves:
        assert process.poll() is None
        with suppress(FileNotFoundError):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.001)
    time.sleep(later_s)
    os.kill(choose.choice(victims), signal.SIGKILL)
    output = finish(process)
    assert num_saves == 0 or "goes on at epoch" in output
    final = "runs/fabric/final.ckpt"
    whole = torch.load(tmp_path / "whole" / final)["model"]
    killed = torch.load(tmp_path / "killed" / final)["model"]
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_sigterm_saves_and_the_next_run_goes_on(tmp_path):
    pytest.importorskip("sklearn")
    (tmp_path / "whole").mkdir()
    (tmp_path / "ended").mkdir()
    process = start(tmp_path / "ended", "--save-every", "1000", "--epochs", "50", launch=False)
    assert process.stdout is not None
    while "epoch 0" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert (tmp_path / "ended" / "runs" / "fabric" / "digits.ckpt").exists()
    step = torch.load(tmp_path / "ended" / "runs" / "fabric" / "digits.ckpt")["step"]
    assert step >= 45
    epochs = str(step // 45 + 1)
    assert f"step {step}" in finish(start(tmp_path / "ended", "--epochs", epochs, launch=False))
    finish(start(tmp_path / "whole", "--epochs", epochs, launch=False))
    weights = [torch.load(tmp_path / name / "runs/fabric/final.ckpt")["model"] for name in ("whole", "ended")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name, devices", [("five_lines.py", "1"), ("gan.py", "1"), ("gan.py", "2")])
def test_the_other_examples_run(name, devices, tmp_path):
    pytest.importorskip("sklearn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / name), "--epochs", "1", "--devices", devices]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    if name == "five_lines.py":
        assert "to the bare loop: 0.0\n" in done.stdout
