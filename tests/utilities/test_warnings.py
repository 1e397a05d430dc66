"""Hints that can be silenced, by a function and by the environment; what other ranks leave out."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from levin.utilities.rank_zero import rank_zero_only, rank_zero_warn
from levin.utilities.warnings import PossibleUserWarning, disable_possible_user_warnings


def test_hints_are_silenced_and_nothing_else():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        warnings.warn("shown", PossibleUserWarning, stacklevel=1)
        disable_possible_user_warnings(module="elsewhere")
        warnings.warn("shown too", PossibleUserWarning, stacklevel=1)
        disable_possible_user_warnings()
        warnings.warn("silent", PossibleUserWarning, stacklevel=1)
        warnings.warn("not a hint", UserWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["shown", "shown too", "not a hint"]


@pytest.mark.parametrize(("value", "shown"), [("0", False), ("OFF", False), ("1", True), (None, True)])
def test_the_environment_silences_hints(value, shown):
    name = "POSSIBLE_USER_WARNINGS"
    program = "import levin.utilities.warnings as w, warnings; warnings.warn('a hint', w.PossibleUserWarning)"
    environment = {key: text for key, text in os.environ.items() if key != name}
    environment |= {} if value is None else {name: value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ("PossibleUserWarning: a hint" in done.stderr) == shown


def test_other_ranks_do_nothing_and_give_the_default(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    ran = []
    assert rank_zero_only(ran.append)(1) is None and rank_zero_only(lambda: "rank 0", default="other")() == "other"
    rank_zero_warn("not on this rank")  # a warning would be an error here
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert rank_zero_only(lambda: "rank 0", default="other")() == "rank 0" and not ran
