"""optimizer_step, backward, optimizer_zero_grad, clipping and lr_scheduler_step overridden in every way; the wrapped optimizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from levin.optimizer import LightningOptimizer
from tests.parity import trace


def clip_here(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
    self.note("clip", gradient_clip_val, gradient_clip_algorithm)
    self.clip_gradients(optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm)


def clip_other(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
    self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")


def step_plain(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.step(closure=optimizer_closure)


def step_positional(self, epoch, batch_idx, optimizer, closure):
    self.note("step", epoch, batch_idx)
    optimizer.step(closure)


def step_without_closure(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.step()


def step_nothing(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    pass


def step_closure_first(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    self.note("closure returned", optimizer_closure())
    optimizer.step()


def step_every_second(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    if batch_idx % 2 == 0:
        optimizer.step(closure=optimizer_closure)
    else:
        optimizer_closure()


def step_through_super(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    super(type(self), self).optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


def step_raw(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.optimizer.step(closure=optimizer_closure)


def step_twice(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.step(closure=optimizer_closure)
    optimizer.step(closure=optimizer_closure)


def step_warm_up(self, epoch, batch_idx, optimizer, optimizer_closure=None):
    optimizer.step(closure=optimizer_closure)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * (self.trainer.global_step + 1) / 10


def backward_plain(self, loss, *args, **kwargs):
    self.note("backward", loss, args, kwargs)
    loss.backward()


def backward_doubled(self, loss):
    (loss * 2).backward()


def backward_nothing(self, loss):
    pass


def zero_grad_to_zero(self, epoch, batch_idx, optimizer):
    self.note("zero", epoch, batch_idx)
    optimizer.zero_grad(set_to_none=False)


def zero_grad_nothing(self, epoch, batch_idx, optimizer):
    pass


def scheduler_own(self, scheduler, metric):
    self.note("scheduler", type(scheduler).__name__, metric)
    scheduler.step()


def scheduler_nothing(self, scheduler, metric):
    pass


HOOKS: dict[str, dict[str, Callable[..., Any]]] = {
    "clip_here": {"configure_gradient_clipping": clip_here},
    "clip_other": {"configure_gradient_clipping": clip_other},
    "step_plain": {"optimizer_step": step_plain},
    "step_positional": {"optimizer_step": step_positional},
    "step_without_closure": {"optimizer_step": step_without_closure},
    "step_nothing": {"optimizer_step": step_nothing},
    "step_closure_first": {"optimizer_step": step_closure_first},
    "step_every_second": {"optimizer_step": step_every_second},
    "step_through_super": {"optimizer_step": step_through_super},
    "step_raw": {"optimizer_step": step_raw},
    "step_twice": {"optimizer_step": step_twice},
    "step_warm_up": {"optimizer_step": step_warm_up},
    "backward_plain": {"backward": backward_plain},
    "backward_doubled": {"backward": backward_doubled},
    "backward_nothing": {"backward": backward_nothing},
    "zero_grad_to_zero": {"optimizer_zero_grad": zero_grad_to_zero},
    "zero_grad_nothing": {"optimizer_zero_grad": zero_grad_nothing},
    "scheduler_own": {"lr_scheduler_step": scheduler_own},
    "scheduler_nothing": {"lr_scheduler_step": scheduler_nothing},
    "all": {
        "optimizer_step": step_positional, "backward": backward_plain, "optimizer_zero_grad": zero_grad_to_zero,
        "configure_gradient_clipping": clip_here, "lr_scheduler_step": scheduler_own,
    },
}  # fmt: skip


def code(seen: trace.Trace, name: str, settings: dict[str, Any], none_at: int | None = None) -> None:
    class Base(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            seen.note("training_step", batch_idx)
            return None if batch_idx == none_at else self.layer(batch).pow(2).mean()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            rates = [group["lr"] for group in self.optimizers().param_groups]
            seen.note("end", rates, self.global_step, *self.parameters(), *(p.grad for p in self.parameters()))

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}]

    model_class = type("Model", (Base,), {**HOOKS[name], "note": staticmethod(seen.note)})
    names = [
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_exception",
    ]
    trainer = seen.trainer(max_epochs=2, callbacks=[seen.callback(names)], **settings)
    seen.attempt(trainer.fit, model_class(), trace.batches(4))
    if trainer.state.finished:  # Lightning counts a step that failed as well
        seen.note(trainer.global_step)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"accumulate_grad_batches": 2},
    {"gradient_clip_val": 0.05},
    {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
]


@pytest.mark.lightning_raises("MisconfigurationException", "RuntimeError")
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "accumulate", "clip", "clip_accumulate"])
@pytest.mark.parametrize("name", HOOKS)
def test_an_overridden_hook_is_honoured(tmp_path, name, settings):
    trace.same(functools.partial(code, name=name, settings=settings), tmp_path)


@pytest.mark.parametrize("name", ["step_plain", "step_closure_first", "backward_plain", "clip_here"])
def test_an_overridden_hook_where_a_batch_is_skipped(tmp_path, name):
    trace.same(functools.partial(code, name=name, settings={}, none_at=1), tmp_path)


@pytest.mark.lightning_raises("MisconfigurationException")
def test_the_missing_closure_call_is_explained(tmp_path):
    ours = trace.same(functools.partial(code, name="step_nothing", settings={}), tmp_path)
    assert ours.events[-1] == ("raised", "MisconfigurationException")


@pytest.mark.parametrize("kind", ["StepLR", "ReduceLROnPlateau"])
def test_a_scheduler_is_stepped_by_the_default_that_an_override_calls(tmp_path, kind):
    def stepping(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                self.log("loss", 1.0)
                return self.layer(batch).mean()

            def lr_scheduler_step(self, scheduler, metric):
                super().lr_scheduler_step(scheduler, metric)
                seen.note(metric, scheduler.last_epoch, self.optimizers().param_groups[0]["lr"])

            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
                options = {"patience": 0} if kind == "ReduceLROnPlateau" else {"step_size": 1, "gamma": 0.1}
                scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **options)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

        seen.trainer(max_epochs=3).fit(Model(), trace.batches(2))

    ours = trace.same(stepping, tmp_path)
    assert any(0.05 in event for event in ours.events)


def test_the_wrapped_optimizer_looks_like_the_one_inside(tmp_path):
    def inspecting(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.automatic_optimization = False
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                wrapped = self.optimizers()
                raw = self.optimizers(use_pl_optimizer=False)
                seen.note(isinstance(wrapped, torch.optim.Adam), isinstance(wrapped, torch.optim.Optimizer))
                seen.note(type(wrapped).__name__, wrapped.optimizer is raw, wrapped is self.optimizers())
                seen.note(wrapped.param_groups is raw.param_groups, wrapped.state is raw.state, wrapped.defaults)
                seen.note(sorted(wrapped.state_dict()), wrapped.state_dict()["param_groups"])
                wrapped.param_groups[0]["lr"] = 0.5
                seen.note(raw.param_groups[0]["lr"])
                wrapped.load_state_dict(raw.state_dict())
                seen.note(len(raw.param_groups), [group["lr"] for group in raw.param_groups])
                self.manual_backward(self.layer(batch).sum())
                wrapped.zero_grad()
                seen.note([p.grad for p in self.parameters()])
                self.manual_backward(self.layer(batch).sum())
                seen.note(wrapped.step())
                seen.note(hasattr(wrapped, "no_such_thing"))
                wrapped.zero_grad(set_to_none=False)
                seen.note([p.grad.tolist() for p in self.parameters()])

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), lr=0.1)

        seen.attempt(seen.trainer(max_epochs=1).fit, Model(), trace.batches(1))

    trace.same(inspecting, tmp_path)


def test_a_group_that_the_wrapped_optimizer_gets_is_of_the_one_inside():
    raw = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    wrapped = LightningOptimizer(raw)
    wrapped.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.3})
    assert [group["lr"] for group in raw.param_groups] == [0.1, 0.3]
    assert wrapped.param_groups is raw.param_groups


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("value", [0.5, 0, 0.0, None, 1], ids=str)
@pytest.mark.parametrize("given", [None, 0.5, 0.1, 0], ids=str)
def test_clip_gradients_against_the_settings_of_the_trainer(tmp_path, value, given):
    def clipping(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).pow(2).sum()

            def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
                seen.note(gradient_clip_val, gradient_clip_algorithm)
                seen.attempt(self.clip_gradients, optimizer, given)
                seen.note(*(p.grad for p in self.parameters()))

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        seen.attempt(seen.trainer(max_epochs=1, gradient_clip_val=value).fit, Model(), trace.batches(1))

    trace.same(clipping, tmp_path)


@pytest.mark.parametrize("clips", [False, True])
def test_lbfgs_calls_training_step_several_times(tmp_path, clips):
    def lbfgs(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(1)
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                loss = self.layer(batch).pow(2).mean()
                seen.note("training_step", batch_idx, loss)
                self.log("loss", loss, on_epoch=True)
                return loss

            def configure_optimizers(self):
                return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

        names = [
            "on_before_zero_grad",
            "on_before_backward",
            "on_after_backward",
            "on_before_optimizer_step",
            "optimizer_step",
        ]
        model = seen.module(Model, names)()
        trainer = seen.trainer(max_epochs=2, gradient_clip_val=0.1 if clips else None)
        seen.attempt(trainer.fit, model, trace.batches(2))
        seen.note(trainer.global_step, *model.parameters())

    trace.same(lbfgs, tmp_path)
