"""``import levin`` costs what ``import torch`` costs."""

from __future__ import annotations

import importlib
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

LATER = ("torchmetrics", "rich", "tqdm", "tensorboard", "yaml", "fsspec", "jsonargparse", "omegaconf", "lightning")


def seconds(statement: str, folder: Path) -> float:
    # What torch has made is looked through before: else Python does it in the middle of the import, which takes longer than that.
    code = f"import gc, torch, time; gc.collect(); t = time.process_time(); {statement}; print(time.process_time() - t)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-X", f"pycache_prefix={folder}", "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.timing
@pytest.mark.parametrize(
    "statement", ["import levin", "from levin import Trainer, LightningModule, LightningDataModule"]
)
def test_import_adds_at_most_120_ms_to_torch(statement, tmp_path):
    seconds(statement, tmp_path)  # compiles
    assert statistics.median(seconds(statement, tmp_path) for _ in range(3)) < 0.12


def test_import_loads_nothing_that_is_used_later():
    code = "import torch, sys; before = set(sys.modules); import levin; levin.Trainer; print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in eval(done.stdout)}
    assert not loaded & set(LATER)


def public_names() -> list[tuple[str, str]]:
    code = (
        "import importlib, levin\n"
        "for room in ('levin', *(f'levin.{name}' for name in levin._ROOMS)):\n"
        "    module = importlib.import_module(room)\n"
        "    for name in getattr(module, '__all__', []):\n"
        "        try:\n"
        "            getattr(module, name)\n"
        "        except (ImportError, AttributeError) as error:\n"
        "            print(f'{room}.{name}: {error}')\n"
    )
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_public_name_is_there():
    assert public_names() == []


# Its name is that of its file, which the room's attribute is.
ONLY_BY_ITS_PATH = {"levin.checkpoint.verify.verify"}


def test_the_reference_lists_exactly_what_the_rooms_give_out():
    import levin

    page = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
    rooms = ["levin", *(f"levin.{room}" for room in levin._ROOMS)]
    assert [title for title in re.findall(r"^## (\S+)", page, re.M) if title not in rooms] == []
    given_out = {}
    for room in rooms:
        module = importlib.import_module(room)
        given_out |= {(name, id(getattr(module, name))): room for name in module.__all__ if name != "__version__"}
    listed = {}
    for path in re.findall(r"^::: (\S+)", page, re.M):
        module, _, name = path.rpartition(".")
        listed[name, id(getattr(importlib.import_module(module), name))] = path
    assert {given_out[key] + "." + key[0] for key in given_out.keys() - listed.keys()} == set()
    assert {listed[key] for key in listed.keys() - given_out.keys()} == ONLY_BY_ITS_PATH


def test_levin_shows_its_names_and_rooms_alone():
    import levin

    assert set(dir(levin)) == {*levin.__all__, *levin._ROOMS} - {"__version__"}
    internal = {"loops", "resume", "ranks", "explain", "codemod", "utilities"}
    assert internal & set(levin._ROOMS) == set()
    for room in internal:
        names = {name for name in vars(importlib.import_module(f"levin.{room}")) if not name.startswith("_")}
        files = {path.stem for path in Path(levin.__file__).parent.joinpath(room).iterdir()}
        assert names - files - {"annotations"} == set()
