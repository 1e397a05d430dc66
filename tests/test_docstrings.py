"""The examples in docstrings run: with the names of their file, torch and levin, in an empty folder."""

from __future__ import annotations

import ast
import doctest
import importlib
import warnings
from pathlib import Path

import pytest
import torch

import levin

SOURCE = Path(__file__).parents[1] / "src"
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text()]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def examples_of(path: Path) -> list[doctest.DocTest]:
    module = importlib.import_module(".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"))
    names = {"torch": torch, "levin": levin, **vars(module)}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and ">>> " in (text := ast.get_docstring(node) or ""):
            name = getattr(node, "name", module.__name__)
            found.append(doctest.DocTestParser().get_doctest(text, names, name, str(path), 0))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_the_examples_of_a_file_run(path: Path) -> None:
    examples = examples_of(path)
    assert examples, "the examples stand in no docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for example in examples:
            runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
