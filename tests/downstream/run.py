"""Run the tests of released packages on Lightning and on levin, and write both outcomes of every test into a table.

    python tests/downstream/run.py [--only NAME ...] [--table docs/downstream.md]

Each package has a virtual environment of its own under `.downstream/`, which also sees the packages of this Python (so that
torch is there once). Everything is pinned: the package in packages.py, what it pulls in in `constraints/`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from packages import PACKAGES, Package

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / ".downstream"
FRAMEWORKS = {"lightning": (), "levin": ("-m", "levin")}
ORDER = ("passed", "xfailed", "xpassed", "skipped", "failed", "error", "not run")


def prepare(package: Package) -> Path:
    """Make the package's environment and unpack its source distribution; return the folder of both."""
    folder = WORK / package.name
    python = folder / "venv" / "bin" / "python"
    done = folder / f"installed-{package.version}"
    if done.exists():
        return folder
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    packages = next(folder.glob("venv/lib/python*/site-packages"))
    (packages / "base.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    pins = HERE / "constraints" / f"{package.name}.txt"
    constraints = ["--constraint", str(pins)] if pins.exists() else ["--constraint", str(ROOT / "constraints.txt")]
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    wanted = [f"{package.name}=={package.version}", *package.requirements]
    subprocess.run([*pip, "install", "--quiet", *constraints, *wanted], check=True)
    if not package.is_ours:
        exact = f"{package.name}=={package.version}"
        options = ["--quiet", "--no-binary", package.name, "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, "download", *options, exact], check=True)
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    done.touch()
    return folder


def freeze(package: Package) -> None:
    """Write what the package's own environment holds into `constraints/`."""
    packages = next((WORK / package.name).glob("venv/lib/python*/site-packages"))
    found = [f"{found.name}=={found.version}" for found in importlib.metadata.distributions(path=[str(packages)])]
    (HERE / "constraints").mkdir(exist_ok=True)
    lines = sorted(
        {"torch==2.13.0", *(line for line in found if line.partition("==")[0] not in ("pip", "setuptools"))},
        key=str.lower,
    )
    (HERE / "constraints" / f"{package.name}.txt").write_text("\n".join(lines) + "\n")


def run(package: Package, framework: str, deadline_s: float) -> dict[str, tuple[str, str]]:
    """Return test -> (outcome, text of its error) on one of the frameworks."""
    folder = prepare(package)
    work = folder / framework
    shutil.rmtree(work, ignore_errors=True)
    if package.is_ours:
        work.mkdir(parents=True)
        for test in package.tests:
            # Named so that the project's own suite does not collect it.
            shutil.copy(HERE / test, work / f"test_{Path(test).name}")
        tests = [f"test_{Path(test).name}" for test in package.tests]
    else:
        (source,) = (path for path in folder.iterdir() if path.is_dir() and path.name.endswith(f"-{package.version}"))
        # The tests alone: the package itself is the installed one.
        shutil.copytree(source / "tests", work / "tests")
        for name in ("pyproject.toml", "examples"):
            if (source / name).is_dir():
                shutil.copytree(source / name, work / name)
        tests = list(package.tests)
    if package.made:
        subprocess.run([str(folder / "venv" / "bin" / "python"), str(HERE / package.made), str(work)], check=True)
    (work / "pytest.ini").write_text("[pytest]\n")
    outcomes = work / "outcomes.jsonl"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), *([str(ROOT / "src")] if framework == "levin" else [])]),
        "OUTCOMES": str(outcomes),
        "DEADLINE_S": str(deadline_s),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MPLBACKEND": "agg",
    }
    options = [
        "-q",
        "-p",
        "record",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--timeout",
        "200",
        "-W",
        "ignore",
    ]
    for part in package.without:
        options += ["--deselect", part]
    python = str(folder / "venv" / "bin" / "python")
    command = [python, *FRAMEWORKS[framework], "-m", "pytest", *options, *tests]
    with open(work / "log.txt", "w") as log:
        subprocess.run(command, cwd=work, env=environment, stdout=log, stderr=log, timeout=deadline_s + 300)
    found: dict[str, tuple[str, str]] = {}
    if outcomes.exists():
        for line in outcomes.read_text().splitlines():
            name, outcome, text = json.loads(line)
            found[name] = (outcome, text)
    return found


def render(results: dict[str, dict[str, dict[str, tuple[str, str]]]]) -> str:
    """Return the page with the tables."""
    lines = [
        "# Real packages on Lightning and on levin",
        "",
        "Each of these released packages imports Lightning. Their own tests, or a script that uses the package as its",
        "documentation says where none are shipped, ran on Lightning and, unchanged, on levin:",
        "`python -m levin -m pytest ...`. `make test-downstream` writes this page.",
        "",
        "| Package | Version | Tests | Same outcome | Different |",
        "| --- | --- | --- | --- | --- |",
    ]
    details: list[str] = []
    for package in PACKAGES:
        if set(results.get(package.name, ())) != set(FRAMEWORKS):
            lines.append(f"| {package.name} | {package.version} | not run | | |")
            continue
        by = results[package.name]
        names = sorted({*by["lightning"], *by["levin"]})
        pairs = {name: tuple(by[framework].get(name, ("not run", ""))[0] for framework in FRAMEWORKS) for name in names}
        ran = {name: pair for name, pair in pairs.items() if "not run" not in pair}
        same = sum(pair[0] == pair[1] for pair in ran.values())
        lines.append(f"| {package.name} | {package.version} | {len(ran)} | {same} | {len(ran) - same} |")
        details += ["", f"## {package.name} {package.version}", ""]
        if package.note:
            details += [f"{package.note[0].upper()}{package.note[1:]}.", ""]
        details += ["| Test | Lightning | levin |", "| --- | --- | --- |"]
        details += [f"| `{name}` | {pair[0]} | {pair[1]} |" for name, pair in ran.items()]
        if len(pairs) > len(ran):
            details += ["", f"Not run, for lack of time: {len(pairs) - len(ran)} tests."]
        for part, reason in package.without.items():
            details += ["", f"Left out: `{part}`: {reason}."]
    return "\n".join([*lines, *details]) + "\n"


def main() -> int:
    """Run the command line; 1 if a test has another outcome on levin than on Lightning."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of packages")
    parser.add_argument("--framework", choices=[*FRAMEWORKS], help="run on this one and take the other's last outcomes")
    parser.add_argument("--deadline", type=float, default=300.0, metavar="S", help="seconds per package and framework")
    parser.add_argument("--freeze", action="store_true", help="pin what the environments hold now")
    parser.add_argument("--table", type=Path, help="the page to write")
    parsed = parser.parse_args()
    store = WORK / "outcomes.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    status = 0
    for package in PACKAGES:
        if parsed.only and package.name not in parsed.only:
            continue
        prepare(package)
        if parsed.freeze:
            freeze(package)
            continue
        for framework in FRAMEWORKS:
            if parsed.framework in (None, framework):
                results.setdefault(package.name, {})[framework] = run(package, framework, parsed.deadline)
                store.write_text(json.dumps(results))
        by = results[package.name]
        for name in sorted({*by.get("lightning", {}), *by.get("levin", {})}):
            theirs, ours = (by.get(key, {}).get(name, ("not run", "")) for key in FRAMEWORKS)
            if theirs[0] != ours[0] and "not run" not in (theirs[0], ours[0]):
                status = 1
                print(f"{package.name}: {name}: lightning {theirs[0]}, levin {ours[0]}\n{ours[1][-600:]}")
        counts = {
            key: {outcome: n for outcome in ORDER if (n := sum(v[0] == outcome for v in by.get(key, {}).values()))}
            for key in FRAMEWORKS
        }
        print(package.name, counts, flush=True)
    if parsed.table:
        parsed.table.write_text(render(results))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
