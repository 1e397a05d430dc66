"""Stepping torch's optimizers by the short way changes nothing that anybody can see."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from levin import Fabric, LightningModule, Trainer

OPTIMIZERS = [
    kind
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adafactor", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop",
                 "Rprop", "LBFGS", "Muon")
    if (kind := getattr(torch.optim, name, None))
]  # fmt: skip


class Module(LightningModule):
    def __init__(self, kind=torch.optim.SGD, bias=False, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3, bias=bias)
        self.kind, self.kwargs = kind, kwargs

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return self.kind(self.parameters(), lr=0.1, **self.kwargs)


def batches():
    return list(torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1)))


def fit(module, callbacks=None):
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(), batch_size=None))
    return trainer


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_learns_what_it_learns_in_a_bare_loop(kind):
    module, bare = Module(kind), Module(kind)
    fit(module)
    optimizer = bare.configure_optimizers()
    for batch in batches() * 2:

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = bare.training_step(batch, 0)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert torch.equal(module.net.weight, bare.net.weight)


class Late(Module):
    """Puts something on its optimizer at the start of the second epoch."""

    def __init__(self, put):
        super().__init__()
        self.put, self.calls = put, []

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.put(self, self.optimizers().optimizer)


def a_step(module, optimizer):
    before = optimizer.step

    def step(closure=None):
        module.calls.append(closure is not None)
        return before(closure)

    optimizer.step = step


def a_zero_grad(module, optimizer):
    before = optimizer.zero_grad
    optimizer.zero_grad = lambda: (module.calls.append(True), before())


def hooks_before(module, optimizer):
    optimizer.register_step_pre_hook(lambda *args: module.calls.append(True))


def hooks_after(module, optimizer):
    optimizer.register_step_post_hook(lambda *args: module.calls.append(True))


@pytest.mark.parametrize("put", [a_step, a_zero_grad, hooks_before, hooks_after])
def test_what_is_put_on_an_optimizer_in_the_middle_of_a_run_is_called(put):
    module, plain = Late(put), Module()
    fit(module)
    fit(plain)
    assert module.calls == [True] * 6
    assert torch.equal(module.net.weight, plain.net.weight)


@pytest.mark.filterwarnings("error")
def test_a_scheduler_made_in_the_middle_of_a_run_sees_the_steps():
    def put(module, optimizer):
        module.late = torch.optim.lr_scheduler.StepLR(optimizer, 1)

    class Scheduled(Late):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.current_epoch == 1:
                self.late.step()

    module = Scheduled(put)
    trainer = fit(module)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.1**6)


def bare_loop(module, optimizer, put=None):
    for index, batch in enumerate(batches() * 2):
        if put is not None and index == 6:
            put(module, getattr(optimizer, "optimizer", optimizer))
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        optimizer.step()


@pytest.mark.parametrize("put", [a_step, a_zero_grad, hooks_before, hooks_after])
def test_what_is_put_on_an_optimizer_of_fabrics_is_called(put):
    module, plain = Late(put), Module()
    optimizer = Fabric(accelerator="cpu", devices=1).setup_optimizers(module.configure_optimizers())
    bare_loop(module, optimizer, put)
    bare_loop(plain, plain.configure_optimizers())
    assert len(module.calls) == 6
    assert torch.equal(module.net.weight, plain.net.weight)


def test_fabrics_optimizers_keep_gradients_when_asked_to():
    module = Module()
    optimizer = Fabric(accelerator="cpu", devices=1).setup_optimizers(module.configure_optimizers())
    module.training_step(batches()[0], 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert module.net.weight.grad.eq(0).all()
    optimizer.zero_grad()
    assert module.net.weight.grad is None
