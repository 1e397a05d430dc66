"""What a module knows of where it is: trainer, device, dtype, counters, children; freeze, print, example inputs."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import levin
from levin.demos.boring_classes import BoringModel
from levin.utilities.exceptions import MisconfigurationException
from tests.parity import trace


def make_module(seen: trace.Trace, **methods: Any) -> Any:
    class Child(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)
            self.child = Child()
            self.child.grandchild = Child()
            self.plain = torch.nn.Sequential(Child())

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for name, method in methods.items():
        setattr(Model, name, method)
    return Model()


ATTRIBUTES = (
    "current_epoch", "global_step", "global_rank", "local_rank", "on_gpu", "logger", "loggers", "device", "dtype", "training",
    "automatic_optimization", "strict_loading", "example_input_array", "trainer", "fabric", "prepare_data_per_node",
    "allow_zero_length_dataloader_with_multiple_devices", "device_mesh", "hparams", "_no_such_attribute",
)  # fmt: skip


@pytest.mark.lightning_raises("RuntimeError", "AttributeError")
def test_attributes_before_a_run(tmp_path):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen)
        for name in ATTRIBUTES:
            seen.note(name)
            seen.attempt(getattr, model, name)
        for name, value in {"automatic_optimization": False, "strict_loading": False, "example_input_array": 3, "dtype": torch.float16,
                            "device": "cpu", "trainer": None, "fabric": None, "current_epoch": 3, "global_step": 1}.items():  # fmt: skip
            seen.note("set", name)
            seen.attempt(setattr, model, name, value)

    trace.same(code, tmp_path)


def test_attributes_during_and_after_a_run(tmp_path):
    def code(seen: trace.Trace) -> None:
        def look(self, where):
            names = (
                "current_epoch",
                "global_step",
                "global_rank",
                "local_rank",
                "device",
                "dtype",
                "logger",
                "loggers",
            )
            seen.note(where, *(getattr(self, name) for name in names))

        model = make_module(
            seen, setup=lambda self, stage: look(self, "setup"), on_train_epoch_end=lambda self: look(self, "epoch end"),
            on_fit_end=lambda self: look(self, "fit end"), teardown=lambda self, stage: look(self, "teardown"),
        )  # fmt: skip
        seen.trainer(max_epochs=2).fit(model, trace.batches(2))
        look(model, "after")

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("RuntimeError")
def test_children_share_the_trainer(tmp_path):
    def code(seen: trace.Trace) -> None:
        def start(self):
            for child in (self.child, self.child.grandchild, self.plain[0]):
                seen.attempt(lambda: child.trainer is self.trainer)

        model = make_module(seen, on_train_start=start)
        seen.attempt(seen.trainer(max_epochs=1).fit, model, trace.batches(2))

    ours = trace.same(code, tmp_path)
    assert ours.events == [("returned", True), ("returned", True), ("raised", "RuntimeError"), ("returned", None)]


@pytest.mark.lightning_raises("MisconfigurationException")
def test_children_may_log(tmp_path):
    def code(seen: trace.Trace) -> None:
        def step(self, batch, batch_idx):
            self.child.log("from_child", 2.0)
            return self.layer(batch).mean()

        trainer = seen.trainer(max_epochs=1)
        seen.attempt(trainer.fit, make_module(seen, training_step=step), trace.batches(2))
        seen.note(trainer.callback_metrics)

    theirs, ours = trace.on_both(code, tmp_path)
    assert theirs.events[0] == ("raised", "MisconfigurationException")  # the child does not know in which hook it is
    assert ours.events[1] == ({"from_child": trace.plain(torch.tensor(2.0))},)


def test_a_child_made_in_on_fit_start_logs_into_the_loop_that_runs(tmp_path):
    class Child(levin.LightningModule):
        pass

    class Model(BoringModel):
        def on_fit_start(self):
            self.child = Child()

        def training_step(self, batch, batch_idx):
            self.child.log("train", self.current_epoch + batch_idx, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.child.log("val", 10 * self.current_epoch + batch_idx)

    trainer = levin.Trainer(
        default_root_dir=tmp_path, max_epochs=2, limit_train_batches=3, limit_val_batches=2, num_sanity_val_steps=0,
        val_check_interval=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    model = Model()
    trainer.fit(model)
    # Of all three steps, though a validation ran after each.
    assert {name: value.item() for name, value in trainer.callback_metrics.items()} == {"train": 2.0, "val": 10.5}
    for module in (model, model.child):
        module.trainer = trainer
        with pytest.raises(MisconfigurationException, match="while no loop that logs is running"):
            module.log("late", 1.0)


def test_freeze_and_unfreeze(tmp_path):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen)
        model.child.layer.weight.requires_grad = False
        for method in ("freeze", "unfreeze"):
            returned = getattr(model, method)()
            seen.note(
                method,
                returned is None,
                [p.requires_grad for p in model.parameters()],
                [m.training for m in model.modules()],
            )

    theirs, ours = trace.on_both(code, tmp_path)
    # Lightning returns nothing; a module in return allows `Model().freeze()` in an expression.
    assert [event[2:] for event in ours.events] == [event[2:] for event in theirs.events]


@pytest.mark.parametrize("data", ["tensor", "number", "dict", "list", "string", "mixed"])
def test_all_gather_without_a_process_group(tmp_path, data):
    x = torch.arange(3.0, requires_grad=True)
    value = {
        "tensor": x,
        "number": 2.5,
        "dict": {"a": x, "b": 3.0},
        "list": [x, (x,)],
        "string": "s",
        "mixed": [x, "s", None],
    }[data]

    def code(seen: trace.Trace) -> None:
        def step(self, batch, batch_idx):
            seen.attempt(self.all_gather, value)
            seen.attempt(self.all_gather, value, sync_grads=True)
            return self.layer(batch).mean()

        seen.trainer(max_epochs=1).fit(make_module(seen, training_step=step), trace.batches(1))

    trace.same(code, tmp_path)


@pytest.mark.parametrize("bar", [False, True])
def test_print_goes_to_the_screen_once(tmp_path, capfd, bar):
    printed = {}

    def code(seen: trace.Trace) -> None:
        def start(self):
            self.print("hello", 3, sep="-")
            self.trainer.print("from the trainer")

        model = make_module(seen, on_train_start=start)
        capfd.readouterr()
        seen.trainer(max_epochs=1, enable_progress_bar=bar).fit(model, trace.batches(1))
        captured = capfd.readouterr()
        text = captured.out + captured.err
        printed[seen.framework.name] = (text.count("hello-3"), text.count("from the trainer"))

    trace.on_both(code, tmp_path)
    assert printed["levin"] == printed["lightning"] == (1, 1)


@pytest.mark.parametrize("example", ["tensor", "tuple", "list", "dict", "none"])
def test_example_input_array_in_the_summary(tmp_path, example):
    x = torch.ones(2, 4)
    value = {"tensor": x, "tuple": (x, x), "list": [x, x], "dict": {"b": x, "a": x}, "none": None}[example]

    def code(seen: trace.Trace) -> None:
        def forward(self, a, b=None):
            seen.note("forward", a, b)
            return self.layer(a)

        model = make_module(seen, forward=forward)
        model.example_input_array = value
        module = __import__(f"{seen.framework.module.__name__}.utilities.model_summary", fromlist=["x"])
        summary = module.ModelSummary(model, max_depth=1)
        seen.note([str(size) for size in summary.in_sizes], [str(size) for size in summary.out_sizes])

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("RuntimeError")
def test_pickling_forgets_the_trainer(tmp_path):
    model = None

    def code(seen: trace.Trace) -> None:
        nonlocal model
        kind = seen.framework.module.demos.boring_classes.BoringModel if False else seen.framework.LightningModule
        model = kind()
        model.layer = torch.nn.Linear(4, 1)
        model.training_step = None
        trainer = seen.trainer()
        model.trainer = trainer
        copied = pickle.loads(pickle.dumps(model))
        seen.attempt(getattr, copied, "trainer")
        seen.note(copied.state_dict())

    trace.same(code, tmp_path)


@pytest.mark.parametrize("cast", ["double", "half", "to_dtype", "to_device", "meta"])
def test_device_and_dtype_follow_the_module(tmp_path, cast):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen)
        returned = {
            "double": lambda: model.double(), "half": lambda: model.half(), "to_dtype": lambda: model.to(torch.bfloat16),
            "to_device": lambda: model.to("cpu"), "meta": lambda: model.to("meta"),
        }[cast]()  # fmt: skip
        seen.note(returned is model, model.device, model.dtype, model.layer.weight.dtype)

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    "missing",
    ["training_step", "configure_optimizers", "train_dataloader", "validation_step", "test_step", "predict_step"],
)
def test_a_missing_hook_is_named(tmp_path, missing):
    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

        methods = {
            "training_step": lambda self, batch: self.layer(batch).mean(),
            "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), lr=0.1),
            "validation_step": lambda self, batch: None,
            "test_step": lambda self, batch: None,
        }
        for name, method in methods.items():
            if name != missing:
                setattr(Model, name, method)
        fn = {"validation_step": "validate", "test_step": "test", "predict_step": "predict"}.get(missing, "fit")
        given = [] if missing == "train_dataloader" else [trace.batches(1)]
        seen.attempt(getattr(seen.trainer(max_epochs=1), fn), Model(), *given)

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("NotImplementedError")
@pytest.mark.parametrize("old", ["training_epoch_end", "validation_epoch_end", "test_epoch_end", "on_epoch_start", "on_epoch_end", "on_batch_start",
                                 "on_pretrain_routine_start", "training_step_end", "configure_sharded_model"])  # fmt: skip
def test_hooks_of_the_first_version(tmp_path, old):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, **{old: lambda self, *args: seen.note(old)})
        trainer = seen.trainer(max_epochs=1)
        seen.attempt(trainer.fit, model, trace.batches(1))

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("RuntimeError")
def test_both_ways_to_make_the_layers_late_are_an_error(tmp_path):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, configure_model=lambda self: None, configure_sharded_model=lambda self: None)
        seen.attempt(seen.trainer(max_epochs=1).fit, model, trace.batches(1))

    ours = trace.same(code, tmp_path)
    assert ours.events == [("raised", "RuntimeError")]


def test_a_pickle_without_the_fields_of_a_module_gives_those_of_a_new_one():
    new = levin.LightningModule().__getstate__()
    own = {name: value for name, value in new.items() if name.startswith("_") and name not in vars(torch.nn.Module())}
    module = levin.LightningModule.__new__(levin.LightningModule)
    module.__setstate__({name: value for name, value in new.items() if name not in own})
    assert {name: value for name, value in vars(module).items() if name in own} == own
    assert len(own) > 9
