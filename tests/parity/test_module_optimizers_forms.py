"""Everything that `configure_optimizers` may return, and what is wrong with the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from tests.parity import trace


class Duck:
    """Behaves like an optimizer without being one."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.SGD(params, lr=0.1)
        self.param_groups, self.defaults, self.state = self.inner.param_groups, self.inner.defaults, self.inner.state

    def step(self, closure=None):
        return self.inner.step(closure)

    def zero_grad(self, set_to_none=True):
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


class OwnScheduler:
    """A scheduler that torch knows nothing of."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, metric=None):
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Stateless:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self):
        pass


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1)


def with_scheduler(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def form(params: Any) -> Any:
        optimizer = sgd(params)
        return {"optimizer": optimizer, "lr_scheduler": make(optimizer)}

    return form


def pair(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def form(params: Any) -> Any:
        optimizer = sgd(params)
        return make(optimizer)

    return form


def steps(optimizer: Any, **keys: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 1, gamma=0.9), **keys}


def plateau(optimizer: Any, **keys: Any) -> dict[str, Any]:
    return {"scheduler": ReduceLROnPlateau(optimizer, patience=0), **keys}


FORMS: dict[str, Callable[[Any], Any]] = {
    "optimizer": sgd,
    "list": lambda p: [sgd(p)],
    "tuple": lambda p: (sgd(p),),
    "two": lambda p: [sgd(p), sgd(p)],
    "tuple_of_two": lambda p: (sgd(p), sgd(p)),
    "none": lambda p: None,
    "duck": Duck,
    "empty_list": lambda p: [],
    "empty_dict": lambda p: {},
    "number": lambda p: 3,
    "string": lambda p: "sgd",
    "class": lambda p: torch.optim.SGD,
    "parameters": lambda p: p,
    "lists": pair(lambda o: ([o], [StepLR(o, 1)])),
    "list_of_lists": pair(lambda o: [[o], [StepLR(o, 1)]]),
    "lists_of_dicts": pair(lambda o: ([o], [steps(o, interval="step")])),
    "lists_without_schedulers": pair(lambda o: ([o], [])),
    "optimizer_and_scheduler": pair(lambda o: (o, StepLR(o, 1))),
    "optimizer_and_list": pair(lambda o: (o, [StepLR(o, 1)])),
    "list_and_scheduler": pair(lambda o: ([o], StepLR(o, 1))),
    "two_schedulers": pair(lambda o: ([o], [StepLR(o, 1), steps(o, interval="step")])),
    "dict": lambda p: {"optimizer": sgd(p)},
    "dict_with_scheduler": with_scheduler(lambda o: ExponentialLR(o, 0.9)),
    "dict_with_dict": with_scheduler(lambda o: steps(o, interval="step", frequency=2, name="mine")),
    "dict_with_none": with_scheduler(lambda o: None),
    "dict_with_list": with_scheduler(lambda o: [StepLR(o, 1)]),
    "dict_with_extra_key": lambda p: {"optimizer": sgd(p), "extra": 1},
    "dict_without_optimizer": lambda p: {"lr_scheduler": None},
    "dict_with_class": lambda p: {"optimizer": torch.optim.SGD},
    "list_of_dict": lambda p: [{"optimizer": sgd(p)}],
    "list_of_dict_with_scheduler": lambda p: [with_scheduler(steps)(p)],
    "list_of_two_dicts": lambda p: [with_scheduler(steps)(p), {"optimizer": sgd(p)}],
    "tuple_of_dict": lambda p: ({"optimizer": sgd(p)},),
    "list_mixed": lambda p: [{"optimizer": sgd(p)}, sgd(p)],
    "frequency_beside": lambda p: {"optimizer": sgd(p), "frequency": 2},
    "scheduler_dict_without_scheduler": with_scheduler(lambda o: {"interval": "step"}),
    "scheduler_dict_with_none": with_scheduler(lambda o: {"scheduler": None}),
    "unknown_scheduler_key": with_scheduler(lambda o: steps(o, foo=1)),
    "interval_wrong": with_scheduler(lambda o: steps(o, interval="batch")),
    "interval_none": with_scheduler(lambda o: steps(o, interval=None)),
    "frequency_zero": with_scheduler(lambda o: steps(o, frequency=0)),
    "frequency_two": with_scheduler(lambda o: steps(o, frequency=2)),
    "plateau_without_monitor": with_scheduler(lambda o: ReduceLROnPlateau(o)),
    "plateau_monitor_beside": lambda p: {**with_scheduler(lambda o: ReduceLROnPlateau(o, patience=0))(p), "monitor": "train_loss"},
    "plateau_monitor_in_dict": with_scheduler(lambda o: plateau(o, monitor="train_loss")),
    "plateau_dict_monitor_beside": lambda p: {**with_scheduler(plateau)(p), "monitor": "train_loss"},
    "plateau_dict_both_monitors": lambda p: {**with_scheduler(lambda o: plateau(o, monitor="train_loss"))(p), "monitor": "no"},
    "plateau_missing_monitor": with_scheduler(lambda o: plateau(o, monitor="nothing")),
    "plateau_missing_not_strict": with_scheduler(lambda o: plateau(o, monitor="nothing", strict=False)),
    "plateau_in_list": pair(lambda o: ([o], [plateau(o, monitor="train_loss", interval="step")])),
    "plateau_list_without_monitor": pair(lambda o: ([o], [ReduceLROnPlateau(o)])),
    "monitor_with_plain_scheduler": lambda p: {**with_scheduler(steps)(p), "monitor": "train_loss"},
    "reduce_on_plateau_true": with_scheduler(lambda o: {"scheduler": OwnScheduler(o), "reduce_on_plateau": True, "monitor": "train_loss"}),
    "reduce_on_plateau_false": with_scheduler(lambda o: plateau(o, monitor="train_loss", reduce_on_plateau=False)),
    "own_scheduler": with_scheduler(OwnScheduler),
    "stateless_scheduler": with_scheduler(Stateless),
    "scheduler_class": with_scheduler(lambda o: StepLR),
    "lambda_scheduler": with_scheduler(lambda o: LambdaLR(o, lambda n: 0.5**n)),
    "one_cycle_epoch": with_scheduler(lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20)),
    "one_cycle_step": with_scheduler(lambda o: {"scheduler": OneCycleLR(o, max_lr=0.1, total_steps=20), "interval": "step"}),
    "foreign_optimizer": lambda p: {"optimizer": sgd(p), "lr_scheduler": StepLR(sgd(p), 1)},
    "dict_monitor_none": lambda p: {**with_scheduler(lambda o: ReduceLROnPlateau(o))(p), "monitor": None},
}  # fmt: skip


def code(seen: trace.Trace, form: str, manual: bool, steps_itself: bool = False) -> None:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)
            self.automatic_optimization = not manual

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch).pow(2).mean()
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            if manual:
                optimizers = self.optimizers()
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.zero_grad()
                self.manual_backward(loss)
                for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                    optimizer.step()
                return None
            return loss

        def on_train_start(self):
            for config in self.trainer.lr_scheduler_configs:
                seen.note("config", *(getattr(config, key) for key in ("interval", "frequency", "monitor", "name")))
                seen.note(type(config.scheduler).__name__, config.strict, config.reduce_on_plateau)
            seen.note([type(o).__name__.strip("_") for o in self.trainer.optimizers])
            optimizers, schedulers = self.optimizers(), self.lr_schedulers()
            seen.note(type(optimizers).__name__.replace("_", ""), type(schedulers).__name__)
            if form != "duck":  # of which Lightning returns a list
                seen.note(type(self.optimizers(use_pl_optimizer=False)).__name__.strip("_"))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            rates = [[group["lr"] for group in o.param_groups] for o in self.trainer.optimizers]
            seen.note(batch_idx, rates, self.layer.weight, self.global_step)

        def on_train_epoch_start(self):
            seen.note("epoch", [[group["lr"] for group in o.param_groups] for o in self.trainer.optimizers])

        def configure_optimizers(self):
            return FORMS[form](list(self.parameters()))

    if steps_itself:
        Model.lr_scheduler_step = lambda self, scheduler, metric: scheduler.step(metric)
    seen.attempt(seen.trainer(max_epochs=3).fit, Model(), trace.batches(2))


# Here Lightning fails on the way, by an AttributeError, KeyError, IndexError or TypeError that does not tell the cause.
NOT_EXPLAINED = {
    "empty_dict", "dict_without_optimizer", "dict_with_class", "dict_with_list", "scheduler_dict_with_none",
    "scheduler_dict_without_scheduler", "scheduler_class",
}  # fmt: skip


# Each of these has a test of its own below.
STATED = {"empty_list", "dict_with_none", "unknown_scheduler_key", "frequency_zero", "plateau_dict_monitor_beside"}


@pytest.mark.lightning_raises("MisconfigurationException", "RuntimeError", "TypeError")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("form", sorted(set(FORMS) - NOT_EXPLAINED - STATED))
def test_configure_optimizers_returns(tmp_path, form, manual):
    trace.same(lambda seen: code(seen, form, manual), tmp_path)


@pytest.mark.lightning_raises("AttributeError", "KeyError", "MisconfigurationException", "TypeError")
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("form", sorted(NOT_EXPLAINED))
def test_a_wrong_form_is_an_error_that_says_what_is_expected(tmp_path, form, manual):
    theirs, ours = trace.on_both(lambda seen: code(seen, form, manual), tmp_path)
    assert theirs.events[0][0] == "raised"
    assert ours.events in ([("raised", "MisconfigurationException")], [("raised", "TypeError")])


@pytest.mark.lightning_raises("IndexError")
def test_no_optimizers_are_right_in_manual_optimization_alone(tmp_path):
    trace.same(lambda seen: code(seen, "empty_list", True), tmp_path)
    theirs, ours = trace.on_both(lambda seen: code(seen, "empty_list", False), tmp_path)
    # Lightning notices at the first batch, by an IndexError.
    assert theirs.events[-1] == ("raised", "IndexError")
    assert ours.events == [("raised", "MisconfigurationException")]


@pytest.mark.lightning_raises("AttributeError")
def test_lr_scheduler_none_is_no_scheduler(tmp_path):
    theirs, ours = trace.on_both(lambda seen: code(seen, "dict_with_none", False), tmp_path)
    assert theirs.events == [("raised", "AttributeError")]
    assert ours.events[-1] == ("returned", None)


@pytest.mark.lightning_raises("ZeroDivisionError")
def test_a_frequency_below_one_is_an_error_before_the_run(tmp_path):
    theirs, ours = trace.on_both(lambda seen: code(seen, "frequency_zero", False), tmp_path)
    assert theirs.events[-1] == ("raised", "ZeroDivisionError")  # at the end of the first epoch
    assert ours.events == [("raised", "MisconfigurationException")]


@pytest.mark.lightning_raises("MisconfigurationException")
def test_a_monitor_beside_the_scheduler_dict_counts_for_it(tmp_path):
    theirs, ours = trace.on_both(lambda seen: code(seen, "plateau_dict_monitor_beside", False), tmp_path)
    assert theirs.events == [("raised", "MisconfigurationException")]  # wants it inside the scheduler dict
    assert ours.events[0] == ("config", "epoch", 1, "train_loss", None)
    assert ours.events[-1] == ("returned", None)


@pytest.mark.lightning_raises("TypeError")
def test_an_unknown_scheduler_key_is_warned_about_and_dropped(tmp_path):
    ours = trace.same(lambda seen: code(seen, "unknown_scheduler_key", False), tmp_path)
    assert trace.warned(ours, "foo", "ignored")
    theirs, ours = trace.on_both(lambda seen: code(seen, "unknown_scheduler_key", True), tmp_path)
    assert theirs.events == [("raised", "TypeError")]  # in manual optimization Lightning passes it on
    assert trace.warned(ours, "foo", "ignored")


@pytest.mark.parametrize("form", ["own_scheduler", "reduce_on_plateau_true"])
def test_a_scheduler_of_ones_own_is_stepped_by_the_override(tmp_path, form):
    trace.same(lambda seen: code(seen, form, False, steps_itself=True), tmp_path)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("none", ["without", "optimizer"]),
        ("dict_with_extra_key", ["extra", "ignored"]),
        ("plateau_missing_not_strict", ["nothing", "not logged"]),
    ],
)
def test_a_questionable_form_is_warned_about(tmp_path, form, words):
    theirs, ours = trace.on_both(lambda seen: code(seen, form, False), tmp_path)
    assert trace.warned(ours, *words)
    category = UserWarning if form == "none" else RuntimeWarning
    for run in (theirs, ours):
        assert any(issubclass(warning.category, category) for warning in run.warnings), run.framework.name


def test_one_cycle_stepped_by_epochs_is_warned_about(tmp_path):
    ours = trace.same(lambda seen: code(seen, "one_cycle_epoch", False), tmp_path)
    assert trace.warned(ours, "OneCycleLR", "interval")
