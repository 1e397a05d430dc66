"""A terminal for the bars to write to."""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any

import pytest

from tests.callbacks.progress.screen import Terminal


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Standard output and standard error of the test, which share a screen of 80 columns."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    for name in ("COLAB_GPU", "TQDM_MINITERS", "PYCHARM_HOSTED"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    # pytest sets the streams anew after the fixtures, so they can only be replaced around the test itself.
    terminal = getattr(item, "funcargs", {}).get("terminal")
    with pytest.MonkeyPatch.context() as patch:
        if terminal is not None:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
        return (yield)
