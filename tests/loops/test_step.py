"""The step of automatic optimization, whatever the optimizer does around the closure."""

from __future__ import annotations

import pytest
import torch

from levin import Trainer
from tests.strategies.small import QUIET, Small


class StepsWithoutGradients(torch.optim.SGD):
    """Calls the closure inside of its own ``no_grad``, as some optimizers do."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure()
        super().step()
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_that_calls_the_closure_under_no_grad_learns(accumulate):
    weights = []
    for kind in (torch.optim.SGD, StepsWithoutGradients):

        class Model(Small):
            def configure_optimizers(self, kind=kind):
                return kind(self.parameters(), lr=0.1)

        model = Model()
        trainer = Trainer(
            **QUIET, devices=1, max_epochs=1, enable_checkpointing=False, limit_val_batches=0,
            accumulate_grad_batches=accumulate,
        )  # fmt: skip
        trainer.fit(model)
        weights.append(model.net[1].weight)
        assert torch.is_grad_enabled()
    assert torch.equal(*weights)
