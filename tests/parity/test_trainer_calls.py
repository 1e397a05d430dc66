"""The four methods: what may be passed where, what comes back, and what a second call finds."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests.parity import both
from tests.parity.trainer_runs import listening, plain, recording_data, view_all


@pytest.fixture(params=[both.lightning, both.levin], ids=["lightning", "levin"])
def framework(request):
    return request.param()


def make(framework, calls=None, **options):
    return both.recording_module(framework, [] if calls is None else calls, **options)[0]


def attempt(function):
    """What the call returns, or its exception's kind."""
    with listening() as heard:
        try:
            result = function()
        except Exception as error:
            both.caught(error)
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            # There a MisconfigurationException is no ValueError, here it is one.
            return {"MisconfigurationException": "ValueError"}.get(kind, kind)
    return plain(result), [line for line in heard["warnings"] if "best" in line or "last" in line]


METHODS = ["fit", "validate", "test", "predict"]


def passed(framework, method, how):
    module = make(framework)
    data = recording_data(framework, [])
    loader = both.loader(2)
    return {
        "model and loader": ((module, loader), {}),
        "data module by position": ((module, data), {}),
        "data module by name": ((module,), {"datamodule": data}),
        "loader and data module": ((module, loader), {"datamodule": data}),
        "two data modules": ((module, data), {"datamodule": data}),
        "no model": ((), {} if method == "fit" else {"dataloaders": loader}),
        "no loader": ((module,), {}),
        "a loader as model": ((loader, loader), {}),
        "a plain module": ((torch.nn.Linear(1, 1), loader), {}),
        "a list of loaders": ((module, [loader, loader]), {}),
        "a list of batches": ((module, [(torch.ones(2, 4),)]), {}),
        "no iterable": ((module, 3), {}),
    }[how]


HOWS = [
    "model and loader", "data module by position", "data module by name", "loader and data module", "two data modules",
    "no model", "no loader", "a loader as model", "a plain module", "a list of batches", "no iterable",
]  # fmt: skip


@pytest.mark.lightning_raises("MisconfigurationException", "RuntimeError", "TypeError")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", HOWS)
def test_what_may_be_passed_where(tmp_path, method, how):
    outcomes = []
    for framework in (both.lightning(), both.levin()):
        trainer = both.quiet(framework, tmp_path, fast_dev_run=True)
        args, kwargs = passed(framework, method, how)
        outcomes.append(
            (attempt(lambda: getattr(trainer, method)(*args, **kwargs)), trainer.state.fn and trainer.state.fn.value)
        )
    theirs, ours = outcomes
    assert ours[0] == theirs[0]


def metrics_module(framework):
    class Metrics(framework.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            torch.nn.init.constant_(self.layer.weight, 0.5)
            torch.nn.init.constant_(self.layer.bias, 0.25)

        def step(self, batch, dataloader_idx):
            value = self.layer(batch[0]).mean()
            self.log("both", value, on_step=True, on_epoch=True)
            self.log("epoch", value)
            self.log("step", value, on_step=True, on_epoch=False)
            self.log("hidden", value, logger=False)
            self.log("bar", value, prog_bar=True)
            self.log("plain", value, add_dataloader_idx=False) if dataloader_idx == 0 else None

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.step(batch, dataloader_idx)

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            self.step(batch, dataloader_idx)

        def on_validation_epoch_end(self):
            self.log("end", 7.0)

        def on_test_epoch_end(self):
            self.log_dict({"end": 7.0, "end2": torch.tensor(8)})

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return {"sum": self.layer(batch[0]).sum(), "idx": (batch_idx, dataloader_idx)}

    return Metrics()


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("as_list", [False, True])
def test_what_comes_back(tmp_path, method, num_loaders, as_list):
    results = []
    for framework in (both.lightning(), both.levin()):
        trainer = both.quiet(framework, tmp_path)
        loaders = [both.loader(2, seed=i) for i in range(num_loaders)]
        given = loaders if num_loaders > 1 or as_list else loaders[0]
        with listening():
            result = getattr(trainer, method)(metrics_module(framework), given)
        results.append(
            (plain(result), plain(trainer.callback_metrics), plain(trainer.logged_metrics), view_all(trainer))
        )
        if method != "predict":
            assert all(type(value) is float for row in result for value in row.values())
    assert results[0] == results[1]


@pytest.mark.parametrize("limit", [0, 1, 0.5, 1.0])
@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_limits_of_an_evaluation(tmp_path, method, limit):
    results = []
    for framework in (both.lightning(), both.levin()):
        name = {"validate": "val"}.get(method, method)
        calls: list = []
        data = recording_data(framework, calls)
        trainer = both.quiet(framework, tmp_path, **{f"limit_{name}_batches": limit})
        with listening():
            module = make(framework, calls)
            result = getattr(trainer, method)(module, datamodule=data)
        results.append((plain(result), calls, view_all(trainer)))
    assert results[0][0] == results[1][0]
    assert results[0][1:] == results[1][1:]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.ones(4)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("limit", [3, 0.5, 0, 1.0])
@pytest.mark.parametrize("which", ["train", "val", "test", "predict"])
def test_limits_of_data_without_length(tmp_path, which, limit):
    class Few(IterableDataset):
        def __iter__(self):
            return iter([(torch.ones(4),)] * 4)

    outcomes = []
    for framework in (both.lightning(), both.levin()):
        calls: list = []
        module = make(framework, calls)
        trainer = both.quiet(framework, tmp_path, max_epochs=1, **{f"limit_{which}_batches": limit})
        few = DataLoader(Few())
        method = {"train": "fit", "val": "validate"}.get(which, which)
        outcome = attempt(lambda: getattr(trainer, method)(module, few))
        outcomes.append((outcome, calls, view_all(trainer)["num_training_batches"]))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("value", [None, True, False])
def test_return_predictions(tmp_path, value):
    results = []
    for framework in (both.lightning(), both.levin()):
        trainer = both.quiet(framework, tmp_path)
        with listening():
            results.append(plain(trainer.predict(metrics_module(framework), both.loader(2), return_predictions=value)))
    assert results[0] == results[1]
    assert (results[1] is None) == (value is False)


def test_predictions_of_none_warn_and_come_back(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        module = make(framework)
        module.predict_step = lambda batch, batch_idx: None
        with listening() as heard:
            results.append(both.quiet(framework, tmp_path).predict(module, both.loader(2)))
        assert sum("predict" in line and "None" in line for line in heard["warnings"]) == 1
    assert results == [[None, None]] * 2


def test_predict_takes_loaders_in_sequence_only(tmp_path):
    for framework, combined in ((both.lightning(), "lightning.pytorch.utilities"), (both.levin(), "levin.data")):
        CombinedLoader = pytest.importorskip(combined).CombinedLoader
        trainer = both.quiet(framework, tmp_path)
        with listening(), pytest.raises(ValueError, match="sequential"):
            trainer.predict(make(framework), CombinedLoader([both.loader(2), both.loader(2)], "min_size"))


def test_the_model_is_remembered_between_calls(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        trainer = both.quiet(framework, tmp_path, max_epochs=1, enable_checkpointing=True)
        module = make(framework)
        with listening() as heard:
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
            rest = [
                plain(trainer.validate(dataloaders=both.loader(2, seed=5))),
                plain(trainer.test(dataloaders=both.loader(2, seed=5))),
                plain(trainer.predict(dataloaders=both.loader(2, seed=5))),
            ]
        assert trainer.lightning_module is module
        best = [line.count("ckpt_path=None") for line in heard["warnings"] if "ckpt_path=None" in line]
        results.append((rest, view_all(trainer), best))
    assert results[0] == results[1]


def test_a_call_without_a_model_needs_a_best_checkpoint(tmp_path, framework):
    trainer = both.quiet(framework, tmp_path, max_epochs=1)
    with listening():
        trainer.fit(make(framework), both.loader(1), both.loader(1))
        with pytest.raises(ValueError, match="`ModelCheckpoint` is not configured"):
            trainer.validate(dataloaders=both.loader(1))


def test_the_data_module_of_the_call_before(tmp_path):
    # There it stays attached and is set up again, and its loaders are refused; here a call without data uses them,
    # and one with loaders of its own lets go of it.
    for framework, works in ((both.lightning(), False), (both.levin(), True)):
        calls: list = []
        trainer = both.quiet(framework, tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=1)
        module, data = make(framework), recording_data(framework, calls)
        with listening():
            trainer.fit(module, datamodule=data)
            if works:
                trainer.test(module)
                assert ("D", "test_dataloader") in calls
            else:
                with pytest.raises(Exception, match="test_dataloader"):
                    trainer.test(module)
            trainer.validate(module, both.loader(1))
        assert (trainer.datamodule is data) is not works


def test_a_second_fit_goes_on_from_the_first(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        calls: list = []
        module, callback = both.recording_module(framework, calls)
        lines = both.Lines()
        trainer = both.quiet(
            framework, tmp_path, max_epochs=2, callbacks=[callback], logger=both.recording_logger(framework, lines),
            log_every_n_steps=1,
        )  # fmt: skip
        views = []
        with listening() as heard:
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
            views.append(view_all(trainer))
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
            views.append(view_all(trainer))
            trainer.fit_loop.max_epochs = 3
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
            views.append(view_all(trainer))
            trainer.validate(module, both.loader(2, seed=5))
            trainer.should_stop = True
            trainer.fit_loop.max_epochs = 5
            trainer.fit_loop.epoch_loop.max_steps = 14
            trainer.fit(module, both.loader())
            views.append(view_all(trainer))
        results.append((calls, list(lines), views, [line for line in heard["lines"] if "stopped:" in line]))
    for theirs, ours in zip(*results):
        assert ours == theirs


@pytest.mark.parametrize("fail_at", [3, 20, 45, 70, 100])
def test_a_fit_after_a_failed_one(tmp_path, fail_at):
    results = []
    for framework in (both.lightning(), both.levin()):
        from tests.parity.trainer_runs import Watched

        fails = [True]

        def act(number, call, fails=fails):
            if fails[0] and number == fail_at:
                fails[0] = False
                raise ValueError("meant")

        calls = Watched(act)
        module, callback = both.recording_module(framework, calls)
        trainer = both.quiet(framework, tmp_path, max_epochs=2, callbacks=[callback])
        with listening(), pytest.raises(ValueError, match="meant"):
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
        with listening():
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
        results.append((list(calls), view_all(trainer)))
    assert results[1] == results[0]


def test_stages_keep_their_own_progress(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        trainer = both.quiet(framework, tmp_path, max_epochs=2)
        module = make(framework)
        with listening():
            trainer.fit(module, both.loader(), both.loader(2, seed=5))
            trainer.validate(module, both.loader(3))
            trainer.validate(module, both.loader(3))
            trainer.test(module, both.loader(1))
            trainer.predict(module, both.loader(2))
        loops = [
            trainer.fit_loop.epoch_loop,
            trainer.fit_loop.epoch_loop.val_loop,
            trainer.validate_loop,
            trainer.test_loop,
            trainer.predict_loop,
        ]
        counts = [
            (
                loop.batch_progress.total.completed,
                loop.batch_progress.current.completed,
                loop.batch_progress.total.ready,
            )
            for loop in loops
        ]
        results.append((counts, trainer.global_step, trainer.current_epoch))
    assert results[0] == results[1]


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    "missing", ["training_step", "configure_optimizers", "validation_step", "test_step", "predict_step"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_missing_hook(tmp_path, method, missing):
    outcomes = []
    for framework in (both.lightning(), both.levin()):
        names = {
            "training_step": lambda self, batch, batch_idx: self.layer(batch[0]).mean(),
            "validation_step": lambda self, batch, batch_idx: None,
            "test_step": lambda self, batch, batch_idx: None,
            "predict_step": lambda self, batch, batch_idx: 1,
            "configure_optimizers": lambda self: torch.optim.SGD(self.parameters(), 0.1),
        }
        del names[missing]

        def __init__(self, framework=framework):
            framework.LightningModule.__init__(self)
            self.layer = torch.nn.Linear(4, 1)

        module = type("Partial", (framework.LightningModule,), {**names, "__init__": __init__})()
        trainer = both.quiet(framework, tmp_path, fast_dev_run=True)
        loaders = (both.loader(1), both.loader(1)) if method == "fit" else (both.loader(1),)
        with listening() as heard:
            try:
                getattr(trainer, method)(module, *loaders)
                error = None
            except Exception as caught:
                both.caught(caught)
                error = type(caught).__name__
        outcomes.append((error, sum("Skipping val" in line for line in [*heard["warnings"], *heard["lines"]])))
    assert outcomes[0] == outcomes[1]


@pytest.mark.lightning_raises("NotImplementedError")
@pytest.mark.parametrize("old", ["training_epoch_end", "validation_epoch_end", "test_epoch_end"])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_old_are_refused(tmp_path, method, old):
    outcomes = []
    for framework in (both.lightning(), both.levin()):
        module = make(framework)
        setattr(type(module), old, lambda self, outputs: None)
        trainer = both.quiet(framework, tmp_path, fast_dev_run=True)
        outcomes.append(attempt(lambda: getattr(trainer, method)(module, both.loader(1))))
    assert outcomes[0] == outcomes[1]


def test_no_validation_data_is_said_and_training_goes_on(tmp_path, framework):
    with listening() as heard:
        both.quiet(framework, tmp_path, max_epochs=1).fit(make(framework), both.loader(1))
    assert any("validation_step" in line and "val_dataloader" in line for line in heard["warnings"])


@pytest.mark.parametrize("flags", [{"gradient_clip_val": 0.5}, {"accumulate_grad_batches": 2}])
def test_what_manual_optimization_does_not_take(tmp_path, framework, flags):
    trainer = both.quiet(framework, tmp_path, max_epochs=1, **flags)
    with listening(), pytest.raises(Exception, match="manual optimization") as caught:
        trainer.fit(make(framework, manual=True), both.loader(1), both.loader(1))
    assert type(caught.value).__name__ == "MisconfigurationException"


def test_warnings_are_errors_here():
    with pytest.raises(UserWarning):
        warnings.warn("meant", UserWarning, stacklevel=1)
