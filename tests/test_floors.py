"""The oldest versions that levin says it runs on are those that `make test-oldest` installs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_floors_are_what_is_tested():
    text = (ROOT / "pyproject.toml").read_text()
    floors = dict(re.findall(r'^  "([\w-]+)(?:\[\w+\])?>=([\d.]+)"', text, re.MULTILINE))
    floors |= re.findall(r'"(jsonargparse)\[\w+\]>=([\d.]+)"', text)
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    assert floors == dict(line.split("==") for line in lines if not line.startswith("#"))
