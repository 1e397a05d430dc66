"""``self.log`` in scripts drawn at random, and outside of runs, on Lightning and on levin."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.parity import both
from tests.parity.logged import EPOCH_HOOKS, TRAIN_HOOKS, Halves, Log, assert_same, batches, observe, run_both

# Names by hook, so that one name has one set of arguments (the other case has tests of its own).
HOOKS = [
    "training_step",
    "validation_step",
    *TRAIN_HOOKS,
    *EPOCH_HOOKS[:6],
    "on_validation_batch_start",
    "on_validation_batch_end",
]


def falling(module, batch, index):
    return torch.tensor(10.0 / (index + 1))


def _updated(module: Any, batch: Any) -> Any:
    module.m(batch[0])
    return module.m


@st.composite
def entries(draw):
    hook = draw(st.sampled_from(HOOKS))
    by_callback = hook.startswith("on_") and draw(st.booleans())
    at_epoch = hook in EPOCH_HOOKS
    on_step, on_epoch = (
        (None, None) if at_epoch else draw(st.sampled_from([(None, None), (True, True), (False, True), (True, None)]))
    )
    arguments = {
        "on_step": on_step,
        "on_epoch": on_epoch,
        "prog_bar": draw(st.booleans()),
        "logger": draw(st.sampled_from([None, True, False])),
    }
    if draw(st.booleans()):
        arguments["reduce_fx"] = draw(st.sampled_from(["mean", "sum", "min", "max"]))
    if draw(st.booleans()):
        arguments["batch_size"] = draw(st.integers(1, 5))
    value = draw(st.sampled_from([1.5, 7, falling]))
    name = f"{hook}_{'c' if by_callback else 'm'}"
    return Log(hook, name, value, arguments, by_callback)


FLAGS = st.fixed_dictionaries(
    {
        "accumulate_grad_batches": st.integers(1, 3), "log_every_n_steps": st.integers(1, 4),
        "num_sanity_val_steps": st.integers(0, 1),
    },
    optional={
        "val_check_interval": st.sampled_from([1, 2, 0.5]), "limit_train_batches": st.sampled_from([2, 0.5]),
        "limit_val_batches": st.sampled_from([0, 1]), "check_val_every_n_epoch": st.just(2), "max_steps": st.integers(1, 4),
        "fast_dev_run": st.integers(1, 2),
    },
)  # fmt: skip


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    script=st.lists(entries(), min_size=1, max_size=6, unique_by=lambda entry: entry.name),
    flags=FLAGS, num_loaders=st.integers(1, 2), reads=st.booleans(), manual=st.booleans(), with_metric=st.booleans(),
    stop_at=st.none() | st.tuples(st.integers(0, 1), st.integers(0, 3)), sizes=st.lists(st.integers(1, 3), min_size=2, max_size=5),
)  # fmt: skip
def test_any_script_logs_the_same(
    tmp_path_factory, script, flags, num_loaders, reads, manual, with_metric, stop_at, sizes
):
    if manual:
        flags = {**flags, "accumulate_grad_batches": 1}
    how: dict[str, Any] = {}
    if with_metric:
        script = [
            *script,
            Log("training_step", "metric", lambda m, batch, i: _updated(m, batch), {"on_step": True, "on_epoch": True}),
        ]
        how["metrics"] = lambda: {"m": Halves()}
    theirs, ours = run_both(
        tmp_path_factory.mktemp("any"), script, flags, num_loaders=num_loaders, reads=reads, manual=manual,
        stop_at=stop_at, sizes=sizes, **how,
    )  # fmt: skip
    assert_same(theirs, ours)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    script=st.lists(entries().filter(lambda entry: "train" not in entry.hook and "backward" not in entry.hook and "zero" not in entry.hook), min_size=1, max_size=4, unique_by=lambda entry: entry.name),
    num_loaders=st.integers(1, 3), reads=st.booleans(), fast_dev_run=st.booleans(),
)  # fmt: skip
def test_any_script_validates_the_same(tmp_path_factory, script, num_loaders, reads, fast_dev_run):
    theirs, ours = run_both(
        tmp_path_factory.mktemp("any"),
        script,
        {"fast_dev_run": fast_dev_run},
        method="validate",
        num_loaders=num_loaders,
        reads=reads,
    )
    assert_same(theirs, ours)


# Outside of runs, and without loggers ---------------------------------------------------------------------------------


def on_both(run: Any) -> tuple[Any, Any]:
    results = []
    for framework in (both.lightning(), both.levin()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = run(framework)
            except Exception as error:
                both.caught(error)
                result = type(error).__name__
        results.append((result, any("log" in str(w.message) for w in caught)))
    return results[0], results[1]


def model(framework: SimpleNamespace, at: str = "training_step", **arguments: Any) -> Any:
    class Inner(framework.LightningModule):
        def forward(self, x):
            if at == "child":
                self.log("inner", x.sum(), **arguments)
            return x

    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.inner = torch.nn.Linear(4, 2), Inner()

        def training_step(self, batch, batch_idx):
            if at == "training_step":
                self.log("a", 1.0, **arguments)
                self.log_dict({"b": 2.0, "c": torch.tensor(3.0)}, **arguments)
            return self.layer(self.inner(batch[0])).sum()

        def validation_step(self, batch, batch_idx):
            if at == "validation_step":
                self.log("a", 1.0, **arguments)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Model()


def test_without_a_trainer_a_log_warns_and_does_nothing():
    theirs, ours = on_both(lambda f: model(f).training_step([torch.ones(1, 4)], 0).item() and None)
    assert ours == theirs == (None, True)


@pytest.mark.lightning_raises("MisconfigurationException")
def test_between_runs_a_log_raises(tmp_path):
    def run(framework):
        module = model(framework)
        both.quiet(framework, tmp_path, max_epochs=1).fit(module, batches((2,)))
        module.log("late", 1.0)

    theirs, ours = on_both(run)
    assert ours[0] == theirs[0]


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("at", ["training_step", "validation_step", "child"])
def test_logs_of_children_reach_the_trainer(tmp_path, at):
    """Differs on purpose: a module inside the model logs in the same hook, where Lightning knows of no hook."""

    def run(framework):
        trainer = both.quiet(framework, tmp_path, max_epochs=1)
        trainer.fit(model(framework, at, on_epoch=True), batches((2, 1)), batches((2,)))
        return observe(trainer)

    theirs, ours = on_both(run)
    if at == "child":
        assert theirs[0] == "MisconfigurationException"
        assert set(ours[0][0]) == {"inner", "inner_step", "inner_epoch"}
    else:
        assert ours == theirs


@pytest.mark.parametrize("logger", [None, True, False])
@pytest.mark.parametrize("at", ["training_step", "validation_step"])
def test_a_run_without_loggers_warns_when_one_is_asked_for(tmp_path, at, logger):
    def run(framework):
        trainer = both.quiet(framework, tmp_path, max_epochs=1, num_sanity_val_steps=0, log_every_n_steps=1)
        trainer.fit(model(framework, at, logger=logger), batches((2, 1)), batches((2,)))
        return observe(trainer)

    results = []
    for framework in (both.lightning(), both.levin()):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values = run(framework)
        results.append((values, sum("logger=True" in str(warning.message) for warning in caught) > 0))
    assert results[1] == results[0]


@pytest.mark.parametrize("method", ["fit", "validate"])
def test_barebones_logs_nothing(tmp_path, method):
    def run(framework):
        bare = {"enable_checkpointing": None, "logger": None, "enable_progress_bar": None, "enable_model_summary": None}
        trainer = both.quiet(framework, tmp_path, barebones=True, max_epochs=1, **bare)
        module = model(framework, "training_step" if method == "fit" else "validation_step")
        result = None
        if method == "fit":
            trainer.fit(module, batches((2, 1)))
        else:
            result = trainer.validate(module, batches((2, 1)), verbose=False)
        return observe(trainer), result

    theirs, ours = on_both(run)
    assert ours == theirs


def test_a_callback_logs_by_itself_and_by_the_module(tmp_path):
    def run(framework):
        class Both(framework.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                self.log("own", 1.0, on_epoch=True)
                self.log_dict({"x": 2.0, "y": 3.0}, prog_bar=True)
                pl_module.log("through", outputs["loss"] * 0, on_epoch=True)

            def on_validation_epoch_end(self, trainer, pl_module):
                self.log("val_own", float(trainer.current_epoch))

        trainer = both.quiet(framework, tmp_path, max_epochs=2, callbacks=[Both()])
        trainer.fit(model(framework), batches((2, 1)), batches((2,)))
        return observe(trainer)

    theirs, ours = on_both(run)
    assert ours == theirs


def test_metrics_of_one_call_are_gone_at_the_next(tmp_path):
    def run(framework):
        trainer, module = both.quiet(framework, tmp_path, max_epochs=1), model(framework, on_epoch=True)
        trainer.fit(module, batches((2, 1)), batches((2,)))
        first = observe(trainer)
        trainer.validate(module, batches((2,)), verbose=False)
        second = observe(trainer)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, batches((2, 1)), batches((2,)))
        return first, second, observe(trainer)

    theirs, ours = on_both(run)
    assert ours == theirs


def test_the_arguments_of_log_are_the_same():
    import inspect

    for name in ("log", "log_dict"):
        theirs, ours = (
            inspect.signature(getattr(f.LightningModule, name)).parameters for f in (both.lightning(), both.levin())
        )
        assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]
