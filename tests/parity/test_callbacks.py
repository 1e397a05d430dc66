"""The everyday callbacks on Lightning and on levin: file names, states, reasons to stop, logged rates."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import levin.callbacks as levin_callbacks
from tests.parity import both

nan = math.nan


def callbacks_of(framework: SimpleNamespace) -> Any:
    if framework.name == "lightning":
        import lightning.pytorch.callbacks as module
    else:
        import levin.callbacks as module
    return module


def model(framework: SimpleNamespace, values: tuple[float, ...], fail_at: Any = None, configure: Any = None) -> Any:
    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)
            self.second = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            if fail_at == (self.current_epoch, batch_idx):
                raise RuntimeError("meant")
            self.log("a/b", 0.25 * (self.current_epoch + 1), on_step=False, on_epoch=True)
            return (self.layer(batch[0]) + self.second(batch[0])).pow(2).mean()

        def validation_step(self, batch, batch_idx):
            self.log("val", values[min(self.current_epoch, len(values) - 1)])

        def configure_optimizers(self):
            return configure(self) if configure else torch.optim.SGD(self.parameters(), lr=0.01)

    return Model()


def loader(num_batches: int = 4) -> DataLoader:
    data = torch.randn(num_batches, 4, generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(data))


def listing(folder) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) + (f" -> {os.readlink(path)}" if path.is_symlink() else "")
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    )


def relative(value: Any, folder) -> Any:
    """A state with paths below ``folder`` shortened and tensors as numbers."""
    if isinstance(value, torch.Tensor):
        return round(float(value), 5)
    if isinstance(value, str):
        return value.replace(str(folder), "")
    if isinstance(value, dict):
        return {relative(key, folder): relative(item, folder) for key, item in value.items()}
    return value


def fit_both(tmp_path, run) -> list[Any]:
    """The results of ``run(framework, folder)`` on both, with warnings off."""
    results = []
    for framework in (both.lightning(), both.levin()):
        folder = tmp_path / framework.name
        folder.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(run(framework, folder))
    return results


# ModelCheckpoint ------------------------------------------------------------------------------------------------------

VALUES = (3.0, 1.0, 2.0, nan, 0.5)
CHECKPOINTS: list[dict[str, Any]] = [
    {},
    {"save_top_k": -1},
    {"save_top_k": 0},
    {"save_top_k": 0, "save_last": True},
    {"save_last": True},
    {"save_last": "link"},
    {"monitor": "val"},
    {"monitor": "val", "save_top_k": 2, "mode": "max"},
    {"monitor": "val", "save_top_k": 2, "save_last": True},
    {"monitor": "val", "save_top_k": 2, "save_last": "link"},
    {"monitor": "val", "save_top_k": -1, "filename": "{epoch:02d}-{val:.2f}"},
    {"monitor": "val", "save_top_k": -1, "filename": "{epoch:02d}-{val:.2f}", "auto_insert_metric_name": False},
    {"monitor": "val", "save_top_k": 2, "filename": "fixed"},
    {"monitor": "val", "save_top_k": -1, "filename": "fixed"},
    {"monitor": "val", "save_top_k": 2, "filename": "fixed", "enable_version_counter": False},
    {"filename": "fixed", "save_top_k": -1},
    {"filename": "x{epoch}_{missing:.1f}_{a/b:.2f}"},
    {"every_n_train_steps": 3, "save_top_k": -1, "save_last": True},
    {"every_n_train_steps": 3},
    {"every_n_train_steps": 4, "save_top_k": -1},
    {"every_n_train_steps": 100, "save_last": True},
    {"every_n_train_steps": 2, "monitor": "val", "save_top_k": -1, "save_on_train_epoch_end": False},
    {"every_n_epochs": 3, "save_top_k": -1},
    {"every_n_epochs": 2, "save_top_k": -1, "save_on_train_epoch_end": False, "save_last": True},
    {"every_n_epochs": 0},
    {"train_time_interval": timedelta(0), "save_top_k": -1},
    {"train_time_interval": timedelta(hours=1), "save_last": True},
    {"save_weights_only": True, "save_last": True},
    {"save_on_exception": True, "save_last": True},
]
FLAGS: list[dict[str, Any]] = [
    {},
    {"val_check_interval": 2},
    {"check_val_every_n_epoch": 2},
    {"accumulate_grad_batches": 3},
    {"max_steps": 7, "max_epochs": -1},
    {"num_sanity_val_steps": 2},
    {"limit_val_batches": 0},
]


def checkpoint(arguments, flags, fail_at=None, found=(), resume=None):
    def run(framework, folder):
        kind = callbacks_of(framework).ModelCheckpoint
        files = folder / "files"
        files.mkdir()
        for name in found:
            (files / name).write_text("")
        settings = {"max_epochs": 5, "num_sanity_val_steps": 0, "enable_checkpointing": True, **flags}
        callback = kind(files, **arguments)
        error = None

        def fit(callback, ckpt_path=None, **more):
            trainer = both.quiet(framework, folder, callbacks=[callback], **{**settings, **more})
            trainer.fit(model(framework, VALUES, fail_at), loader(), loader(2), ckpt_path=ckpt_path)

        try:
            if resume is not None:
                fit(kind(files, **arguments), max_epochs=2)
                fit(callback, ckpt_path=files / resume)
            else:
                fit(callback)
        except RuntimeError as caught:
            both.caught(caught)
            error = str(caught)
        return {
            "files": listing(files),
            "key": callback.state_key,
            "state": relative(callback.state_dict(), folder),
            "error": error,
        }

    return run


@pytest.mark.parametrize("arguments", CHECKPOINTS, ids=str)
def test_the_same_files_are_kept(tmp_path, arguments):
    theirs, ours = fit_both(tmp_path, checkpoint(arguments, {}))
    assert ours == theirs


@pytest.mark.parametrize("flags", FLAGS[1:], ids=str)
@pytest.mark.parametrize(
    "arguments",
    [{"save_top_k": -1}, {"save_last": True}, {"every_n_train_steps": 2, "save_top_k": -1, "save_last": "link"}],
    ids=str,
)
def test_the_same_files_are_kept_with_other_flags(tmp_path, arguments, flags):
    theirs, ours = fit_both(tmp_path, checkpoint(arguments, flags))
    assert ours == theirs


@pytest.mark.parametrize("fail_at", [(0, 0), (1, 0), (1, 2)])
@pytest.mark.parametrize(
    "arguments",
    [
        {"save_on_exception": True},
        {"save_on_exception": True, "save_last": True, "monitor": "val"},
        {"save_on_exception": True, "save_last": "link"},
        {"save_last": True},
    ],
    ids=str,
)
def test_the_same_files_are_left_after_a_failure(tmp_path, arguments, fail_at):
    theirs, ours = fit_both(tmp_path, checkpoint(arguments, {}, fail_at))
    assert ours == theirs


@pytest.mark.parametrize(
    "arguments",
    [{"save_last": True}, {"save_last": "link"}, {"monitor": "val", "save_top_k": 2, "save_last": True}, {"filename": "c", "save_last": True}],
    ids=str,
)  # fmt: skip
def test_the_same_files_are_kept_after_a_resume(tmp_path, arguments):
    theirs, ours = fit_both(tmp_path, checkpoint(arguments, {}, resume="last.ckpt"))
    theirs["state"].pop("current_score"), ours["state"].pop("current_score")
    assert ours == theirs


@pytest.mark.parametrize(
    "found", [("epoch=4-step=20.ckpt", "last.ckpt"), ("epoch=4-step=20.ckpt", "epoch=4-step=20-v1.ckpt")]
)
def test_the_same_versions_are_given(tmp_path, found):
    theirs, ours = fit_both(tmp_path, checkpoint({"save_last": True}, {}, found=found))
    assert ours == theirs


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    monitor=st.sampled_from([None, "val", "a/b"]),
    save_top_k=st.integers(-1, 3),
    mode=st.sampled_from(["min", "max"]),
    save_last=st.sampled_from([None, True, "link"]),
    trigger=st.sampled_from([{}, {"every_n_train_steps": 3}, {"every_n_epochs": 2}]),
    values=st.lists(st.sampled_from([0.0, 1.0, 2.0, nan, math.inf]), min_size=3, max_size=3),
)
def test_any_combination_keeps_the_same_files(tmp_path_factory, monitor, save_top_k, mode, save_last, trigger, values):
    if monitor is None:
        save_top_k = min(save_top_k, 1)
    if "every_n_train_steps" in trigger and monitor is not None:
        monitor = None
        save_top_k = min(save_top_k, 1)
    arguments = {"monitor": monitor, "save_top_k": save_top_k, "mode": mode, "save_last": save_last, **trigger}

    def run(framework, folder):
        callback = callbacks_of(framework).ModelCheckpoint(folder / "files", **arguments)
        trainer = both.quiet(
            framework, folder, callbacks=[callback], max_epochs=3, num_sanity_val_steps=0, enable_checkpointing=True
        )
        trainer.fit(model(framework, tuple(values)), loader(), loader(1))
        return listing(folder / "files"), relative(callback.state_dict(), folder)

    theirs, ours = fit_both(tmp_path_factory.mktemp("any"), run)
    assert ours == theirs, arguments


METRICS = {"epoch": torch.tensor(3), "step": torch.tensor(7), "val": torch.tensor(0.123), "a/b": torch.tensor(1.5)}


@pytest.mark.parametrize("auto_insert", [True, False])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"filename": "{epoch:03d}"},
        {"filename": "{val:.3f}-{a/b}"},
        {"filename": "{val}", "ver": 3},
        {"prefix": "p"},
        {"filename": "{missing}", "ver": 0},
        {"filename": "{epoch}-{epoch:02d}-{val_x}"},
        {"filename": "", "prefix": "q", "ver": 2},
    ],
    ids=str,
)
def test_names_are_the_same(arguments, auto_insert):
    theirs, ours = (
        callbacks_of(framework)
        .ModelCheckpoint("/d", auto_insert_metric_name=auto_insert)
        .format_checkpoint_name(METRICS, **arguments)
        for framework in (both.lightning(), both.levin())
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        ({"save_top_k": 0, "every_n_epochs": 2}, {}),
        ({"save_top_k": 0, "save_on_train_epoch_end": False}, {"max_steps": 6}),
        ({"save_top_k": 0, "every_n_train_steps": 5}, {}),
        ({"every_n_epochs": 2}, {}),
        ({"every_n_train_steps": 5}, {}),
    ],
    ids=str,
)
def test_last_is_of_the_same_step(tmp_path, arguments, flags):
    def run(framework, folder):
        callback = callbacks_of(framework).ModelCheckpoint(folder, save_last=True, **arguments)
        flags_of_run = {"max_epochs": 3, "num_sanity_val_steps": 0, "enable_checkpointing": True, **flags}
        trainer = both.quiet(framework, folder, callbacks=[callback], **flags_of_run)
        trainer.fit(model(framework, VALUES), loader(), loader(2))
        last = torch.load(folder / "last.ckpt", weights_only=False)
        return last["global_step"], callback.check_monitor_top_k(trainer)

    theirs, ours = fit_both(tmp_path, run)
    assert ours == theirs


# EarlyStopping --------------------------------------------------------------------------------------------------------


def stopping(arguments, values, flags):
    def run(framework, folder):
        callback = callbacks_of(framework).EarlyStopping(**{"monitor": "val", **arguments})
        trainer = both.quiet(framework, folder, callbacks=[callback], **{"max_epochs": 8, **flags})
        error = None
        try:
            trainer.fit(model(framework, values), loader(2), loader(2))
        except RuntimeError as caught:
            both.caught(caught)
            error = str(caught)
        state = relative(callback.state_dict(), folder)
        if callback.stopping_reason.name == "DIVERGENCE_THRESHOLD":
            state.pop("stopping_reason_message")  # theirs names the wrong sign
        return (
            trainer.current_epoch,
            trainer.global_step,
            state,
            callback.state_key,
            callback.stopping_reason.name,
            error,
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "values", "flags"),
    [
        ({}, VALUES, {}),
        ({"check_finite": False}, VALUES, {}),
        ({"min_delta": 0.5}, (5.0, 4.6, 4.3, 4.0), {}),
        ({"min_delta": 0.5, "mode": "max"}, (1.0, 1.4, 1.5, 1.6, 2.2, 2.3), {}),
        ({"patience": 0}, (1.0, 2.0), {}),
        ({"stopping_threshold": 1.5}, (3.0, 1.5, 1.4), {}),
        ({"divergence_threshold": 5.0}, (3.0, 5.0, 5.1), {}),
        ({"mode": "max", "divergence_threshold": 5.0}, (7.0, 5.0, 4.9), {}),
        ({"monitor": "typo", "strict": False}, VALUES, {}),
        ({"monitor": "a/b"}, VALUES, {}),
        ({}, (1.0,), {"val_check_interval": 1}),
        ({}, (1.0,), {"check_val_every_n_epoch": 2}),
        ({"check_on_train_epoch_end": False}, (1.0,), {}),
        ({"patience": 1}, (1.0, 2.0, 3.0, 0.0, 1.0, -1.0), {"min_epochs": 6}),
        ({}, (1.0,), {"fast_dev_run": 2}),
        ({}, (1.0,), {"num_sanity_val_steps": 2}),
    ],
    ids=str,
)
def test_training_stops_at_the_same_point_for_the_same_reason(tmp_path, arguments, values, flags):
    theirs, ours = fit_both(tmp_path, stopping(arguments, values, flags))
    assert ours == theirs


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 3),
    min_delta=st.sampled_from([0.0, 0.5]),
    check_finite=st.booleans(),
    stopping_threshold=st.sampled_from([None, 0.0, 2.0]),
    divergence_threshold=st.sampled_from([None, 1.0, 3.0]),
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, 3.5, nan, math.inf, -math.inf]), min_size=1, max_size=6),
)
def test_any_run_stops_for_the_same_reason(tmp_path_factory, values, **arguments):
    theirs, ours = fit_both(tmp_path_factory.mktemp("any"), stopping(arguments, tuple(values), {"max_epochs": 6}))
    assert ours == theirs


# LearningRateMonitor --------------------------------------------------------------------------------------------------


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def with_scheduler(**schedule):
    def configure(module):
        optimizer = sgd(module)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), **schedule}]

    return configure


def groups(*names):
    def configure(module):
        parts = (module.layer, module.second)
        return torch.optim.SGD(
            [{"params": part.parameters(), **({"name": name} if name else {})} for part, name in zip(parts, names)],
            lr=0.1,
        )

    return configure


@pytest.mark.parametrize("flags", [{}, {"log_every_n_steps": 2, "accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize(
    ("arguments", "configure"),
    [
        ({}, sgd),
        ({"logging_interval": "step", "log_momentum": True, "log_weight_decay": True}, sgd),
        ({"logging_interval": "epoch"}, with_scheduler(interval="step")),
        ({}, with_scheduler(interval="step")),
        ({}, with_scheduler(interval="epoch", name="rate")),
        ({}, groups(None, None)),
        ({}, groups("a", "b")),
        ({}, groups("a", None)),
        ({"log_momentum": True}, lambda module: torch.optim.Adam(module.parameters(), lr=0.1)),
    ],
)
def test_the_same_rates_are_logged(tmp_path, arguments, configure, flags):
    def run(framework, folder):
        lines = both.Lines()
        callback = callbacks_of(framework).LearningRateMonitor(**arguments)
        trainer = both.quiet(
            framework,
            folder,
            callbacks=[callback],
            logger=both.recording_logger(framework, lines),
            **{"max_epochs": 2, "log_every_n_steps": 1, "limit_val_batches": 0, **flags},
        )
        trainer.fit(model(framework, (1.0,), configure=configure), loader())
        rates = [line for line in lines if isinstance(line[1], dict) and "a/b" not in line[1]]
        metrics = {name: round(float(value), 5) for name, value in trainer.callback_metrics.items()}
        return rates, callback.lrs, callback.last_momentum_values, callback.last_weight_decay_values, metrics

    theirs, ours = fit_both(tmp_path, run)
    assert ours == theirs


# Classes of one's own -------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "EarlyStopping": ("val",),
    "GradientAccumulationScheduler": ({0: 1},),
    "ModelCheckpoint": (),
    "OnExceptionCheckpoint": ("folder",),
    "SpikeDetection": (),
    "ThroughputMonitor": (len,),
    "Timer": (),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_class_that_comes_after_the_callback_is_initialized_too(name):
    import lightning.pytorch.callbacks.spike as spike

    for module in (spike if name == "SpikeDetection" else callbacks_of(both.lightning()), callbacks_of(both.levin())):

        class After:
            def __init__(self):
                self.is_ready = True

        class Both(getattr(module, name), After):
            pass

        assert Both(*ARGUMENTS[name]).is_ready


def defaults(kind: type, name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(kind, name)).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


@pytest.mark.parametrize("name", sorted({name for name in levin_callbacks.__all__ if name[0].isupper()}))
def test_defaults_are_the_same(name):
    import lightning.pytorch.callbacks.spike as spike
    import lightning.pytorch.serve as serve

    ours, theirs = getattr(levin_callbacks, name), callbacks_of(both.lightning())
    theirs = getattr(theirs, name, getattr(spike, name, getattr(serve, name, None)))
    if theirs is None:
        pytest.skip(f"Lightning has no {name} among its callbacks")
    for method in sorted(vars(theirs).keys() & set(dir(ours))):
        if method != "__init__" and (method.startswith("_") or not callable(getattr(theirs, method))):
            continue
        mine, other = defaults(ours, method), defaults(theirs, method)
        shared = [key for key in mine if key in other and key not in ("theme", "lambda_func")]
        assert [(method, key, mine[key]) for key in shared] == [(method, key, other[key]) for key in shared]


# ProgressBar ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"check_val_every_n_epoch": 3},
        {"limit_val_batches": 0},
        {"num_sanity_val_steps": 1},
        {"val_check_interval": 2},
    ],
    ids=str,
)
def test_bars_of_ones_own_know_the_same(tmp_path, flags):
    def run(framework, folder):
        seen = []

        class Bar(callbacks_of(framework).ProgressBar):
            def disable(self):
                pass

            def look(self, name, dataloader_idx=None):
                if dataloader_idx is not None:
                    seen.append(self.has_dataloader_changed(dataloader_idx))
                elif name.endswith("start"):
                    self.reset_dataloader_idx_tracker()
                kind = name.split("_")[1]
                seen.append((name, self.total_train_batches if kind == "train" else None))
                if kind in ("train", "validation"):
                    seen.append(self.total_val_batches)
                if dataloader_idx is not None:
                    kind = kind.replace("validation", "val")
                    seen.append(getattr(self, f"total_{kind}_batches_current_dataloader"))

            def on_train_epoch_start(self, trainer, pl_module):
                self.look("on_train_epoch_start")

            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                metrics = self.get_metrics(trainer, pl_module)
                seen.append({name: round(float(value), 5) for name, value in metrics.items()})

            def on_validation_start(self, trainer, pl_module):
                self.look("on_validation_start")

            def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
                self.look("on_validation_batch_start", dataloader_idx)

            def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
                self.look("on_test_batch_start", dataloader_idx)

            def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
                self.look("on_predict_batch_start", dataloader_idx)

        class Net(type(model(framework, (1.0,)))):
            def training_step(self, batch, batch_idx):
                self.log("shown", float(batch_idx), prog_bar=True)
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                pass

            test_step = validation_step

            def predict_step(self, batch, batch_idx, dataloader_idx=0):
                return batch[0]

        bar, module = Bar(), Net()
        with pytest.raises(TypeError, match="has not been set"):
            _ = bar.trainer
        logger = both.recording_logger(framework, both.Lines())
        settings = {"max_epochs": 4, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **flags}
        trainer = both.quiet(framework, folder, callbacks=[bar], logger=logger, enable_progress_bar=True, **settings)
        trainer.fit(module, loader(), [loader(2), loader(3)])
        if not flags:
            trainer.validate(module, [loader(3), loader(1)], verbose=False)
            trainer.test(module, [loader(1), loader(2)], verbose=False)
            trainer.predict(module, [loader(2), loader(1)])
        labels = [value for name, value in sorted(vars(Bar.__mro__[1]).items()) if name.endswith("_description")]
        return seen, [getattr(label, "fget", lambda bar, label=label: label)(bar) for label in labels]

    theirs, ours = fit_both(tmp_path, run)
    assert ours == theirs
