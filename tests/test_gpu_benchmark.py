"""The script that measures on a CUDA device works before it gets there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_part_runs_in_toy_size_on_the_cpu(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["part"] for row in rows} == {"tiny", "gpt", "images", "large"}
    for row in rows:
        assert {"bare", "levin"} <= set(row["median_s"])
        assert all(median > 0 for median in row["median_s"].values())
        assert row["title"] in (tmp_path / "gpu.md").read_text()
