"""How many batches there are of each of the loaders that are evaluated together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from tests.parity import trace
from tests.parity.test_data_combined_loader import combined
from tests.parity.test_data_loaders import make_module


@pytest.mark.parametrize("limit", [1.0, 2, 0.5, 10])
@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_numbers_of_batches_are_those_of_each_loader(tmp_path, mode, limit):
    def code(seen: trace.Trace) -> None:
        def loaders() -> Any:
            sizes = {"a": 3, "b": 2}
            joint = {name: DataLoader(torch.ones(size, 4)) for name, size in sizes.items()}
            return combined(seen.framework)(joint, mode)

        trainer = seen.trainer(max_epochs=1, limit_val_batches=limit, limit_test_batches=limit, num_sanity_val_steps=2)
        trainer.fit(make_module(seen), DataLoader(torch.ones(2, 4)), loaders())
        seen.note(trainer.num_sanity_val_batches, trainer.num_val_batches)
        trainer.validate(make_module(seen), loaders(), verbose=False)
        seen.note(trainer.num_val_batches)
        trainer.test(make_module(seen), loaders(), verbose=False)
        seen.note(trainer.num_test_batches)

    trace.same(code, tmp_path)
