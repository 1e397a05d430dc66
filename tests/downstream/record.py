"""A pytest plugin: writes each test's outcome into the file $OUTCOMES as it comes, and stops after $DEADLINE_S seconds."""

from __future__ import annotations

import json
import os
import time

import pytest

_START = time.monotonic()


def _write(name: str, outcome: str, text: str = "") -> None:
    with open(os.environ["OUTCOMES"], "a") as file:
        file.write(json.dumps([name, outcome, text[-2000:]]) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    for item in session.items:
        _write(item.nodeid, "not run")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(report.nodeid, "error", str(report.longrepr))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome if report.when == "call" or report.outcome == "skipped" else "error"
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        _write(report.nodeid, outcome, str(report.longrepr or ""))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _START > float(os.environ.get("DEADLINE_S", "inf")):
        item.session.shouldstop = "the time for this package is over"
        pytest.exit("the time for this package is over", returncode=0)
