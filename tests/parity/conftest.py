"""The run on Lightning must go well, unless the test says which errors it expects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.parity import both


@pytest.fixture(autouse=True)
def lightning_goes_well(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which Lightning raised what ``@pytest.mark.lightning_raises("ValueError", ...)`` does not name."""
    both.errors_of_lightning.clear()
    yield
    expected = {name for mark in request.node.iter_markers("lightning_raises") for name in mark.args}
    surprises = [error for error in both.errors_of_lightning if type(error).__name__ not in expected]
    assert not surprises, f"Lightning itself failed, so nothing was compared: {surprises[0]!r}"
