"""torchmetrics objects in ``self.log`` on Lightning and on levin: values, names, and when they are computed and reset."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics

from tests.parity import both
from tests.parity.logged import Halves, Log, assert_same, batches, number, observe, run_both


class Sum(Halves):
    """Another metric in a collection."""

    def compute(self) -> torch.Tensor:
        return self.total


class Parts(Halves):
    """A metric that computes a dict, which no logger can take."""

    def compute(self) -> Any:
        return {"total": self.total, "count": self.count}


class Pair(Halves):
    """A metric that computes two numbers."""

    def compute(self) -> torch.Tensor:
        return torch.stack([self.total, self.count])


class Later(Halves):
    """A metric that has nothing to compute of a few numbers."""

    def compute(self) -> Any:
        return self.total if self.count > 8 else None


def made() -> dict[str, Any]:
    return {
        "m": Halves(), "other": Halves(), "parts": Parts(), "pair": Pair(), "later": Later(),
        "many": torchmetrics.MetricCollection({"h": Halves(), "s": Sum()}, prefix="pre/", postfix="-post", compute_groups=False),
        "inner": torch.nn.ModuleDict({"a": torch.nn.ModuleList([Halves()])}),
    }  # fmt: skip


def updated(name: str, forward: bool = False, every: int = 1):
    """A value function: updates the metric with the batch and returns it."""

    def value(module, batch, index):
        metric = module.get_submodule(name)
        if index % every == 0:
            (metric if forward else metric.update)(batch[0] if batch is not None else torch.ones(2))
        return metric

    return value


def run(tmp_path, script, flags=None, **how):
    how.setdefault("sizes", (2, 2, 1))
    return run_both(tmp_path, script, flags or {}, metrics=made, **how)


MOMENTS = [
    {"on_step": True},
    {"on_epoch": True},
    {"on_step": False, "on_epoch": True},
    {"on_step": True, "on_epoch": True},
]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "update"])
@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_end", "validation_step", "on_validation_batch_end"])
def test_a_metric(tmp_path, hook, moment, forward):
    assert_same(*run(tmp_path, [Log(hook, "m", updated("m", forward), moment)]))


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("forward", [True, False], ids=["forward", "update"])
@pytest.mark.parametrize("sizes", [(1,), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_a_metric_that_has_nothing_to_compute(tmp_path, hook, sizes, moment, forward):
    script = [Log(hook, "m", updated("later", forward), {**moment, "prog_bar": True}), Log(hook, "n", updated("m"))]
    assert_same(*run(tmp_path, script, sizes=sizes))


@pytest.mark.parametrize(
    "flags", [{"accumulate_grad_batches": 2}, {"log_every_n_steps": 2}, {"val_check_interval": 1}], ids=str
)
def test_a_metric_with_other_flags(tmp_path, flags):
    script = [
        Log("training_step", "m", updated("m", True), {"on_step": True, "on_epoch": True, "prog_bar": True}),
        Log("validation_step", "v", updated("other"), {"prog_bar": True}),
    ]
    assert_same(*run(tmp_path, script, flags, sizes=(2, 2, 1, 3)))


@pytest.mark.parametrize(
    "hook", ["on_train_epoch_end", "on_validation_epoch_end", "on_train_start", "on_validation_epoch_start"]
)
def test_a_metric_at_an_epoch_hook(tmp_path, hook):
    def keep(module, batch, index):
        module.m.update(batch[0])
        return 0.0

    step = "training_step" if "train" in hook else "validation_step"
    script = [Log(step, "x", keep), Log(hook, "m", lambda module, batch, index: module.m)]
    if hook.endswith("start"):
        script.append(Log(hook, "n", updated("other")))
    # A metric that is read before its first batch keeps the NaN in Lightning, so nothing is read here.
    assert_same(*run(tmp_path, script, reads=False))


def test_one_metric_under_two_names(tmp_path):
    script = [
        Log("training_step", "a", updated("m"), {"on_epoch": True}),
        Log("training_step", "b", lambda module, batch, index: module.m, {"on_epoch": True}),
        Log("training_step", "now", lambda module, batch, index: module.m.compute(), {"on_epoch": True}),
    ]
    assert_same(*run(tmp_path, script))


def test_one_metric_in_training_and_validation(tmp_path):
    script = [Log("training_step", "t", updated("m"), {"on_epoch": True}), Log("validation_step", "v", updated("m"))]
    assert_same(*run(tmp_path, script))


def test_a_metric_that_is_not_updated_with_every_batch(tmp_path):
    assert_same(*run(tmp_path, [Log("training_step", "m", updated("m", True, every=2), {"on_epoch": True})]))


@pytest.mark.parametrize("num_loaders", [2, 3])
@pytest.mark.parametrize("moment", MOMENTS[1:3], ids=str)
def test_a_metric_over_several_loaders(tmp_path, num_loaders, moment):
    script = [Log("validation_step", "m", updated("m"), moment)]
    assert_same(*run(tmp_path, script, num_loaders=num_loaders))
    assert_same(*run(tmp_path, script, num_loaders=num_loaders, method="validate"))


@pytest.mark.parametrize("moment", MOMENTS[:3], ids=str)
@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_a_collection(tmp_path, hook, moment):
    assert_same(*run(tmp_path, [Log(hook, "<dict>", updated("many"), moment)]))


def test_the_values_of_a_collection(tmp_path):
    script = [Log("training_step", "<dict>", lambda module, batch, index: module.many(batch[0]), {"on_epoch": True})]
    assert_same(*run(tmp_path, script))


@pytest.mark.parametrize("name", ["inner.a.0", "m"])
@pytest.mark.parametrize("attribute", [None, "inner.a.0", "m", "missing", "layer"])
def test_where_a_metric_is(tmp_path, name, attribute):
    arguments = {"on_epoch": True, "metric_attribute": attribute}
    assert_same(*run(tmp_path, [Log("training_step", "m", updated(name), arguments)]))


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("attribute", [None, "m", "free", "missing"])
@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_a_metric_that_is_no_module_of_the_model(tmp_path, hook, attribute):
    free = [Halves()]  # in a list, so that the module does not take it in

    def value(module, batch, index):
        free[0].update(batch[0])
        return free[0]

    theirs, ours = run(
        tmp_path, [Log(hook, "m", value, {"metric_attribute": attribute})], {"max_epochs": 1, "num_sanity_val_steps": 0}
    )
    assert theirs["error"] == ours["error"]
    assert (ours["error"] == "MisconfigurationException") == (attribute is None)


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("name", ["parts", "pair"])
@pytest.mark.parametrize("moment", MOMENTS[1:3], ids=str)
def test_a_metric_that_does_not_compute_one_number(tmp_path, name, moment):
    theirs, ours = run(tmp_path, [Log("validation_step", name, updated(name), moment)], reads=False)
    assert ours["error"] == theirs["error"]
    assert ours["error"] is not None


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("hook", ["training_step", "validation_step"])
def test_a_collection_is_no_value(tmp_path, hook):
    assert_same(*run(tmp_path, [Log(hook, "many", updated("many"))]))


def fit_and_look(framework: SimpleNamespace, folder, steps: dict[str, Any]) -> list[Any]:
    """The states of two metrics at every hook of a fit."""
    seen: list[Any] = []

    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)
            self.logged, self.kept = Halves(), Halves()

        def training_step(self, batch, batch_idx):
            self.logged.update(batch[0])
            self.kept.update(batch[0])
            self.log("logged", self.logged, on_step=steps["on_step"], on_epoch=steps["on_epoch"])
            return self.layer(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    class Look(framework.Callback):
        pass

    def add(name: str) -> None:
        def hook(self, trainer, pl_module, *args, **kwargs):
            seen.append((name, number(pl_module.logged.count), number(pl_module.kept.count), observe(trainer)[0]))

        setattr(Look, name, hook)

    for name in (
        "on_train_batch_start",
        "on_train_batch_end",
        "on_train_epoch_start",
        "on_train_epoch_end",
        "on_train_end",
    ):
        add(name)
    trainer = both.quiet(framework, folder, max_epochs=2, callbacks=[Look()], log_every_n_steps=1)
    trainer.fit(Model(), batches((2, 2, 1)))
    return seen


@pytest.mark.parametrize("steps", [{"on_step": True, "on_epoch": False}, {"on_step": False, "on_epoch": True}], ids=str)
def test_a_logged_metric_is_reset_and_another_is_not(tmp_path, steps):
    assert fit_and_look(both.levin(), tmp_path, steps) == fit_and_look(both.lightning(), tmp_path, steps)
