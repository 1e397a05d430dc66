"""The step of automatic optimization, whatever the optimizer does around the closure."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from levin import Fabric, Trainer
from levin.precision import Precision
from levin.strategies import SingleDeviceStrategy
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


class StepsByHand(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.net(batch[0]).pow(2).mean()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


def test_an_optimizer_that_calls_the_closure_of_a_manual_step_under_no_grad_learns():
    weights = []
    for kind in (torch.optim.SGD, StepsWithoutGradients):

        class Model(StepsByHand):
            def configure_optimizers(self, kind=kind):
                return kind(self.parameters(), lr=0.1)

        model = Model()
        first = model.net[1].weight.detach().clone()
        Trainer(**QUIET, devices=1, max_epochs=1, enable_checkpointing=False, limit_val_batches=0).fit(model)
        weights.append(model.net[1].weight)
        assert not torch.equal(weights[-1], first)
    assert torch.equal(*weights)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_optimizer_that_calls_the_closure_of_fabric_under_no_grad_learns(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    weights = []
    for kind in (torch.optim.SGD, StepsWithoutGradients):
        plain = torch.nn.Linear(4, 1)
        torch.nn.init.ones_(plain.weight)
        module, optimizer = fabric.setup(plain, kind(plain.parameters(), lr=0.1))

        def closure(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            loss = module(torch.ones(2, 4)).mean()
            fabric.backward(loss)
            return loss

        optimizer.step(closure)
        weights.append(plain.weight)
        assert not torch.equal(weights[-1], torch.ones(1, 4))
    assert torch.equal(*weights)


@pytest.mark.parametrize("who", ["strategy", "precision"])
def test_an_own_optimizer_step_is_called_for_every_step(who):
    steps = []

    class Counting:
        def optimizer_step(self, optimizer, *args, **kwargs):
            steps.append(type(optimizer).__name__)
            return super().optimizer_step(optimizer, *args, **kwargs)

    part = {
        "strategy": lambda: {"strategy": type("Own", (Counting, SingleDeviceStrategy), {})(torch.device("cpu"))},
        "precision": lambda: {"plugins": type("Own", (Counting, Precision), {})()},
    }[who]()
    settings = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(**QUIET, devices=1, **settings, **part)
    trainer.fit(Small())
    assert steps == ["SGD"] * 3
    assert trainer.global_step == 3


def test_the_device_of_the_run_is_known_in_setup(monkeypatch):
    class Looks(Small):
        def setup(self, stage):
            seen.append((self.device.type, next(self.parameters()).device.type))
            raise InterruptedError("meant")

    seen: list[tuple[str, str]] = []
    trainer = Trainer(**QUIET, devices=1)
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("meta"))
    monkeypatch.setattr(trainer.accelerator, "setup_device", lambda device: None)
    with pytest.raises(InterruptedError, match="meant"):
        trainer.test(Looks(), DataLoader(torch.zeros(1)))
    assert seen == [("meta", "cpu")]


@pytest.mark.parametrize("value", [None, 0.5])
def test_an_own_clip_gradients_is_called_for_every_step(value):
    class Clipping(Small):
        def clip_gradients(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            asked.append(gradient_clip_val)

    asked = []
    settings = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 0, "enable_checkpointing": False}
    Trainer(**QUIET, devices=1, gradient_clip_val=value, **settings).fit(Clipping())
    assert asked == [value] * 3
