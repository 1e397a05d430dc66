"""``import levin`` costs what ``import torch`` costs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

LATER = ("torchmetrics", "rich", "tqdm", "tensorboard", "yaml", "fsspec", "jsonargparse", "omegaconf", "lightning")


def seconds(statement: str, folder: Path) -> float:
    code = f"import torch, time; t = time.process_time(); {statement}; print(time.process_time() - t)"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-X", f"pycache_prefix={folder}", "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.timing
@pytest.mark.parametrize(
    "statement", ["import levin", "from levin import Trainer, LightningModule, LightningDataModule"]
)
def test_import_adds_at_most_150_ms_to_torch(statement, tmp_path):
    seconds(statement, tmp_path)  # compiles
    assert statistics.median(seconds(statement, tmp_path) for _ in range(3)) < 0.15


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
