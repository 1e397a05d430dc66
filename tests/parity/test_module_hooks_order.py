"""The whole sequence of hook calls with their arguments: fit, evaluation, exceptions, data modules, resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity import both, trace
from tests.parity.trainer_runs import listening

NAMES = [name for name in both.HOOKS_OF_MODULE if name != "on_train_batch_end"]


def make_module(seen: trace.Trace, names: list[str] | None = None, **options: Any) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            if options.get("raise_in") == "training_step":
                raise KeyError("meant")
            return self.layer(batch).pow(2).mean()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            if options.get("raise_in") == "validation_step" and not self.trainer.sanity_checking:
                raise KeyError("meant")
            return {"value": self.layer(batch).mean()}

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            return self.layer(batch).mean()

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return self.layer(batch)

        def configure_callbacks(self):
            seen.note("M", "configure_callbacks")
            return []

        def configure_model(self):
            seen.note("M", "configure_model")

        def on_train_start(self):
            if options.get("raise_in") == "on_train_start":
                raise KeyError("meant")

        def setup(self, stage):
            if options.get("raise_in") == "setup":
                raise KeyError("meant")

        def teardown(self, stage):
            if options.get("raise_in") == "teardown":
                raise KeyError("meant")

        def configure_optimizers(self):
            seen.note("M", "configure_optimizers")
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for stage in ("train", "val", "test", "predict"):
        if options.get("own_loaders"):

            def loaders(self, stage=stage):
                seen.note("M", f"{stage}_dataloader")
                return trace.batches(2)

            setattr(Model, f"{stage}_dataloader", loaders)
    seen.module(Model, NAMES if names is None else names)
    return Model()


def make_data(seen: trace.Trace, hooks: tuple[str, ...] = (), num_loaders: int = 1) -> Any:
    class Data(seen.framework.DataModule):
        def prepare_data(self):
            seen.note("D", "prepare_data")

        def setup(self, stage):
            seen.note("D", "setup", stage)

        def teardown(self, stage):
            seen.note("D", "teardown", stage)

        def state_dict(self):
            seen.note("D", "state_dict")
            return {"kept": 1}

        def load_state_dict(self, state):
            seen.note("D", "load_state_dict", state)

        def on_exception(self, exception):
            seen.note("D", "on_exception", exception)

    for stage in ("train", "val", "test", "predict"):

        def loaders(self, stage=stage):
            seen.note("D", f"{stage}_dataloader")
            made = [trace.batches(2, seed) for seed in range(num_loaders if stage != "train" else 1)]
            return made[0] if len(made) == 1 else made

        setattr(Data, f"{stage}_dataloader", loaders)
    seen.watch(Data, hooks, "D")
    return Data()


@pytest.mark.parametrize("transfer", [(), ("transfer_batch_to_device",), trace.TRANSFER])
@pytest.mark.parametrize("own_loaders", [False, True])
def test_fit_with_a_data_module(tmp_path, transfer, own_loaders):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, [*NAMES], own_loaders=own_loaders)
        trainer = seen.trainer(max_epochs=2, callbacks=[seen.callback()], enable_checkpointing=True)
        seen.attempt(trainer.fit, model, datamodule=make_data(seen, tuple(transfer)))

    trace.same(code, tmp_path)


@pytest.mark.parametrize("with_module_hooks", [False, True])
def test_transfer_hooks_of_both_warn_and_the_data_modules_run(tmp_path, with_module_hooks):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, ["on_after_batch_transfer"] if with_module_hooks else [])
        seen.attempt(seen.trainer(max_epochs=1).fit, model, datamodule=make_data(seen, ("on_after_batch_transfer",)))

    theirs, ours = trace.on_both(code, tmp_path)
    assert ours.events == theirs.events
    # Lightning warns as well, but once in a process.
    assert trace.warned(ours, "on_after_batch_transfer") == with_module_hooks


@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("source", ["loaders", "module", "data"])
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_an_evaluation(tmp_path, method, source, num_loaders):
    if source == "module" and num_loaders == 2:
        num_loaders = 1

    def code(seen: trace.Trace) -> None:
        model = make_module(seen, own_loaders=source == "module")
        trainer = seen.trainer(
            callbacks=[seen.callback(), seen.callback(["setup", "on_test_batch_end", "on_predict_epoch_end"])]
        )
        given: dict[str, Any] = {}
        if source == "loaders":
            given["dataloaders"] = [trace.batches(2, seed) for seed in range(num_loaders)]
        elif source == "data":
            given["datamodule"] = make_data(seen, trace.TRANSFER, num_loaders)
        for _ in range(2):
            seen.attempt(getattr(trainer, method), model, **given)

    trace.same(code, tmp_path)


@pytest.mark.parametrize("raise_in", ["setup", "on_train_start", "training_step", "validation_step", "teardown"])
def test_an_exception_in(tmp_path, raise_in):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, raise_in=raise_in)
        trainer = seen.trainer(max_epochs=1, callbacks=[seen.callback()])
        seen.attempt(trainer.fit, model, datamodule=make_data(seen))
        seen.note(trainer.state.status.value, trainer.global_step, trainer.current_epoch)

    trace.same(code, tmp_path)


@pytest.mark.parametrize("settings", [{"max_epochs": 3}, {"max_epochs": 3, "accumulate_grad_batches": 2}], ids=str)
def test_a_resumed_fit_at_the_end_of_an_epoch(tmp_path, settings):
    def code(seen: trace.Trace) -> None:
        path = tmp_path / f"{seen.framework.name}.ckpt"
        first = seen.trainer(max_epochs=1)
        first.fit(make_module(seen), trace.batches(2), trace.batches(1))
        first.save_checkpoint(path)
        seen.note("saved")
        model = make_module(seen)
        callback = seen.callback([name for name in both.HOOKS_OF_CALLBACK if name != "on_train_batch_end"])
        trainer = seen.trainer(callbacks=[callback], **settings)
        seen.attempt(trainer.fit, model, trace.batches(2), trace.batches(1), ckpt_path=path)
        seen.note(trainer.global_step, trainer.current_epoch, *model.parameters())

    trace.same(code, tmp_path)


@pytest.mark.parametrize("at", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end",
                                "on_validation_start", "on_validation_end", "on_train_epoch_end"])  # fmt: skip
def test_should_stop_set_in(tmp_path, at):
    def code(seen: trace.Trace) -> None:
        callback = seen.callback([name for name in both.HOOKS_OF_CALLBACK if name != "state_dict"])
        original = getattr(type(callback), at)

        def stop(self, trainer, *args):
            original(self, trainer, *args)
            trainer.should_stop = True

        setattr(type(callback), at, stop)
        trainer = seen.trainer(max_epochs=3, callbacks=[callback], num_sanity_val_steps=0)
        seen.attempt(trainer.fit, make_module(seen), trace.batches(3), trace.batches(1))
        seen.note(trainer.global_step, trainer.current_epoch)

    trace.same(code, tmp_path)


@pytest.mark.parametrize("who", ["module", "callback"])
@pytest.mark.parametrize("answer", [-1, -1.0, 0, True, "-1"], ids=str)
def test_what_on_train_batch_start_may_return(tmp_path, who, answer):
    def code(seen: trace.Trace) -> None:
        def start(self, *args):
            return answer if args[-1] == 1 else None

        model = make_module(seen, ["on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"])
        callback = seen.callback(["on_train_batch_end"])
        setattr(type(model if who == "module" else callback), "on_train_batch_start", start)
        trainer = seen.trainer(max_epochs=2, callbacks=[callback])
        seen.attempt(trainer.fit, model, trace.batches(3))
        seen.note(trainer.global_step)

    trace.same(code, tmp_path)


def test_epoch_end_runs_monitoring_callbacks_after_the_module(tmp_path):
    def code(seen: trace.Trace) -> None:
        callbacks = __import__(f"{seen.framework.module.__name__}.callbacks", fromlist=["x"])

        def watched(kind: type, who: str, *args: Any, **kwargs: Any) -> Any:
            return seen.watch(type(kind.__name__, (kind,), {}), ["on_train_epoch_end", "on_validation_end"], who, 2)(
                *args, **kwargs
            )

        given = [
            watched(callbacks.EarlyStopping, "stopping", "value", check_on_train_epoch_end=True),
            watched(callbacks.ModelCheckpoint, "checkpoint", tmp_path / seen.framework.name),
            watched(callbacks.Callback, "plain"),
        ]
        model = make_module(seen, [])

        def end(self):
            seen.note("module")
            self.log("value", 1.0)

        type(model).on_train_epoch_end = end
        seen.attempt(
            seen.trainer(max_epochs=2, callbacks=given, enable_checkpointing=True).fit, model, trace.batches(2)
        )

    trace.same(code, tmp_path)


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_configure_model_and_configure_callbacks_run_in_every_call(tmp_path, method):
    def code(seen: trace.Trace) -> None:
        class Model(type(make_module(seen, []))):
            def __init__(self) -> None:
                super().__init__()
                self.late = None

            def setup(self, stage):
                seen.note("setup", stage, self.device, self.late is None)

            def configure_model(self):
                seen.note("configure_model", self.device, torch.get_default_dtype())
                if self.late is None:
                    self.late = torch.nn.Linear(4, 1)

        model, trainer = Model(), seen.trainer(max_epochs=1)
        for _ in range(2):
            getattr(trainer, method)(model, trace.batches(1))
        seen.note(sorted(model.state_dict()))

    trace.same(code, tmp_path)


@pytest.mark.parametrize("returns", ["none", "one", "list", "tuple", "same_class", "subclass"])
def test_configure_callbacks_replaces_those_of_the_same_class(tmp_path, returns):
    def code(seen: trace.Trace) -> None:
        class A(seen.framework.Callback):
            def __init__(self, label) -> None:
                self.label = label

            def on_train_start(self, trainer, pl_module):
                seen.note(type(self).__name__, self.label)

        class B(A):
            pass

        class Other(seen.framework.Callback):
            __init__, on_train_start = A.__init__, A.on_train_start

        made = {"none": None, "one": Other("model"), "list": [Other("model"), A("model")], "tuple": (Other("model"),),
                "same_class": A("model"), "subclass": B("model")}[returns]  # fmt: skip
        model = make_module(seen, [])
        type(model).configure_callbacks = lambda self: made
        trainer = seen.trainer(
            max_epochs=1, callbacks=[A("trainer"), A("second") if returns == "none" else Other("trainer")]
        )
        for _ in range(2):
            seen.attempt(trainer.fit, model, trace.batches(1))
        seen.note([type(c).__name__ for c in trainer.callbacks if isinstance(c, (A, Other))])

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("AttributeError")
def test_configure_callbacks_must_return_callbacks(tmp_path):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen, [])
        type(model).configure_callbacks = lambda self: 3
        seen.attempt(seen.trainer(max_epochs=1).fit, model, trace.batches(1))

    theirs, ours = trace.on_both(code, tmp_path)
    assert theirs.events == [("raised", "AttributeError")]
    assert ours.events == [("raised", "TypeError")]


@pytest.mark.parametrize("method", ["fit", "test"])
def test_an_error_in_configure_callbacks(tmp_path, method):
    def code(seen: trace.Trace) -> None:
        model = make_module(seen)

        def fail():
            raise OSError("meant")

        model.configure_callbacks = fail
        trainer = seen.trainer(max_epochs=1, callbacks=[seen.callback()])
        seen.attempt(getattr(trainer, method), model, datamodule=make_data(seen))
        seen.note(trainer.state.status.value, trainer.interrupted)
        del model.configure_callbacks
        seen.attempt(getattr(trainer, method), model, datamodule=make_data(seen))

    assert ("C", "on_exception", "OSError") in trace.same(code, tmp_path).events


@pytest.mark.parametrize("profiler", [None, "simple"])
@pytest.mark.parametrize("is_callback", [False, True])
def test_a_module_has_no_hooks_of_the_sanity_check_nor_of_exceptions(tmp_path, is_callback, profiler):
    """Also where it is a callback by its class, which has such hooks with other arguments."""
    results = []
    for framework in (both.lightning(), both.levin()):
        called: list[str] = []
        bases = (framework.LightningModule, framework.Callback)[: 1 + is_callback]

        class Model(*bases):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                called.append("training_step")
                if batch_idx == 2:
                    raise KeyError("meant")
                return self.layer(batch[0]).mean()

            def validation_step(self, batch, batch_idx):
                called.append("validation_step")

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        for name in ("on_sanity_check_start", "on_sanity_check_end", "on_exception"):
            if not is_callback:
                setattr(Model, name, lambda self, *args, name=name: called.append(name))
        trainer = both.quiet(framework, tmp_path, max_epochs=1, num_sanity_val_steps=1, profiler=profiler)
        with listening(), pytest.raises(KeyError, match="meant"):
            trainer.fit(Model(), both.loader(), both.loader())
        results.append(called)
    assert results[0] == results[1] == ["validation_step", *["training_step"] * 3]
