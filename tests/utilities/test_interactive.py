"""Whether a person sits at a prompt."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from levin.utilities.interactive import is_interactive

ASK = "from levin.utilities.interactive import is_interactive; print(is_interactive())"


@pytest.mark.parametrize(("options", "answer"), [(["-i"], "True"), ([], "False")])
def test_a_process_that_ends_at_a_prompt_is_interactive(options, answer):
    asked = [sys.executable, *options, "-c", ASK]
    done = subprocess.run(asked, input="", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == answer


@pytest.mark.parametrize("shell", [None, object()])
def test_a_notebook_is_interactive(monkeypatch, shell):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert is_interactive() is (shell is not None)


def test_a_prompt_is_interactive(monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert is_interactive() is True
