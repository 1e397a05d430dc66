from __future__ import annotations

import logging
import math

import pytest
import torch

from levin.callbacks import EarlyStopping
from levin.callbacks.early_stopping import EarlyStoppingReason
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import Small, TrainOnly, loader, trainer

nan = math.nan


def fit(folder, callback, module, **kwargs):
    run = trainer(folder, [callback], **{"max_epochs": 8, **kwargs})
    run.fit(module, loader(2), None if isinstance(module, TrainOnly) else loader(2))
    return run


@pytest.mark.parametrize(
    ("arguments", "values", "epochs", "reason"),
    [
        ({}, (3.0, 1.0, 2.0, 2.0, 2.0), 5, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"patience": 0}, (1.0, 1.0), 2, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"min_delta": 0.5}, (5.0, 4.6, 4.3, 4.0), 6, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"mode": "max"}, (1.0, 2.0, 1.5), 5, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({}, (3.0, nan), 2, EarlyStoppingReason.NON_FINITE_METRIC),
        ({"check_finite": False}, (3.0, nan), 4, EarlyStoppingReason.PATIENCE_EXHAUSTED),
        ({"stopping_threshold": 1.5}, (3.0, 1.5, 1.4), 3, EarlyStoppingReason.STOPPING_THRESHOLD),
        ({"divergence_threshold": 5.0}, (3.0, 5.0, 5.1), 3, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ({"mode": "max", "divergence_threshold": 2.0}, (3.0, 1.9), 2, EarlyStoppingReason.DIVERGENCE_THRESHOLD),
        ({}, (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0), 8, EarlyStoppingReason.NOT_STOPPED),
    ],
)
def test_training_stops_for_a_reason(tmp_path, arguments, values, epochs, reason):
    callback = EarlyStopping("val", **arguments)
    run = fit(tmp_path, callback, Small(values))
    assert run.current_epoch == epochs
    assert callback.stopping_reason == reason
    assert callback.stopped_epoch == (epochs - 1 if reason != EarlyStoppingReason.NOT_STOPPED else 0)
    assert (callback.stopping_reason_message is None) == (reason == EarlyStoppingReason.NOT_STOPPED)


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ({"val_check_interval": 1}, 4),
        ({"check_val_every_n_epoch": 2}, 8),
        ({"num_sanity_val_steps": 2}, 4),
        ({"min_epochs": 6}, 6),
        ({"fast_dev_run": 2}, 1),
    ],
)
def test_looks_are_counted_not_epochs(tmp_path, flags, epochs):
    assert fit(tmp_path, EarlyStopping("val"), Small((1.0,)), **flags).current_epoch == epochs


def test_several_validations_in_an_epoch_count_each(tmp_path):
    run = trainer(tmp_path, [EarlyStopping("val", patience=3)], max_epochs=8, val_check_interval=2)
    run.fit(Small((1.0,)), loader(8), loader(2))
    assert run.current_epoch == 1


def test_what_is_logged_in_training_can_be_watched(tmp_path):
    class Logs(TrainOnly):
        def on_train_epoch_end(self):
            self.log("late", 1.0)

    assert fit(tmp_path, EarlyStopping("late"), Logs()).current_epoch == 4


def test_without_validation_epochs_are_what_counts(tmp_path):
    class Logs(TrainOnly):
        def on_train_epoch_end(self):
            self.log("late", 1.0)

    assert fit(tmp_path, EarlyStopping("late"), Logs(), check_val_every_n_epoch=2).current_epoch == 4


def test_a_missing_metric_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="`typo` which is not available.*`val`"):
        fit(tmp_path, EarlyStopping("typo"), Small())


def test_a_missing_metric_may_be_allowed(tmp_path):
    assert fit(tmp_path, EarlyStopping("typo", strict=False), Small()).current_epoch == 8
    with pytest.warns(RuntimeWarning, match="typo"):
        fit(tmp_path, EarlyStopping("typo", strict=False, verbose=True), Small())


def test_a_wrong_mode_is_refused():
    with pytest.raises(MisconfigurationException, match="mode must be 'min' or 'max', received 'best'"):
        EarlyStopping("val", mode="best")


def test_a_whole_number_can_be_watched(tmp_path):
    callback = EarlyStopping("val", stopping_threshold=0.5)
    metrics = {"val": torch.tensor(1)}
    assert callback._evaluate_stopping_criteria(metrics["val"])[0] is False
    assert callback._evaluate_stopping_criteria(torch.tensor(0))[0] is True


def test_the_state_goes_on_after_a_resume():
    callback = EarlyStopping("val")
    callback._evaluate_stopping_criteria(torch.tensor(1.0))
    callback._evaluate_stopping_criteria(torch.tensor(2.0))
    other = EarlyStopping("val")
    other.load_state_dict(callback.state_dict())
    assert (other.wait_count, other.best_score) == (1, 1.0)
    assert callback.state_key == "EarlyStopping{'monitor': 'val', 'mode': 'min'}"


def test_an_older_state_without_a_reason_is_read():
    callback = EarlyStopping("val")
    callback.load_state_dict({"wait_count": 2, "stopped_epoch": 0, "best_score": torch.tensor(1.0), "patience": 5})
    assert (callback.wait_count, callback.patience) == (2, 5)
    assert callback.stopping_reason is EarlyStoppingReason.NOT_STOPPED


def test_decisions_are_logged(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="levin"):
        fit(tmp_path, EarlyStopping("val", patience=1, verbose=True), Small((3.0, 2.0, 2.5)))
    messages = [record.getMessage() for record in caplog.records if "val" in record.getMessage()]
    assert messages == [
        "Metric val improved. New best score: 3.000",
        "Metric val improved by 1.000 >= min_delta = 0.0. New best score: 2.000",
        "Monitored metric val did not improve in the last 1 records. Best score: 2.000. Signaling Trainer to stop.",
    ]
