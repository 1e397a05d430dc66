"""Run the tests against real services and schedulers one after the other, and print a table: `make test-integrations`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Target of make -> the packages whose versions matter.
TARGETS = {
    "test-loggers": ["mlflow", "wandb", "comet-ml", "trackio", "litlogger"],
    "test-slurm": ["slurm-wlm", "submitit"],
    "test-ray": ["ray"],
    "test-jobs": ["optuna", "hydra-core"],
    "test-stores": ["s3fs", "moto"],
    "test-mpi": ["mpi4py", "mpich"],
}


def version_of(package: str) -> str:
    if package == "slurm-wlm":
        done = subprocess.run(["dpkg-query", "-f", "${Version}", "-W", package], capture_output=True, text=True)
        return done.stdout.partition("-")[0]
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "constraints-integrations.txt").read_text()
    found = re.search(rf"^{package}==(.*)$", pins, re.M)
    return found[1] if found else "?"


def main() -> int:
    rows, has_failed = [], False
    for target, packages in TARGETS.items():
        began = time.monotonic()
        done = subprocess.run(["make", target], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        (ROOT / ".venv" / f"{target}.log").write_text(done.stdout)
        summary = re.findall(r"^(?:=+ )?(\d+ (?:passed|failed|error|skipped).*?) in ", done.stdout, re.M)
        outcome = summary[-1] if summary else "could not be run"
        if done.returncode:
            has_failed = True
            print(done.stdout)
        versions = ", ".join(f"{package} {version_of(package)}" for package in packages)
        rows.append((target, versions, outcome, f"{time.monotonic() - began:.0f} s"))
        print(*rows[-1], sep="  ", flush=True)
    print()
    for row in [("target", "with", "outcome", "time"), *rows]:
        print("| " + " | ".join(row) + " |")
    print("\nWhat each one wrote is in .venv/test-*.log.")
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
