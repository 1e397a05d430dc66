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


class AlwaysOn(torch.nn.Dropout):
    """Stays in train mode, as Monte Carlo dropout does."""

    def train(self, mode=True):
        return super().train(True)


class Mirrored(torch.nn.Dropout):
    """Has its mode elsewhere."""

    @property
    def training(self):
        return self.modes[-1]

    @training.setter
    def training(self, mode):
        self.__dict__.setdefault("modes", []).append(mode)


def deaf(module: torch.nn.Module) -> torch.nn.Module:
    module.train = lambda mode=True: module  # as frozen parts of diffusion models are held
    return module


OWN_WAYS: dict[str, Any] = {
    "class": AlwaysOn, "instance": lambda: deaf(torch.nn.Dropout()), "property": Mirrored,
    "inside": lambda: torch.nn.Sequential(torch.nn.Linear(4, 4), AlwaysOn()),
}  # fmt: skip


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("way", OWN_WAYS)
def test_what_a_submodule_makes_of_train_and_eval_is_called(tmp_path, method, way):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, ("first",), {})
        model.second.inner = OWN_WAYS[way]()
        trainer = seen.trainer(max_epochs=2)
        seen.attempt(getattr(trainer, method), model, trace.batches(1), *[trace.batches(1)] * (method == "fit"))
        seen.note("after", model.modes(), getattr(model.second.inner, "modes", None))

    trace.same(code, tmp_path)


@pytest.mark.parametrize("name", ["train", "eval"])
@pytest.mark.parametrize("of", ["class", "instance"])
def test_what_the_module_itself_makes_of_train_and_eval_is_called(tmp_path, name, of):
    def code(seen: trace.Trace) -> None:
        def own(self, *args):
            seen.note(name, *args)
            getattr(seen.framework.LightningModule, name)(self, *args)
            self.first.train()
            return self

        model = make_module(seen, (), {})
        setattr(type(model) if of == "class" else model, name, own if of == "class" else own.__get__(model))
        seen.trainer(max_epochs=2).fit(model, trace.batches(1), trace.batches(1))

    trace.same(code, tmp_path)


def named_without_bias(self, *args, **kwargs):
    return (
        (name, each) for name, each in torch.nn.Module.named_parameters(self, *args, **kwargs) if "bias" not in name
    )


def zero_grad_of_second(self, set_to_none=True):
    self.second.zero_grad(set_to_none)


FREED: dict[str, tuple[str, Any]] = {
    "all": ("extra", None),
    "own": ("zero_grad", zero_grad_of_second),
    "parameters": ("parameters", lambda self, recurse=True: iter([self.second.weight])),
    "named": ("named_parameters", named_without_bias),
}


@pytest.mark.parametrize("of", ["class", "instance"])
@pytest.mark.parametrize("freed", FREED)
def test_gradients_are_freed_before_a_validation_as_the_module_says(tmp_path, freed, of):
    def code(seen: trace.Trace) -> None:
        def note(self):
            seen.note([name for name, each in torch.nn.Module.named_parameters(self) if each.grad is not None])

        def start(self, *args):
            # That of a part which no optimizer has, and which another module shares.
            self.second.extra.weight.grad = torch.ones(2, 4)

        name, method = FREED[freed]
        model = make_module(seen, (), {"on_validation_start": note, "on_train_batch_end": start})
        model.extra = model.second.extra = torch.nn.Linear(4, 2, bias=False).requires_grad_(False)
        model.second.register_parameter("none", None)
        setattr(
            type(model) if of == "class" else model,
            name,
            method if of == "class" or method is None else method.__get__(model),
        )
        trainer = seen.trainer(max_epochs=1, val_check_interval=1, num_sanity_val_steps=0)
        trainer.fit(model, trace.batches(3), trace.batches(1))

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
