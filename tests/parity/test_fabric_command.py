"""``levin fabric`` beside the installed ``fabric``: what a script finds, and what becomes of a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn

from levin import Fabric
from levin.fabric.command import main
from tests.distributed import run_ranks
from tests.parity.fabric_rows import plain

pytest.importorskip("lightning.fabric")
THEIRS = entry_points(group="console_scripts", name="fabric")
pytestmark = pytest.mark.skipif(not THEIRS, reason="needs the command of Lightning's Fabric")
COMMANDS = {
    "lightning": [str(Path(sys.executable).with_name("fabric"))],
    "levin": [sys.executable, "-m", "levin", "fabric"],
}

SCRIPT = """
import json, os, sys
from {framework} import Fabric
fabric = Fabric()
facts = [
    sys.argv[1:], fabric.world_size, fabric.global_rank, fabric.node_rank, type(fabric.strategy).__name__, str(fabric.device),
    fabric.strategy.precision.precision, os.environ["LT_CLI_USED"], os.environ.get("OMP_NUM_THREADS") is not None,
]
facts.append(float(fabric.all_reduce(float(fabric.global_rank), reduce_op="sum")))
with open(f"{framework}-{{fabric.global_rank}}.json", "w") as file:
    json.dump(facts, file)
try:
    fabric.launch()
except RuntimeError:
    sys.exit(0)
sys.exit(1)
"""


def run(name: str, folder: Path, *words: str) -> None:
    framework = "lightning.fabric" if name == "lightning" else "levin"
    (folder / f"with_{name}.py").write_text(SCRIPT.format(framework=framework))
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [*COMMANDS[name], "run", *words, f"with_{name}.py", "--its-own", "word"]
    for _ in range(3):
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        # Lightning's processes do not wait for threads of Gloo, one of which may end them when all is done.
        if name == "levin" or "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_script_finds_the_settings_of_the_command_line(devices, tmp_path):
    port = 29500 + os.getpid() % 500
    words = ["--accelerator", "cpu", "--devices", str(devices), "--precision", "bf16-mixed", "--main-port", str(port)]
    words += ["--strategy", "ddp"] if devices > 1 else []
    for name in COMMANDS:
        run(name, tmp_path, *words)
    for rank in range(devices):
        theirs, ours = (
            json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for name in ("lightning.fabric", "levin")
        )
        assert ours == theirs
        assert ours[:3] == [["--its-own", "word"], devices, rank]


def status_of_theirs(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    (command,) = THEIRS
    monkeypatch.setattr(sys, "argv", ["fabric", *words])
    with pytest.raises(SystemExit) as ended:
        command.load()()
    return int(ended.value.code or 0)


def status_of_ours(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("option, value", [("strategy", "ddp_spawn"), ("precision", "8"), ("accelerator", "abacus")])
def test_what_cannot_be_run_is_refused_before_a_process_starts(option, value, tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text("raise RuntimeError('started')")
    words = ["run", f"--{option}", value, str(tmp_path / "x.py")]
    assert status_of_ours(*words) == status_of_theirs(monkeypatch, *words) == 2


def save_folder(folder: Path, size: int) -> None:
    fabric = Fabric(accelerator="cpu", devices=size, strategy="fsdp")
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 1))
    model, optimizer = fabric.setup(net, torch.optim.Adam(net.parameters(), lr=0.1))
    fabric.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
    fabric.save(folder / "run", {"model": model, "optimizer": optimizer, "step": 1, "words": ["a"]})
    # The parts of what nobody asked for stay where they are.
    assert fabric.load(folder / "run", {"model": model, "step": 0}) == {"words": ["a"]}


@pytest.mark.parametrize("size", [1, 2])
def test_a_folder_becomes_the_same_file(size, tmp_path, monkeypatch):
    run_ranks(save_folder, size, {"folder": tmp_path, "size": size}, timeout_s=120)
    folder, file = str(tmp_path / "run"), tmp_path / "run.consolidated"
    found = {}
    for name, status_of in (("theirs", partial(status_of_theirs, monkeypatch)), ("ours", status_of_ours)):
        assert status_of("consolidate", folder) == 0
        assert status_of("consolidate", folder) == 1  # there is a file
        assert status_of("consolidate", str(tmp_path / "nowhere")) != 0
        found[name] = torch.load(file, weights_only=False)
        file.unlink()
    assert plain(found["theirs"]) == plain(found["ours"])
    assert found["ours"]["step"] == 1
    assert status_of_ours("consolidate", folder, "--output_file", str(tmp_path / "named")) == 0
    assert plain(torch.load(tmp_path / "named")) == plain(found["ours"])
