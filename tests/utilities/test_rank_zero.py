"""Messages of a run, and programs that configure logging before or after levin is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

CONFIGURE = "import logging, sys; logging.basicConfig(level=logging.INFO, format='theirs: %(message)s', stream=sys.stderr)"
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
