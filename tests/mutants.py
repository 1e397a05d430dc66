"""Change the code at random, one place at a time, and see whether a test notices.

    python tests/mutants.py --number 60 --paths src/levin/callbacks
    python tests/mutants.py --number 60 --paths src/levin/module.py -- tests/parity/test_module_state.py

The tests of a room, and those that compare with Lightning, run once under coverage, when the first mutant is drawn that may
meet them; coverage knows who came by each line, in processes that a test started too, and each mutant then meets those tests
alone: first the ones that run the fewest lines, and as many as a number of seconds holds; if these notice nothing, more of
them. What runs when a file is imported meets all that come by the file. What no test notices is printed with its place, and
the share of those that were noticed. Lines that none of these tests runs give no mutants.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
_COMPARED = {
    ast.Lt: ">=", ast.GtE: "<", ast.Gt: "<=", ast.LtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
_COMPUTED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*"}

_ELSEWHERE = {
    "callbacks": "tests/checkpoint", "resume": "tests/checkpoint", "settings": "tests/test_trainer_arguments.py",
    "strategies": "tests/ranks",
}  # fmt: skip
"""Room -> more of its tests, beside those of its name."""


class Mutant(NamedTuple):
    """One change: the bytes from ``start`` to ``end`` of a file become ``text``."""

    path: Path
    line: int  # 0 for what runs at import
    start: int
    end: int
    text: str


class Covered(NamedTuple):
    """What is known of tests: who comes by a line of a file, first who runs the fewest lines, and the seconds of each."""

    tests: dict[tuple[str, int], list[str]]
    seconds: dict[str, float]

    def chosen(self, mutant: Mutant, limits_s: tuple[float, float]) -> tuple[list[str], list[str]]:
        """Return the tests that a mutant meets first, one at least where there is one, and those that it meets then.

        Args:
            mutant: The mutant.
            limits_s: How many seconds of tests these are at most.
        """
        come_by = list(self.tests.get((str(mutant.path), mutant.line), ()))
        first = _within(limits_s[0], come_by, self.seconds) or come_by[:1]
        return first, _within(limits_s[1], [test for test in come_by if test not in first], self.seconds)


def _within(limit_s: float, tests: list[str], seconds: dict[str, float]) -> list[str]:
    found = []
    for test in tests:
        if seconds[test] <= limit_s:
            found.append(test)
            limit_s -= seconds[test]
    return found


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield the changes that a file may get: comparisons, arithmetic, constants, conditions, returns, calls left out."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def code(node: ast.expr) -> str:
        return ast.unparse(node)

    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    late = {id(inner) for function in functions for part in function.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        text = None
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            text = f"({code(node.left)} {_COMPARED[type(node.ops[0])]} {code(node.comparators[0])})"
        elif isinstance(node, ast.BoolOp):
            word = " or " if isinstance(node.op, ast.And) else " and "
            text = "(" + word.join(f"({code(value)})" for value in node.values) + ")"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            text = f"bool({code(node.operand)})"
        elif isinstance(node, ast.BinOp) and type(node.op) in _COMPUTED:
            text = f"(({code(node.left)}) {_COMPUTED[type(node.op)]} ({code(node.right)}))"
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int)):
            text = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
        elif isinstance(node, ast.IfExp):
            text = f"(({code(node.orelse)}) if ({code(node.test)}) else ({code(node.body)}))"
        elif isinstance(node, ast.Return) and node.value is not None and code(node.value) != "None":
            text = "return None"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            text = "pass"
        if text is not None and isinstance(node, (ast.expr, ast.stmt)) and node.end_lineno and node.end_col_offset:
            start = starts[node.lineno - 1] + node.col_offset
            line = node.lineno if id(node) in late else 0
            yield Mutant(path, line, start, starts[node.end_lineno - 1] + node.end_col_offset, text)


class Known:
    """What is known of each folder or file of tests, found out when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[str, Future[Covered]] = {}
        self._lock = threading.Lock()

    def come_by(self, tests: str) -> Covered:
        """Return what ``tests`` come by: who asks first runs them, who asks meanwhile waits."""
        with self._lock:
            first = tests not in self._found
            future = self._found.setdefault(tests, Future())
        if first:
            try:
                future.set_result(who_comes_by(tests, Path(tempfile.mkdtemp(dir=self._folder))))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def who_comes_by(tests: str, folder: Path) -> Covered:
    """Run a folder or file of tests under coverage. Those that fail are left out: on the code as it is, they would notice anything."""
    from coverage import CoverageData

    data = folder / "coverage"
    settings = folder / "settings"
    settings.write_text(
        f"[run]\ndata_file = {data}\nsource = {ROOT / 'src'}\nparallel = true\nconcurrency = multiprocessing,thread\n"
        "patch = subprocess,_exit\ncontext = ${PYTEST_CURRENT_TEST-}\n"
        # Warnings are errors here: a worker of a loader that runs none of the code would end in one.
        "disable_warnings = no-data-collected\n"
    )
    coverage = [sys.executable, "-m", "coverage"]
    run = [*coverage, "run", f"--rcfile={settings}", "-m"]
    run += _pytest(["-rpfE", "--durations=0", "-vv", "-p", "tests.mutants", tests])
    # A process that is forked off finds the name of the running test in its environment.
    environment = _environment(ROOT / "src") | {"LEVIN_TEST_START_METHOD": "fork"}
    done = subprocess.run(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    subprocess.run([*coverage, "combine", "--quiet", f"--rcfile={settings}"], cwd=ROOT, check=True)
    outcomes = re.findall(r"^(PASSED|FAILED|ERROR) ([^\s\[]+)", done.stdout, re.MULTILINE)
    failing = {test for outcome, test in outcomes if outcome != "PASSED"}
    passing = {test for _, test in outcomes} - failing
    if failing or not passing:
        print(f"Not used, they fail on the code as it is: {sorted(failing)}\n{done.stdout[-300:]}", file=sys.stderr)
    seconds = Counter[str]()
    for duration, test in re.findall(r"^([\d.]+)s (?:setup|call|teardown) +([^\s\[]+)", done.stdout, re.MULTILINE):
        seconds[test] += float(duration)
    found = CoverageData(str(data))
    found.read()
    lines: dict[tuple[str, int], set[str]] = {}
    for file in found.measured_files():
        for line, contexts in found.contexts_by_lineno(file).items():
            who = passing.intersection(re.split(r"\[| \(", context)[0] for context in contexts)
            lines[file, line] = who
            lines[file, 0] = lines.get((file, 0), set()) | who
    breadth = Counter(test for who in lines.values() for test in who)
    ordered = {place: sorted(who, key=lambda test: (breadth[test], test)) for place, who in lines.items()}
    return Covered(ordered, seconds)


def pytest_runtest_logstart(nodeid: str) -> None:
    """As a plugin of pytest's, under coverage: put down to the test what runs from here on, its fixtures counted too."""
    from coverage import Coverage

    running = Coverage.current()
    assert running is not None
    running.switch_context(nodeid.partition("[")[0])


def tests_of(path: Path) -> list[str]:
    """Return the tests of the room that a file of the code is in, a folder or files of that name, and all comparisons."""
    room = path.relative_to(ROOT / "src/levin").parts[0].removesuffix(".py")
    found = [
        *([ROOT / _ELSEWHERE[room]] if room in _ELSEWHERE else ()),
        *ROOT.glob(f"tests/{room}"),
        *ROOT.glob(f"tests/test_{room}*.py"),
    ]
    return [*(str(test.relative_to(ROOT)) for test in found), "tests/parity"]


def outcome_of(mutant: Mutant, tests: list[str], copy: Path, timeout_s: float = 300) -> str:
    """Run ``tests`` on a copy of the code that holds the mutant: ``"noticed"``, ``"not noticed"`` or ``"out of time"``."""
    target = copy / mutant.path.relative_to(ROOT / "src")
    source = mutant.path.read_bytes()
    target.write_bytes(source[: mutant.start] + mutant.text.encode() + source[mutant.end :])
    run = [sys.executable, "-m", *_pytest(["-x", *tests])]
    process = subprocess.Popen(
        run,
        cwd=ROOT,
        env=_environment(copy),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return "noticed" if process.wait(timeout_s) else "not noticed"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
        target.write_bytes(source)


def _pytest(arguments: list[str]) -> list[str]:
    return ["pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow and not timing", *arguments]


def _environment(source: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])}


def main() -> int:
    """Return 0 if at least nine of ten are noticed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300, help="how many mutants")
    parser.add_argument("--seed", type=int, default=None, help="which ones")
    parser.add_argument("--paths", nargs="+", default=["src/levin"], help="what may be changed")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of tests of a folder that a mutant meets at first, if more than one"
    )
    parser.add_argument(
        "--more", type=float, default=120, help="of tests of a folder that it meets if these notice nothing"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many mutants are tried at a time")
    parser.add_argument("tests", nargs="*", help="what pytest runs; by default the tests of the room")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    files = [
        file
        for path in arguments.paths
        for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py"))
    ]
    possible = [mutant for file in sorted(files) for mutant in mutants(file)]
    draw.shuffle(possible)
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.jobs) as pool:
        known = Known(Path(name))
        waiting = iter(possible)

        def work(copy: Path) -> None:
            shutil.copytree(ROOT / "src", copy)
            for mutant in iter(lambda: next(waiting, None), None):
                folders = arguments.tests or tests_of(mutant.path)
                found = [known.come_by(each).chosen(mutant, (arguments.seconds, arguments.more)) for each in folders]
                first, then = ([test for tests in several for test in tests] for several in zip(*found))
                if outcomes.total() >= arguments.number:
                    return
                if not first:
                    continue
                outcome = outcome_of(mutant, first, copy)
                if outcome == "not noticed" and then:
                    outcome = outcome_of(mutant, then, copy, timeout_s=1800)
                outcomes[outcome] += 1
                if outcome != "noticed":
                    old = mutant.path.read_bytes()[mutant.start : mutant.end].decode()
                    line = mutant.path.read_bytes()[: mutant.start].count(b"\n") + 1
                    print(f"{outcome}: {mutant.path.relative_to(ROOT)}:{line}: {old!r} -> {mutant.text!r}", flush=True)
                if outcomes.total() % 10 == 0:
                    print(dict(outcomes), file=sys.stderr, flush=True)

        for job in [pool.submit(work, Path(name) / f"src{number}") for number in range(arguments.jobs)]:
            job.result()
    # One that makes the code run for ever is noticed by whoever waits for it.
    share = 1 - outcomes["not noticed"] / max(1, outcomes.total())
    print(
        f"{dict(outcomes)}: {share:.0%} of {outcomes.total()} mutants were noticed, of {len(possible)} possible ones."
    )
    return int(share < 0.9)


if __name__ == "__main__":
    sys.exit(main())
