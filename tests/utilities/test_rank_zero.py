"""Messages of a run, and programs that configure logging before or after levin is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
