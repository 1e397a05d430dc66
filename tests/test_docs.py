"""The code in README and docs runs."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_the_page_run(page):
    names: dict = {"__name__": "docs"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
            exec(compile(block, str(page), "exec"), names)


def proofs() -> list[tuple[str, str, str]]:
    """The rows of the tables in docs/contract.md: (section, capability, what proves it)."""
    rows, section = [], ""
    for line in (ROOT / "docs" / "contract.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif section and line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            if len(cells) >= 2 and cells[0] != "Capability" and set(cells[0]) - set("-: "):
                rows.append((section, cells[0], " ".join(cells[1:])))
    return rows


def functions_of(file: Path) -> set[str]:
    """Names of the functions in a file; those of a class as ``Class::function`` too."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.ClassDef):
            names.update(f"{node.name}::{child.name}" for child in node.body if isinstance(child, ast.FunctionDef))
    return names


def test_every_proof_in_the_contract_exists():
    wrong = []
    for section, capability, proof in proofs():
        found = re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)(?:\[[^`]*\])?`", proof)
        if not found:
            wrong.append(f"{section}: {capability!r} names no test as `tests/...py::function`, received {proof!r}")
        for name, function in found:
            file = ROOT / name
            if not file.is_file():
                wrong.append(f"{section}: {capability!r} names {name}, which is not there")
            elif function not in functions_of(file) or not function.split("::")[-1].startswith("test_"):
                wrong.append(f"{section}: {capability!r} names {name}::{function}, which is not in the file")
    assert not wrong, "\n".join(wrong)


def test_every_capability_of_the_contract_stands_once():
    names = [(section, capability) for section, capability, _ in proofs()]
    assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]


def test_every_marker_that_a_target_names_is_declared(pytestconfig):
    declared = {re.split(r"\W", line)[0] for line in pytestconfig.getini("markers")}
    named = set()
    for expression in re.findall(r'-m (?:"([^"]+)"|(?!pip|pytest|venv)(\w+))', (ROOT / "Makefile").read_text()):
        named |= set(re.findall(r"\w+", "".join(expression))) - {"and", "or", "not"}
    assert {"slow", "timing"} <= named <= declared
