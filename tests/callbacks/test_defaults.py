"""What a Trainer adds by itself and says of it; the order stands beside Lightning's in tests/parity."""

from __future__ import annotations

import importlib.util
from unittest.mock import MagicMock

import pytest

from levin import Trainer
from levin.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    Timer,
)
from levin.loggers import CSVLogger, DummyLogger, TensorBoardLogger
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import TrainOnly, loader

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}


def kinds(run):
    return [type(callback).__name__ for callback in run.callbacks]


def test_tuners_come_first_and_those_that_save_last():
    class Own(Callback):
        pass

    class OwnFinder(BatchSizeFinder):
        pass

    run = Trainer(callbacks=[ModelCheckpoint(), Own(), OwnFinder()], logger=False, **QUIET)
    assert kinds(run) == ["OwnFinder", "Own", "ModelCheckpoint"]


def test_an_object_with_the_hooks_is_a_callback():
    run = Trainer(callbacks=[ModelCheckpoint(), MagicMock(), MagicMock()], logger=False, **QUIET)
    assert kinds(run) == ["MagicMock", "MagicMock", "ModelCheckpoint"]
    for wrong in (3, [object()]):
        with pytest.raises(MisconfigurationException, match="callbacks must be a Callback or a list of them, received"):
            Trainer(callbacks=wrong, **QUIET)


def test_the_summary_of_the_user_is_the_one(caplog):
    settings = {**QUIET, "enable_model_summary": True, "logger": False, "enable_checkpointing": False}
    with caplog.at_level("INFO", "levin"):
        assert kinds(Trainer(callbacks=ModelSummary(), **settings)) == ["ModelSummary"]
    said = "Trainer already configured with model summary callbacks. Skipping the default one."
    assert said in caplog.messages
    caplog.clear()
    with caplog.at_level("INFO", "levin"):
        assert kinds(Trainer(**settings)) == [RichModelSummary.__name__]
    assert said not in caplog.messages


class Brings(TrainOnly):
    def __init__(self, brought):
        super().__init__()
        self.brought = brought

    def configure_callbacks(self):
        return self.brought


class OwnTimer(Timer):
    pass


@pytest.mark.parametrize(
    ("given", "brought", "expected", "replaced"),
    [
        ([Timer()], None, ["Timer"], None),
        ([Timer()], [], ["Timer"], None),
        ([Timer()], LearningRateMonitor(), ["Timer", "LearningRateMonitor"], None),
        ([Timer(), ModelCheckpoint()], (Timer(),), ["Timer", "ModelCheckpoint"], "Timer"),
        ([Timer()], [OwnTimer()], ["OwnTimer"], "Timer"),
        ([OwnTimer()], [Timer()], ["OwnTimer", "Timer"], None),
        ([Timer(), EarlyStopping("train")], [EarlyStopping("train"), Timer()], ["EarlyStopping", "Timer"], "EarlyStopping, Timer"),
    ],
    ids=["None", "none", "one", "tuple", "of a base", "of a subclass", "two"],
)  # fmt: skip
def test_callbacks_of_the_module_take_the_place_of_their_kind(caplog, given, brought, expected, replaced):
    run = Trainer(
        callbacks=given, **QUIET, logger=CSVLogger("."), log_every_n_steps=1, enable_checkpointing=len(given) > 1 and len(expected) > 1
        and expected[1] == "ModelCheckpoint",
    )  # fmt: skip
    with caplog.at_level("INFO", "levin"):
        run.fit(Brings(brought), loader(2))
    assert kinds(run) == expected
    for callback in brought if isinstance(brought, (list, tuple)) else [brought] if brought else []:
        assert callback in run.callbacks
    told = [text.rpartition(": ")[2] for text in caplog.messages if "will override existing callbacks" in text]
    assert told == ([] if replaced is None else [replaced])


def test_what_is_no_callback_of_the_module_is_refused():
    with pytest.raises(
        TypeError, match="`configure_callbacks` must return a callback or a list of callbacks, received 3"
    ):
        Trainer(logger=False, enable_checkpointing=False, **QUIET).fit(Brings([3]), loader(2))


def test_two_with_one_state_key_are_refused_by_it():
    with pytest.raises(RuntimeError, match=r"type `EarlyStopping` with the state key .EarlyStopping\{.monitor.: .a."):
        Trainer(callbacks=[EarlyStopping("b"), EarlyStopping("a"), EarlyStopping("a")], logger=False, **QUIET)


@pytest.mark.parametrize("there", [("tensorboard",), ("tensorboardX",), ()])
def test_the_logger_is_the_best_that_is_installed(tmp_path, monkeypatch, caplog, there):
    find = importlib.util.find_spec
    hides = ("tensorboard", "tensorboardX")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there if name in hides else find(name))
    monkeypatch.setattr(TensorBoardLogger, "__init__", lambda self, save_dir, version: vars(self).update(at=save_dir))
    with caplog.at_level("INFO", "levin"):
        run = Trainer(default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    (logger,) = run.loggers
    if there:
        assert (type(logger), logger.at) == (TensorBoardLogger, str(tmp_path))
    else:
        assert (type(logger), logger.save_dir) == (CSVLogger, str(tmp_path))
    told = [text for text in caplog.messages if "CSV" in text]
    assert told == (
        []
        if there
        else ["Logging to CSV files, since tensorboard is not installed. Install levin[tensorboard] for its pages."]
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [(False, []), (None, None), ([], []), (CSVLogger("a"), ["CSVLogger"]), ((CSVLogger("a"), DummyLogger()), ["CSVLogger", "DummyLogger"])],
    ids=["off", "default", "none", "one", "tuple"],
)  # fmt: skip
def test_loggers_are_given_in_each_form(tmp_path, given, expected):
    run = Trainer(logger=given, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    assert len(run.loggers) == 1 if expected is None else [type(logger).__name__ for logger in run.loggers] == expected
    dry = Trainer(logger=given, fast_dev_run=True, default_root_dir=tmp_path, **QUIET)
    assert [type(logger).__name__ for logger in dry.loggers] == ([] if given in (False, []) else ["DummyLogger"])


@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        ("wand", "Did you mean WandbLogger?"), ("tensor_board", "Did you mean TensorBoardLogger?"),
        ("CSVLoger", "Did you mean CSVLogger?"), ("xyzzy", ""), (3, ""), ([CSVLogger("a"), 3], ""),
    ],
)  # fmt: skip
def test_what_is_no_logger_is_refused(given, way_out):
    with pytest.raises(
        MisconfigurationException, match="logger must be True, False, a Logger or a list of them"
    ) as error:
        Trainer(logger=given, **QUIET)
    assert str(error.value).endswith(way_out or ".")
