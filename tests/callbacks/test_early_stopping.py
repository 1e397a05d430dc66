from __future__ import annotations

import logging
import math
from types import SimpleNamespace

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
    ("arguments", "values", "epochs", "reason", "told"),
    [
        (
            {},
            (3.0, 1.0, 2.0, 2.0, 2.0),
            5,
            "PATIENCE_EXHAUSTED",
            "not improve in the last 3 records. Best score: 1.000.",
        ),
        ({"patience": 0}, (1.0, 1.0), 2, "PATIENCE_EXHAUSTED", "not improve in the last 1 records. Best score: 1.000."),
        ({"min_delta": 0.5}, (5.0, 4.6, 4.3, 4.0), 6, "PATIENCE_EXHAUSTED", "the last 3 records. Best score: 4.300."),
        ({"mode": "max"}, (1.0, 2.0, 1.5), 5, "PATIENCE_EXHAUSTED", "the last 3 records. Best score: 2.000."),
        ({}, (3.0, nan), 2, "NON_FINITE_METRIC", "val = nan is not finite. Previous best value was 3.000."),
        ({"check_finite": False}, (3.0, nan), 4, "PATIENCE_EXHAUSTED", "the last 3 records. Best score: 3.000."),
        ({"stopping_threshold": 1.5}, (3.0, 1.5, 1.25), 3, "STOPPING_THRESHOLD", "reached: val = 1.25 < 1.5."),
        ({"divergence_threshold": 5.0}, (3.0, 5.0, 5.5), 3, "DIVERGENCE_THRESHOLD", "reached: val = 5.5 > 5.0."),
        ({"mode": "max", "stopping_threshold": 2.0}, (1.0, 2.5), 2, "STOPPING_THRESHOLD", "reached: val = 2.5 > 2.0."),
        ({"mode": "max", "divergence_threshold": 2.0}, (3.0, 1.5), 2, "DIVERGENCE_THRESHOLD", "val = 1.5 < 2.0."),
        ({}, (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0), 8, "NOT_STOPPED", None),
    ],
)
def test_training_stops_for_a_reason(tmp_path, caplog, arguments, values, epochs, reason, told):
    reason = EarlyStoppingReason[reason]
    callback = EarlyStopping("val", **arguments)
    with caplog.at_level(logging.INFO, logger="levin"):
        run = fit(tmp_path, callback, Small(values))
    assert not [text for text in caplog.messages if "val" in text], "it was not asked to say anything"
    assert run.current_epoch == epochs
    assert callback.stopping_reason == reason
    assert callback.stopped_epoch == (epochs - 1 if reason != EarlyStoppingReason.NOT_STOPPED else 0)
    if told is None:
        assert callback.stopping_reason_message is None
    else:
        assert callback.stopping_reason_message.endswith(f"{told} Signaling Trainer to stop.")


@pytest.mark.parametrize(
    ("at_epoch_end", "flags", "epochs"),
    [
        (None, {"val_check_interval": 0.5}, 2),
        (True, {"val_check_interval": 0.5}, 4),
        (None, {"check_val_every_n_epoch": 2}, 8),
        (None, {"num_sanity_val_steps": 2}, 4),
        (None, {"min_epochs": 6}, 6),
        (None, {"fast_dev_run": 2}, 1),
    ],
)
def test_looks_are_counted_not_epochs(tmp_path, at_epoch_end, flags, epochs):
    callback = EarlyStopping("val", check_on_train_epoch_end=at_epoch_end)
    assert fit(tmp_path, callback, Small((1.0,)), **flags).current_epoch == epochs


def test_nothing_is_watched_outside_of_fit(tmp_path):
    callback = EarlyStopping("typo")
    trainer(tmp_path, [callback]).validate(Small(), loader(2), verbose=False)
    assert callback.wait_count == 0


@pytest.mark.parametrize(
    ("rank", "world_size", "rank_zero_only", "told"),
    [
        (0, 1, False, ["Metric val improved. New best score: 1.000"]),
        (1, 2, False, ["[rank: 1] Metric val improved. New best score: 1.000"]),
        (0, 2, True, ["[rank: 0] Metric val improved. New best score: 1.000"]),
        (1, 2, True, []),
    ],
)
def test_ranks_say_what_they_see(caplog, rank, world_size, rank_zero_only, told):
    run = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, fast_dev_run=0, enable_validation=False,
        callback_metrics={"val": torch.tensor(1.0)}, global_rank=rank, world_size=world_size, is_global_zero=rank == 0,
        strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
    )  # fmt: skip
    callback = EarlyStopping("val", verbose=True, log_rank_zero_only=rank_zero_only)
    with caplog.at_level(logging.INFO, logger="levin"):
        callback.on_train_epoch_end(run, None)
    assert caplog.messages == told


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
