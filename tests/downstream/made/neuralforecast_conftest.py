"""Writes the fixture that neuralforecast's tests ask for and its source distribution leaves out."""

import sys
from pathlib import Path

SOURCE = '''
import pytest
from neuralforecast.utils import AirPassengersPanel


@pytest.fixture
def setup_airplane_data():
    """The two series of the package's own panel: all but the last year, and that year."""
    last = AirPassengersPanel["ds"].values[-12]
    before = AirPassengersPanel[AirPassengersPanel["ds"] < last].reset_index(drop=True)
    after = AirPassengersPanel[AirPassengersPanel["ds"] >= last].reset_index(drop=True)
    return before, after
'''

folder = Path(sys.argv[1]) / "tests"
(folder / "conftest.py").write_text(SOURCE)
(folder / "__init__.py").touch()
