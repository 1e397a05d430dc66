"""Messages of a run, and programs that configure logging before or after levin is imported."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from levin.utilities.rank_zero import (
    rank_zero_debug,
    rank_zero_deprecation,
    rank_zero_info,
    rank_zero_only,
    rank_zero_warn,
    set_rank,
)
from levin.utilities.warnings import LightningDeprecationWarning

CONFIGURE = (
    "import logging, sys; logging.basicConfig(level=logging.INFO, format='theirs: %(message)s', stream=sys.stderr)"
)
IMPORT = "from levin.utilities.rank_zero import rank_zero_info"


@pytest.mark.parametrize(
    ("lines", "shown"),
    [([IMPORT], "hello"), ([CONFIGURE, IMPORT], "theirs: hello"), ([IMPORT, CONFIGURE], "theirs: hello")],
    ids=["nobody configures", "before the import", "after the import"],
)
def test_a_message_is_shown_once(lines, shown):
    program = "\n".join([*lines, "rank_zero_info('hello')"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [shown]


def test_messages_take_what_logging_and_warnings_take(caplog):
    with caplog.at_level("DEBUG", logger="levin"):
        rank_zero_info("%s of %s", 1, 2, extra={"epoch": 3})
        rank_zero_debug("a trace", stack_info=True, stacklevel=1)
    info, debug = caplog.records
    assert info.getMessage() == "1 of 2" and vars(info)["epoch"] == 3 and info.filename == Path(__file__).name
    assert debug.stack_info is not None and debug.filename == "rank_zero.py"
    with pytest.warns(FutureWarning, match="will change"):
        rank_zero_warn(FutureWarning("will change"), source=None)
    with pytest.warns(PendingDeprecationWarning, match="will go"):
        rank_zero_deprecation("will go", category=PendingDeprecationWarning)
    with pytest.warns(LightningDeprecationWarning, match="will go too"):
        rank_zero_deprecation("will go too")


LIGHTNING_UTILITIES = """
from lightning_utilities.core.rank_zero import rank_zero_only
from levin import Trainer
from levin.demos.boring_classes import BoringModel
Trainer(accelerator="cpu", fast_dev_run=True, logger=False, enable_progress_bar=False).fit(BoringModel())
print(rank_zero_only(lambda: "rank 0")())
"""


def test_packages_that_ask_lightning_utilities_learn_the_rank():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LIGHTNING_UTILITIES], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["rank 0"], done.stderr


def test_the_rank_that_was_set_stays_until_another_is_set(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    on_first = rank_zero_only(lambda: "first", default="other")
    assert on_first() == "first"
    set_rank(2)
    set_rank()
    assert rank_zero_only.rank == 2 and on_first() == "other"
    set_rank(0)
    assert on_first() == "first"


@pytest.mark.parametrize(("warn", "caller"), [(rank_zero_warn, 4), (rank_zero_deprecation, 5)])
def test_a_warning_points_to_who_gives_it_or_above_as_in_lightning(warn, caller):
    def give(**kwargs):
        warn("careful", **kwargs)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        give()
        give(stacklevel=caller + 1)
    first = give.__code__.co_firstlineno
    assert [(Path(each.filename).name, each.lineno) for each in caught] == [
        ("test_rank_zero.py", first + 1), ("test_rank_zero.py", first + 6),
    ]  # fmt: skip
