"""Manual optimization: several optimizers, own accumulation, closures, clipping, schedulers, counters."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.parity import both, trace


@dataclass(frozen=True)
class Plan:
    """What the training_step of one run does."""

    num_optimizers: int = 1
    toggles: str = ""
    closure: bool = False
    every: int = 1
    clips: float | None = None
    schedulers: int = 0
    form: str = "none"
    hooks: str = "none"
    raw: bool = False
    max_steps: int = -1
    sanity: int = 0


def make_module(seen: trace.Trace, plan: Plan) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.automatic_optimization = False
            self.parts = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(plan.num_optimizers))
            self.shared = torch.nn.Linear(4, 4)
            self.parts[0].bias.requires_grad = False

        def loss(self, batch):
            return sum(part(self.shared(batch)).pow(2).mean() for part in self.parts)

        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers(use_pl_optimizer=not plan.raw)
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            for optimizer in optimizers:
                if plan.toggles == "model":
                    with optimizer.toggle_model(sync_grad=batch_idx % 2 == 0):
                        self.one(optimizer, batch, batch_idx)
                elif plan.toggles == "context":
                    with self.toggled_optimizer(optimizer):
                        self.one(optimizer, batch, batch_idx)
                elif plan.toggles == "calls":
                    self.toggle_optimizer(optimizer)
                    self.one(optimizer, batch, batch_idx)
                    self.untoggle_optimizer(optimizer)
                else:
                    self.one(optimizer, batch, batch_idx)
            seen.note("flags", [p.requires_grad for p in self.parameters()])
            schedulers = self.lr_schedulers()
            for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers else []:
                scheduler.step()
            loss = self.loss(batch)
            self.log("loss", loss, on_epoch=True)
            return {"none": None, "tensor": loss, "dict": {"loss": loss, "other": 1}, "extra": {"other": 2}}[plan.form]

        def one(self, optimizer, batch, batch_idx):
            seen.note("flags inside", [p.requires_grad for p in self.parameters()])
            if plan.closure:

                def closure():
                    optimizer.zero_grad()
                    loss = self.loss(batch)
                    self.manual_backward(loss)
                    seen.note("closure", loss)
                    return loss

                seen.note("step returned", optimizer.step(closure=closure) if not plan.raw else optimizer.step(closure))
                return
            loss = self.loss(batch) / plan.every
            self.manual_backward(loss, retain_graph=batch_idx == 0)
            if (batch_idx + 1) % plan.every == 0:
                if plan.clips is not None:
                    self.clip_gradients(optimizer, gradient_clip_val=plan.clips, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            seen.note("end", outputs, self.global_step, *self.parameters())

        def validation_step(self, batch, batch_idx):
            self.log("val", self.loss(batch))

        def configure_optimizers(self):
            optimizers = [
                torch.optim.SGD([*part.parameters(), *self.shared.parameters()], lr=0.05, momentum=0.5)
                for part in self.parts
            ]
            schedulers = [
                torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) for optimizer in optimizers[: plan.schedulers]
            ]
            return optimizers, schedulers

    if plan.hooks == "all":
        seen.module(Model, [n for n in both.HOOKS_OF_MODULE if n not in ("optimizer_step",)])
    return Model()


def user_code(seen: trace.Trace, plan: Plan) -> None:
    module = make_module(seen, plan)
    trainer = seen.trainer(
        max_epochs=2, max_steps=plan.max_steps, callbacks=[seen.callback()], num_sanity_val_steps=plan.sanity,
        val_check_interval=2,
    )  # fmt: skip
    seen.attempt(trainer.fit, module, trace.batches(4, shuffle=True), trace.batches(1))
    seen.note("end", trainer.global_step, trainer.current_epoch, *module.parameters())


@st.composite
def plans(draw: Any) -> Plan:
    raw = draw(st.integers(0, 5)) == 0
    return Plan(
        num_optimizers=draw(st.integers(1, 3)),
        toggles=draw(st.sampled_from(["", "context", "calls"] if raw else ["", "model", "context", "calls"])),
        closure=draw(st.booleans()),
        every=draw(st.sampled_from([1, 2])),
        clips=draw(st.sampled_from([None, 0.05, 0, 0.0])),
        schedulers=draw(st.integers(0, 2)),
        form=draw(st.sampled_from(["none", "tensor", "dict", "extra"])),
        hooks=draw(st.sampled_from(["none", "all"])),
        raw=raw,
        max_steps=draw(st.sampled_from([-1, -1, 3, 5])),
        sanity=draw(st.integers(0, 1)),
    )


@settings(
    max_examples=40, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(plan=plans())
def test_a_generated_manual_fit_is_the_same(tmp_path: Path, plan: Plan) -> None:
    trace.same(functools.partial(user_code, plan=plan), tmp_path)


def model_with(seen: trace.Trace, training_step: Any, manual: bool = True, num_optimizers: int = 1) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.automatic_optimization = not manual
            self.layer = torch.nn.Linear(4, 1)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(num_optimizers)]

    Model.training_step = training_step
    return Model()


@pytest.mark.parametrize("num_optimizers", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_global_step_counts_every_step_of_every_optimizer(tmp_path, num_optimizers, steps):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            optimizers = self.optimizers()
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                for _ in range(steps):
                    optimizer.zero_grad()
                    self.manual_backward(self.layer(batch).mean())
                    optimizer.step()
                    seen.note(self.global_step, self.trainer.global_step)

        trainer = seen.trainer(max_epochs=2)
        trainer.fit(model_with(seen, training_step, num_optimizers=num_optimizers), trace.batches(2))
        seen.note(trainer.global_step)

    ours = trace.same(code, tmp_path)
    assert ours.events[-1] == (4 * num_optimizers * steps,)


HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_validation_start",
)


@pytest.mark.parametrize("hook", HOOKS)
def test_steps_in_hooks_update_and_are_not_counted(tmp_path, hook):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                step(self, optimizer)

        def step(self, optimizer):
            optimizer.zero_grad()
            self.manual_backward(self.layer(torch.ones(1, 4)).sum())
            optimizer.step()

        model = model_with(seen, training_step, num_optimizers=2)
        setattr(model, hook, lambda *_: torch.enable_grad()(step)(model, model.optimizers()[0]))
        trainer = seen.trainer(max_epochs=2, num_sanity_val_steps=0, profiler="simple", inference_mode=False)
        trainer.fit(model, trace.batches(3), trace.batches(3))
        seen.note(trainer.global_step, len(trainer.profiler.recorded_durations["optimizer_step"]), *model.parameters())

    ours = trace.same(code, tmp_path)
    assert ours.events[-1][:2] == (12, 12)


@pytest.mark.parametrize("profiler", [None, "simple"])
@pytest.mark.parametrize("batches", [(0, 1, 2), (0,)])
def test_steps_with_hooks_of_the_programs_own_are_not_counted(tmp_path, batches, profiler):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            generator, discriminator = self.optimizers()
            if batch_idx in batches:
                discriminator._on_before_step = lambda: self.trainer.profiler.start("optimizer_step")
                discriminator._on_after_step = lambda: self.trainer.profiler.stop("optimizer_step")
            for optimizer in (generator, discriminator):
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch).sum())
                optimizer.step()

        trainer = seen.trainer(max_epochs=2, profiler=profiler)
        model = model_with(seen, training_step, num_optimizers=2)
        trainer.fit(model, trace.batches(3))
        seen.note(trainer.global_step, *model.parameters())

    ours = trace.same(code, tmp_path)
    assert ours.events[-1][0] == 12 - 2 * len(batches)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    "settings", [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0}], ids=str
)
def test_settings_that_belong_to_automatic_optimization(tmp_path, settings):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            return None

        seen.attempt(seen.trainer(max_epochs=1, **settings).fit, model_with(seen, training_step), trace.batches(2))

    trace.same(code, tmp_path)


WRONG = {
    "closure_no_callable": lambda self, loss: self.optimizers().step(closure="no"),
    "closure_number": lambda self, loss: self.optimizers().step(3),
    "clip_string": lambda self, loss: self.clip_gradients(self.optimizers(), gradient_clip_val="1"),
    "clip_algorithm": lambda self, loss: self.clip_gradients(self.optimizers(), 0.5, "what"),
    "clip_negative": lambda self, loss: self.clip_gradients(self.optimizers(), -1.0),
    "clip_none": lambda self, loss: self.clip_gradients(self.optimizers()),
    "clip_by_value": lambda self, loss: self.clip_gradients(self.optimizers(), 0.5, "value"),
    "backward_of_number": lambda self, loss: self.manual_backward(3.0),
    "untoggle_without_toggle": lambda self, loss: self.untoggle_optimizer(self.optimizers()),
}


@pytest.mark.lightning_raises("AttributeError", "MisconfigurationException", "RuntimeError", "TypeError")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_in_manual_optimization(tmp_path, wrong):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).mean()
            seen.attempt(WRONG[wrong], self, loss)

        seen.attempt(seen.trainer(max_epochs=1).fit, model_with(seen, training_step), trace.batches(1))

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("MisconfigurationException")
def test_manual_calls_in_automatic_optimization(tmp_path):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).mean()
            seen.attempt(self.manual_backward, loss)
            return loss

        seen.attempt(seen.trainer(max_epochs=1).fit, model_with(seen, training_step, manual=False), trace.batches(1))

    ours = trace.same(code, tmp_path)
    assert ours.events[0] == ("raised", "MisconfigurationException")


def test_automatic_optimization_may_be_chosen_by_a_property(tmp_path):
    def code(seen: trace.Trace) -> None:
        def training_step(self, batch, batch_idx):
            seen.note(self.automatic_optimization)

        model = model_with(seen, training_step)
        type(model).automatic_optimization = property(lambda self: False)
        seen.attempt(seen.trainer(max_epochs=1).fit, model, trace.batches(1))

    trace.same(code, tmp_path)
