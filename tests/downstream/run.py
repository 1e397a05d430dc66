"""Run the tests of released packages on Lightning and on levin, and write both outcomes of every test into a table.

    python tests/downstream/run.py [--only NAME ...] [--stored] [--table docs/downstream.md]

The outcomes stay in `outcomes.json`, so that one package can run again without the others. Each package has a virtual environment of its own under `.downstream/`, which also sees the packages of this Python (so that
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
STORE = HERE / "outcomes.json"
Outcomes = dict[str, dict[str, dict[str, str]]]  # package -> framework -> test -> outcome
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
    if package.removed:
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *package.removed], check=True)
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


def stored() -> Outcomes:
    """Return the last outcomes of every package."""
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def run(
    package: Package, framework: str, deadline_s: float, only: list[str] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Return test -> outcome and test -> text of its error on one of the frameworks."""
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
        tests = only or list(package.tests)
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
    found: dict[str, str] = {}
    errors: dict[str, str] = {}
    if outcomes.exists():
        for line in outcomes.read_text().splitlines():
            name, found[name], errors[name] = json.loads(line)
    return found, errors


def pairs_of(by: dict[str, dict[str, str]]) -> dict[str, tuple[str, str]]:
    """Return test -> (outcome on Lightning, outcome on levin)."""
    names = sorted({*by.get("lightning", {}), *by.get("levin", {})})
    return {name: (by["lightning"].get(name, "not run"), by["levin"].get(name, "not run")) for name in names}


def render(results: Outcomes) -> str:
    """Return the page with the tables."""
    lines = [
        "# Real packages on Lightning and on levin",
        "",
        "Each of these released packages imports Lightning. Their own tests, or a script that uses the package as its",
        "documentation says where none are shipped, ran on Lightning and, unchanged, on levin:",
        "`python -m levin -m pytest ...`. `make test-downstream` runs them and writes this page; each package and framework gets",
        "five minutes, or what `--deadline` says, and tests that were not reached on both are not counted.",
        "",
        "| Package | Version | Tests | Same outcome | of them passed | Different |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    details: list[str] = []
    for package in PACKAGES:
        if set(results.get(package.name, ())) != set(FRAMEWORKS):
            lines.append(f"| {package.name} | {package.version} | not run | | | |")
            continue
        pairs = pairs_of(results[package.name])
        ran = {name: pair for name, pair in pairs.items() if "not run" not in pair}
        same = [pair[0] for pair in ran.values() if pair[0] == pair[1]]
        figures = (len(ran), len(same), same.count("passed"), len(ran) - len(same))
        lines.append(f"| {package.name} | {package.version} | {' | '.join(map(str, figures))} |")
        details += ["", f"## {package.name} {package.version}", ""]
        if package.note:
            details += [f"{package.note[0].upper()}{package.note[1:]}.", ""]
        details += ["| Test | Lightning | levin |", "| --- | --- | --- |"]
        details += [f"| `{name}` | {pair[0]} | {pair[1]} |" for name, pair in ran.items()]
        for reason in dict.fromkeys(package.differs.values()):
            names = [f"`{name}`" for name, why in package.differs.items() if why == reason]
            details += ["", f"Different: {', '.join(names)}: {reason}."]
        if len(pairs) > len(ran):
            details += ["", f"Not run, for lack of time: {len(pairs) - len(ran)} tests."]
        for part, reason in package.without.items():
            details += ["", f"Left out: `{part}`: {reason}."]
    return "\n".join([*lines, *details]) + "\n"


def main() -> int:
    """Run the command line; 1 if a test has another outcome on levin than on Lightning, and packages.py gives no reason."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names of packages")
    parser.add_argument("--tests", nargs="*", help="run these alone and keep the last outcomes of the others")
    parser.add_argument("--framework", choices=[*FRAMEWORKS], help="run on this one and take the other's last outcomes")
    parser.add_argument("--deadline", type=float, default=300.0, metavar="S", help="seconds per package and framework")
    parser.add_argument("--freeze", action="store_true", help="pin what the environments hold now")
    parser.add_argument("--stored", action="store_true", help="run nothing, take the last outcomes")
    parser.add_argument("--table", type=Path, help="the page to write")
    parsed = parser.parse_args()
    status = 0
    for package in PACKAGES:
        if parsed.only and package.name not in parsed.only:
            continue
        if parsed.freeze:
            prepare(package)
            freeze(package)
            continue
        errors: dict[str, str] = {}
        for framework in FRAMEWORKS:
            if not parsed.stored and parsed.framework in (None, framework):
                outcomes, errors = run(package, framework, parsed.deadline, parsed.tests)
                # Read again: another package may have run at the same time.
                results = stored()
                kept = results.get(package.name, {}).get(framework, {}) if parsed.tests else {}
                results.setdefault(package.name, {})[framework] = {**kept, **outcomes}
                STORE.write_text(json.dumps(results, indent=0, sort_keys=True) + "\n")
        by = {framework: stored().get(package.name, {}).get(framework, {}) for framework in FRAMEWORKS}
        for name, (theirs, ours) in pairs_of(by).items():
            if theirs != ours and "not run" not in (theirs, ours) and name not in package.differs:
                status = 1
                print(f"{package.name}: {name}: lightning {theirs}, levin {ours}\n{errors.get(name, '')[-600:]}")
        counts = {
            framework: {outcome: n for outcome in ORDER if (n := list(found.values()).count(outcome))}
            for framework, found in by.items()
        }
        print(package.name, counts, flush=True)
    if parsed.table:
        parsed.table.write_text(render(stored()))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
