"""Each argument of the Trainer with values that cannot be meant: what is said, and which exception says it."""

from __future__ import annotations

import inspect
import logging
import math
from datetime import timedelta
from itertools import product

import numpy as np
import pytest
import torch

from levin import Fabric, Trainer
from levin.callbacks import BatchSizeFinder, ModelCheckpoint, ModelSummary, SpikeDetection, Timer, TQDMProgressBar
from levin.loggers import CSVLogger
from levin.settings import COUNTS, LIMITS, num_from_limit
from levin.utilities.exceptions import MisconfigurationException

QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def quiet(**kwargs):
    return Trainer(**{**QUIET, **kwargs})


WRONG = {
    "accelerator": ["abacus", 3],
    "strategy": ["teamwork"],
    "devices": [0, "0", [], -3, 1.5],
    "num_nodes": [0, -1, "2", 1.5],
    "precision": ["8-bit", 12],
    "logger": ["tensorboard", 3, [3]],
    "callbacks": [3, [3], "early"],
    "fast_dev_run": [-1, 1.5, None, "yes"],
    "max_epochs": [-2, 1.5, "3", True],
    "min_epochs": [-1, 1.5, "3"],
    "max_steps": [-2, None, 1.5, "3", True],
    "min_steps": [-1, 1.5, "3"],
    "max_time": ["1:2:3", "tomorrow", {"hourz": 1}],
    "limit_train_batches": [-1, 1.5, -0.1, "all", True],
    "limit_val_batches": [-1, 1.1],
    "limit_test_batches": [-1, 1.1],
    "limit_predict_batches": [-1, 1.1],
    "overfit_batches": [-1, 1.5, "all"],
    "val_check_interval": [0, -1, 1.5, 0.0, -0.5, True, "often", {"hourz": 1}, [1]],
    "check_val_every_n_epoch": [0, -1, 1.5, "2", True],
    "num_sanity_val_steps": [-2, 1.5, "2"],
    "log_every_n_steps": [-1, 1.5, "2"],
    "enable_checkpointing": ["yes"],
    "enable_progress_bar": ["yes"],
    "enable_model_summary": ["yes"],
    "accumulate_grad_batches": [0, -1, 1.5, "2", {0: 2}, None],
    "gradient_clip_algorithm": ["shear", 1, ""],
    "deterministic": ["x", 2],
    "benchmark": ["x"],
    "inference_mode": ["x"],
    "use_distributed_sampler": ["x"],
    "profiler": ["stopwatch", 3],
    "detect_anomaly": ["x"],
    "compile": ["fast", 3, {"backends": "x"}],
    "plugins": ["x", 3],
    "sync_batchnorm": ["x"],
    "reload_dataloaders_every_n_epochs": [-1, 1.5, "2", None],
    "enable_autolog_hparams": ["x"],
    "suggest_integrations": ["x"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_with_its_name_and_the_value(name, value):
    with pytest.raises((MisconfigurationException, TypeError, ValueError)) as caught:
        quiet(**{name: value})
    text = str(caught.value)
    shown = value[0] if name == "callbacks" and isinstance(value, list) else value
    assert name in text or name.removesuffix("s") in text or "duration" in text
    assert "received" in text
    assert str(shown) in text or repr(shown) in text or (name == "logger" and "3" in text)


@pytest.mark.parametrize("value", ["1", True, [1], {}])
def test_gradient_clip_val_of_another_type_is_a_type_error(value):
    with pytest.raises(TypeError, match="gradient_clip_val must be an int or a float, received"):
        quiet(gradient_clip_val=value)


def test_every_argument_is_checked_here_or_takes_anything():
    takes_anything = {
        "gradient_clip_val", "barebones", "default_root_dir", "model_registry",  # tested below or beside
    }  # fmt: skip
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} == set(WRONG) | takes_anything


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *((BatchSizeFinder, "margin", value) for value in (-0.1, 1.0, math.nan)),
        *((SpikeDetection, "window", value) for value in (0, None, 1.5)),
    ],
)
def test_arguments_of_callbacks_that_cannot_be_meant_are_refused(make, name, value):
    with pytest.raises(MisconfigurationException, match=f"{name} must be .*received {value}"):
        make(**{name: value})


def test_arguments_by_position_are_refused():
    with pytest.raises(TypeError, match="keyword arguments only, received 1 by position. Write Trainer"):
        Trainer("cpu")


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="max_epoch"):
        quiet(max_epoch=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_checkpointing", True), ("logger", True), ("enable_progress_bar", True), ("log_every_n_steps", 1),
        ("enable_model_summary", True), ("num_sanity_val_steps", 1), ("fast_dev_run", True), ("detect_anomaly", True),
        ("profiler", "simple"),
    ],
)  # fmt: skip
def test_barebones_refuses_what_it_switches_off(name, value):
    with pytest.raises(ValueError, match=rf"barebones=True.*received {name}={value!r}. Leave them out"):
        Trainer(accelerator="cpu", devices=1, barebones=True, **{name: value})


def test_barebones_says_what_is_off(caplog):
    trainer = Trainer(accelerator="cpu", devices=1, barebones=True)
    assert "self.log" in caplog.text
    assert trainer.callbacks == [] and trainer.loggers == []
    assert (trainer.log_every_n_steps, trainer.num_sanity_val_steps) == (0, 0)


def test_a_checkpoint_callback_contradicts_enable_checkpointing_false():
    with pytest.raises(MisconfigurationException, match="enable_checkpointing=False.*Leave out one"):
        quiet(callbacks=ModelCheckpoint())


def test_a_bar_contradicts_enable_progress_bar_false_and_a_second_bar():
    with pytest.raises(MisconfigurationException, match="enable_progress_bar=False.*TQDMProgressBar"):
        quiet(callbacks=TQDMProgressBar())
    with pytest.raises(MisconfigurationException, match="one progress bar"):
        quiet(callbacks=[TQDMProgressBar(), TQDMProgressBar()], enable_progress_bar=True)


def test_a_fraction_of_a_loader_must_leave_a_batch():
    assert num_from_limit(0.25, 4, "limit_val_batches") == 1
    assert num_from_limit(0.25, 0, "limit_val_batches") == 0
    with pytest.raises(
        ValueError, match=r"limit_val_batches must leave at least one of 4 batches, received 0.2\. Use at least 0.25"
    ):
        num_from_limit(0.2, 4, "limit_val_batches")


def test_a_fraction_needs_epochs_to_be_a_fraction_of():
    with pytest.raises(
        MisconfigurationException, match=r"must be an int with check_val_every_n_epoch=None, received 0\.5"
    ):
        quiet(val_check_interval=0.5, check_val_every_n_epoch=None)


def test_a_precision_is_given_once():
    from levin.precision import DoublePrecision

    with pytest.raises(ValueError, match="precision"):
        quiet(precision="32-true", plugins=DoublePrecision())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *product([*LIMITS, "val_check_interval", "accumulate_grad_batches"], [math.nan, -math.inf, math.inf]),
        *product(["max_steps", "max_epochs"], [math.nan, -math.inf]),
    ],
)
def test_what_is_no_number_of_anything_is_refused(name, value):
    with pytest.raises(MisconfigurationException, match=f"{name} .*received {value}"):
        quiet(**{name: value})


def test_infinity_means_without_limit():
    trainer = quiet(max_epochs=math.inf, max_steps=math.inf, num_sanity_val_steps=math.inf, log_every_n_steps=math.inf)
    assert (trainer.max_epochs, trainer.max_steps) == (-1, -1)
    assert (trainer.num_sanity_val_steps, trainer.log_every_n_steps) == (math.inf, 0)


@pytest.mark.parametrize("number", [np.int64(1), np.array(1), torch.tensor(1)], ids=["numpy", "array", "tensor"])
@pytest.mark.parametrize(
    "name", [*COUNTS, *LIMITS, "devices", "val_check_interval", "gradient_clip_val", "fast_dev_run"]
)
def test_numbers_of_other_libraries_are_numbers(name, number):
    trainer = quiet(**{name: number})
    if hasattr(trainer, name):
        assert type(getattr(trainer, name)) in (int, bool) and getattr(trainer, name) == 1


def test_fractions_and_switches_of_other_libraries_are_taken():
    trainer = quiet(limit_train_batches=np.float32(0.5), detect_anomaly=np.bool_(True), max_time=np.timedelta64(3, "s"))
    assert trainer.limit_train_batches == 0.5
    assert Fabric(accelerator="cpu", devices=np.int64(1), num_nodes=torch.tensor(1)).world_size == 1
    assert TQDMProgressBar(refresh_rate=np.int64(5)).refresh_rate == 5
    assert ModelSummary(max_depth=np.int64(2))._max_depth == 2


def test_whole_floats_stand_for_ints():
    trainer = quiet(max_steps=1e3, limit_train_batches=2.0, val_check_interval=3.0)
    assert (trainer.max_steps, trainer.limit_train_batches, trainer.val_check_interval) == (1000, 2, 3)
    assert all(type(v) is int for v in (trainer.max_steps, trainer.limit_train_batches, trainer.val_check_interval))
    trainer = quiet(**{name: 2.0 for name in COUNTS if name != "num_nodes"})
    assert (trainer.max_epochs, trainer.accumulate_grad_batches, trainer.log_every_n_steps) == (2, 2, 2)


@pytest.mark.parametrize(
    "value", ["00:00:00:03", {"seconds": 3}, timedelta(seconds=3)], ids=["text", "dict", "timedelta"]
)
def test_durations_have_three_forms(value):
    trainer = quiet(max_time=value, val_check_interval=value)
    timer = next(callback for callback in trainer.callbacks if isinstance(callback, Timer))
    assert timer.time_remaining() == 3.0
    assert trainer.val_check_interval_seconds == 3.0
    assert trainer.val_check_interval == 1.0


def test_a_timer_of_the_user_wins_over_max_time(caplog):
    timer = Timer("00:00:00:07")
    trainer = quiet(max_time="00:00:00:03", callbacks=timer)
    assert [callback for callback in trainer.callbacks if isinstance(callback, Timer)] == [timer]
    assert "Ignoring `Trainer(max_time=...)`" in caplog.text


@pytest.mark.parametrize(("value", "what"), [(1, "1 batch"), (1.0, "100% of the batches")])
def test_one_and_one_point_zero_say_what_they_mean(value, what, caplog):
    quiet(limit_val_batches=value)
    assert f"`Trainer(limit_val_batches={value!r})` was configured so {what} will be used." in caplog.text


def test_fast_dev_run_says_so(caplog):
    quiet(fast_dev_run=3)
    assert "Running in `fast_dev_run` mode: will run the requested loop using 3 batch(es)." in caplog.text


def test_deterministic_and_benchmark_reach_torch(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    import os

    quiet(deterministic="warn")
    assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.backends.cudnn.benchmark is False
    quiet(deterministic=True, benchmark=True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled() and torch.backends.cudnn.benchmark is True
    quiet()
    assert torch.are_deterministic_algorithms_enabled()
    quiet(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ValueError, match="abacus"):
        quiet(deterministic=True, accelerator="abacus")
    assert not torch.are_deterministic_algorithms_enabled()  # a Trainer that was refused leaves no trace


def test_environment_gives_defaults(monkeypatch, tmp_path):
    for name, text in {
        "MAX_EPOCHS": "7", "LIMIT_TRAIN_BATCHES": "0.5", "ACCELERATOR": "cpu", "VAL_CHECK_INTERVAL": "00:00:01:00",
        "FAST_DEV_RUN": "", "DEFAULT_ROOT_DIR": str(tmp_path), "LOGGER": "False", "DEVICES": "1", "MAX_STEPS": "5",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PL_TRAINER_{name}", text)
    trainer = Trainer(max_steps=9)
    assert (trainer.max_epochs, trainer.limit_train_batches, trainer.max_steps) == (7, 0.5, 9)
    assert trainer.val_check_interval_seconds == 60.0
    assert trainer.fast_dev_run is False
    assert (trainer.default_root_dir, trainer.loggers) == (str(tmp_path), [])


def test_a_wrong_value_from_the_environment_is_refused_too(monkeypatch):
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "many")
    with pytest.raises(MisconfigurationException, match="max_epochs must be an int >= -1, received 'many'"):
        quiet()


def test_a_subclass_reads_variables_of_its_own_name(monkeypatch):
    class Coach(Trainer):
        pass

    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_COACH_MAX_EPOCHS", "8")
    assert Coach(**QUIET).max_epochs == 8


def test_home_is_expanded_in_local_folders_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert quiet(default_root_dir="~/runs").default_root_dir == str(tmp_path / "runs")
    assert quiet(default_root_dir="memory://~/runs").default_root_dir == "memory://~/runs"


def test_fast_dev_run_silences_given_loggers(tmp_path):
    trainer = quiet(logger=CSVLogger(tmp_path), fast_dev_run=True)
    assert [type(logger).__name__ for logger in trainer.loggers] == ["DummyLogger"]
    assert quiet(fast_dev_run=True).loggers == []


def test_a_gpu_that_is_there_is_named_in_a_line(caplog):
    quiet()
    assert "GPU available:" in caplog.text and "TPU available:" in caplog.text


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, "levin")
    logger = logging.getLogger("levin")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
