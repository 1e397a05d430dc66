"""The page about real packages says what the stored outcomes say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    import run

    yield run
    for name in ("run", "packages"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_stored_outcomes_give(run):
    assert (HERE.parents[1] / "docs" / "downstream.md").read_text() == run.render(run.stored())


def test_every_different_outcome_has_a_reason_and_every_reason_a_different_outcome(run):
    for package in run.PACKAGES:
        pairs = run.pairs_of(run.stored().get(package.name, {}))
        different = {name for name, pair in pairs.items() if pair[0] != pair[1] and "not run" not in pair}
        assert different == set(package.differs), package.name


def test_the_page_counts_the_same_and_the_different(run):
    outcomes = {"lightning": {"a": "passed", "b": "failed", "c": "passed", "d": "passed"}}
    outcomes["levin"] = {"a": "passed", "b": "failed", "c": "failed", "d": "not run"}
    page = run.render({"darts": outcomes})
    assert "| darts | 0.48.1 | 3 | 2 | 1 | 1 |" in page
    assert "| `c` | passed | failed |" in page and "Not run, for lack of time: 1 tests." in page
    assert "| chemprop | 2.3.1 | not run | | | |" in page
