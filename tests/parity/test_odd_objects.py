"""Objects that are not quite what a framework asks for: mocks of callbacks, schedulers without torch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from argparse import Namespace
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch

from tests.parity import both, trace
from tests.parity.trainer_runs import listening


class WithState:
    """A scheduler that only its user steps."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"n": 1}


class WithoutState:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        pass


@pytest.mark.lightning_raises("TypeError")
@pytest.mark.parametrize("kind", [WithState, WithoutState])
@pytest.mark.parametrize("form", ["lists", "dict", "config"])
def test_schedulers_of_manual_optimization(tmp_path, kind, form):
    def run(framework):
        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
                self.automatic_optimization = False
                self.found = []

            def training_step(self, batch, batch_idx):
                self.found.append(type(self.lr_schedulers()).__name__)

            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                scheduler = kind(optimizer)
                if form == "lists":
                    return [optimizer], [scheduler]
                scheduler = {"scheduler": scheduler} if form == "config" else scheduler
                return {"optimizer": optimizer, "lr_scheduler": scheduler}

        model = Model()
        trainer = both.quiet(framework, tmp_path, max_epochs=1)
        try:
            trainer.fit(model, both.loader(1))
        except Exception as error:
            both.caught(error)
            return type(error).__name__
        trainer.save_checkpoint(tmp_path / f"{framework.name}.ckpt")
        both.quiet(framework, tmp_path, max_epochs=2).fit(
            Model(), both.loader(1), ckpt_path=tmp_path / f"{framework.name}.ckpt"
        )
        return model.found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(both.levin()) == run(both.lightning())


def test_a_mock_of_a_callback_is_called(tmp_path):
    seen = []
    for framework in (both.lightning(), both.levin()):
        callback = Mock(spec=framework.Callback)
        callback.state_key = "mock"
        callback.state_dict.return_value = {"a": 1}
        module, _ = both.recording_module(framework, [])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = both.quiet(framework, tmp_path, max_epochs=1, callbacks=[callback])
            trainer.fit(module, both.loader(2), both.loader(1))
            trainer.save_checkpoint(tmp_path / "mock.ckpt")
        seen.append([name for name, *_ in callback.method_calls if name != "_parse_item"])
    assert seen[1] == seen[0] and "on_train_batch_end" in seen[1] and "state_dict" in seen[1]


def noting_defaults(kind: type, names: Any, seen: trace.Trace) -> None:
    """Wrap the methods that ``kind`` inherits, as class decorators do that time or trace them."""

    def wrapper(name: str, default: Any) -> Any:
        @functools.wraps(default)
        def method(*args: Any, **kwargs: Any) -> Any:
            seen.note(kind.__name__, name)
            return default(*args, **kwargs)

        return method

    for name in names:
        setattr(kind, name, wrapper(name, getattr(kind, name)))


class Measuring:
    """What Lightning asks of a profiler, without its base class."""

    def __init__(self) -> None:
        self.measured: set[str] = set()

    @contextlib.contextmanager
    def profile(self, action_name: str) -> Iterator[None]:
        self.measured.add(action_name)
        yield

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    start = stop = setup = teardown = describe = nothing


def test_a_profiler_needs_no_base_class(tmp_path):
    measured = []
    for framework in (both.lightning(), both.levin()):
        profiler = Measuring()
        module, _ = both.recording_module(framework, [])
        both.quiet(framework, tmp_path, max_epochs=1, profiler=profiler).fit(module, both.loader(2), both.loader(1))
        measured.append(profiler.measured)
    assert any("training_step" in name for name in measured[0])
    assert any("training_step" in name for name in measured[1])


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_wrappers_of_hooks_that_are_only_inherited(tmp_path, method):
    def code(seen: trace.Trace) -> None:
        class Model(seen.framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).mean()

            def validation_step(self, batch, batch_idx):
                return self.layer(batch).mean()

            test_step = predict_step = validation_step

            def configure_optimizers(self):
                optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        class Silent(seen.framework.Callback):
            pass

        # Lightning asks what these two wrap, and calls neither.
        noting_defaults(
            Model, [name for name in both.HOOKS_OF_MODULE if name not in ("prepare_data", "configure_model")], seen
        )
        noting_defaults(Silent, both.HOOKS_OF_CALLBACK, seen)
        trainer = seen.trainer(max_epochs=2, callbacks=[Silent()])
        data = [trace.batches(2), trace.batches(1)] if method == "fit" else [trace.batches(2)]
        getattr(trainer, method)(Model(), *data)

    trace.same(code, tmp_path)


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_an_evaluation_frees_gradients(tmp_path, method):
    def code(seen: trace.Trace) -> None:
        module = both.recording_module(seen.framework, [])[0]
        module.layer(torch.ones(4)).sum().backward()
        getattr(seen.trainer(), method)(module, both.loader(1))
        seen.note(module.layer.weight.grad)

    assert trace.same(code, tmp_path).events == [(None,)]


def test_hooks_that_are_partials_count_as_overridden():
    answers = []
    for framework, name in zip(
        (both.lightning(), both.levin()), ("lightning.pytorch.utilities.model_helpers", "levin.utilities.overrides")
    ):
        is_overridden = importlib.import_module(name).is_overridden
        module = framework.LightningModule()
        module.on_fit_start = functools.partial(lambda who: None, "of the user")
        module.on_fit_end = functools.partial(module.on_fit_end)
        names = ("on_fit_start", "on_fit_end", "on_train_start", "unknown")
        answers.append([is_overridden(each, module, framework.LightningModule) for each in names])
        answers[-1] += [is_overridden(each, module) for each in ("on_fit_start", "unknown")]
        with pytest.raises(ValueError, match=r"[Ee]xpected a parent|must inherit from a class"):
            is_overridden("on_fit_start", 3)
    assert answers[1] == answers[0] == [True, False, False, False, True, False]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("told", ["told", None], ids=["own", "torch"])
def test_what_a_step_of_an_optimizer_returns(tmp_path, precision, told):
    class Telling(torch.optim.SGD):
        def step(self, closure=None):
            result = super().step(closure)
            return told or result

    def code(seen: trace.Trace) -> None:
        module = both.recording_module(seen.framework, [], manual=True)[0]
        module.configure_optimizers = lambda: Telling(module.parameters(), lr=0.1)

        def training_step(batch, batch_idx):
            seen.note(module.optimizers().step(lambda: 3.0))
            seen.note(module.optimizers().step())

        module.training_step = training_step
        seen.trainer(max_epochs=1, precision=precision).fit(module, both.loader(1))
        names = [name for name in dir(seen.framework.DataModule) if name.startswith("CHECKPOINT_")]
        seen.note([(name, getattr(seen.framework.DataModule, name)) for name in names])

    expected = [(told or result,) for result in (3.0, None)]
    assert trace.same(code, tmp_path).events[:2] == expected


def test_attributes_are_found_in_hyper_parameters_of_any_kind():
    def find(framework: Any, parsing: Any) -> list[Any]:
        found = []
        for hparams in ({"lr": 0.1}, Namespace(lr=0.1)):
            module = framework.LightningModule()
            module.save_hyperparameters(hparams)
            found += [parsing.lightning_hasattr(module, "lr"), parsing.lightning_getattr(module, "lr")]
            parsing.lightning_setattr(module, "lr", 0.2)
            found += [module.hparams["lr"], parsing.lightning_hasattr(module, "no")]
        return found

    names = ("lightning.pytorch.utilities.parsing", "levin.compat.hparams")
    theirs, ours = (find(f, importlib.import_module(n)) for f, n in zip((both.lightning(), both.levin()), names))
    assert ours == theirs == [True, 0.1, 0.2, False] * 2


def test_the_stage_that_setup_and_teardown_are_told_has_a_name_and_a_value(tmp_path):
    def code(seen: trace.Trace) -> None:
        def tell(who: str) -> Any:
            return lambda *args: seen.note(who, args[-1].name, args[-1].value, isinstance(args[-1], str))

        module = both.recording_module(seen.framework, [])[0]
        data, callback = seen.framework.DataModule(), seen.framework.Callback()
        data.train_dataloader = data.test_dataloader = lambda: both.loader(1)
        for owner in (module, data):
            owner.setup = owner.teardown = lambda stage, owner=type(owner).__name__: tell(owner)(stage)
        callback.setup = callback.teardown = lambda trainer, module, stage: tell("callback")(stage)
        trainer = seen.trainer(max_epochs=1, callbacks=[callback])
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)

    events = trace.same(code, tmp_path).events
    assert len(events) == 12 and events[0][1:] == ("FITTING", "fit", True) and events[-1][1:3] == ("TESTING", "test")


@pytest.mark.parametrize("make", [Mock, MagicMock])
@pytest.mark.parametrize("has_spec", [True, False])
def test_a_run_with_a_mock_for_a_logger_is_saved_and_gone_on_with(tmp_path, make, has_spec):
    counts = []
    for framework in (both.lightning(), both.levin()):
        logger = make(spec=framework.Logger) if has_spec else make()
        logger.save_dir, logger.log_dir, logger.name, logger.version = None, None, "name", 0
        path = str(tmp_path / f"{framework.name}.ckpt")
        with listening():
            for max_epochs in (1, 2):
                module, _ = both.recording_module(framework, [])
                trainer = both.quiet(framework, tmp_path, max_epochs=max_epochs, logger=logger, log_every_n_steps=1)
                trainer.fit(module, both.loader(), ckpt_path=path if max_epochs == 2 else None)
                trainer.save_checkpoint(path)
        counts.append(logger.log_metrics.call_count)
    assert counts[0] == counts[1]
