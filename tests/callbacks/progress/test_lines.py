"""The line that stands for a bar where there is no terminal."""

from __future__ import annotations

import pytest

from levin.callbacks.progress.lines import format_line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((20, 40, 0.5, 20), "Epoch 0:  50% 20/40 [00:00<00:00, 40.00it/s]"),
        ((20, 40, 10.0, 20), "Epoch 0:  50% 20/40 [00:10<00:10, 2.00it/s]"),
        ((20, None, 0.5, 10), "Epoch 0: 20/? [00:00, 20.00it/s]"),
        ((0, 40, 0.0, 0), "Epoch 0:   0% 0/40 [00:00<?, 0.00it/s]"),
        ((0, 0, 1.0, 0), "Epoch 0: 100% 0/0 [00:01<?, 0.00it/s]"),
    ],
)
def test_done_left_and_rate(arguments, line):
    assert format_line("Epoch 0", *arguments, {}) == line
