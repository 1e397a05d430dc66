"""Which submodules train and which evaluate, before, during and after each loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.parity import trace


def make_module(seen: trace.Trace, frozen: tuple[str, ...], hooks: dict[str, Any]) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
            self.second = torch.nn.Linear(4, 1)
            self.second.inner = torch.nn.Dropout(0.5)
            for name in frozen:
                (self if name == "self" else self.get_submodule(name)).eval()
                if name == "self":
                    self.second.train()

        def modes(self):
            return [name for name, child in self.named_modules() if child.training]

        def forward(self, batch):
            return self.second(self.first(batch)).mean()

        def training_step(self, batch, batch_idx):
            seen.note("training", batch_idx, self.modes(), torch.is_grad_enabled())
            return self(batch)

        def validation_step(self, batch, batch_idx):
            seen.note("validation", batch_idx, self.modes(), torch.is_grad_enabled())

        def test_step(self, batch, batch_idx):
            seen.note("test", batch_idx, self.modes(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())

        def predict_step(self, batch, batch_idx):
            seen.note("predict", batch_idx, self.modes(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())

        def on_train_epoch_start(self):
            seen.note("epoch start", self.modes())

        def on_validation_start(self):
            seen.note("validation start", self.modes())

        def on_validation_end(self):
            seen.note("validation end", self.modes())

        def on_train_epoch_end(self):
            seen.note("epoch end", self.modes())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for name, hook in hooks.items():
        setattr(Model, name, hook)
    return Model()


FROZEN = [
    (),
    ("first",),
    ("first.1",),
    ("second.inner",),
    ("self",),
    ("first", "second"),
    ("first", "second", "self"),
    ("",),
]
HOOKS: dict[str, dict[str, Any]] = {
    "default": {},
    "stays_in_train": {"on_validation_model_eval": lambda self: None, "on_test_model_eval": lambda self: None,
                       "on_predict_model_eval": lambda self: None},
    "own_train": {"on_validation_model_train": lambda self: self.train(), "on_test_model_train": lambda self: self.train()},
    "train_nothing": {"on_validation_model_train": lambda self: None},
    "train_a_part": {"on_validation_model_train": lambda self: self.second.train()},
}  # fmt: skip


@pytest.mark.parametrize(
    ("frozen", "hooks"),
    [*itertools.product(FROZEN, ["default"]), *itertools.product([(), ("first",)], list(HOOKS)[1:])],
)
def test_each_submodule_gets_its_own_mode_back_in_fit(tmp_path, frozen, hooks):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, frozen, HOOKS[hooks])
        seen.trainer(max_epochs=2, val_check_interval=1).fit(model, trace.batches(2), trace.batches(1))
        seen.note("after", model.modes())

    trace.same(code, tmp_path)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    ("frozen", "hooks"), [*itertools.product(FROZEN, ["default"]), *itertools.product([("first",)], list(HOOKS)[1:])]
)
def test_each_submodule_gets_its_own_mode_back_in_evaluation(tmp_path, method, frozen, hooks):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, frozen, HOOKS[hooks])
        seen.attempt(getattr(seen.trainer(), method), model, trace.batches(1))
        seen.note("after", model.modes())

    trace.same(code, tmp_path)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
@pytest.mark.parametrize("when", ["start", "step"])
def test_modes_after_an_exception(tmp_path, method, when):
    name = {"validate": "validation"}.get(method, method)

    def code(seen: trace.Trace) -> None:
        def fail(self, *args):
            raise ValueError("meant")

        model = make_module(seen, ("first",), {f"on_{name}_start" if when == "start" else f"{name}_step": fail})
        seen.attempt(getattr(seen.trainer(), method), model, trace.batches(1))

    trace.same(code, tmp_path)


def test_modules_in_eval_mode_at_the_start_are_hinted_at(tmp_path):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, ("first",), {})
        seen.trainer(max_epochs=1).fit(model, trace.batches(1))
        seen.note(model.modes())

    theirs, ours = trace.on_both(code, tmp_path)
    assert ours.events == theirs.events
    assert trace.warned(theirs, "eval mode")
    assert trace.warned(ours, "eval mode")
