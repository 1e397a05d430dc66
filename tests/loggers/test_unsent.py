"""Values that the device has not computed yet: on their way to loggers and bar while the steps go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from levin import Callback, Trainer
from levin.callbacks import LearningRateMonitor, ProgressBar
from levin.demos.boring_classes import BoringModel
from levin.log_slot import Block
from levin.loggers import Logger, unsent
from levin.loops import run as runs
from levin.utilities import numbers
from levin.utilities.numbers import Latest, Reading


class Late(Reading):
    """Numbers that are not there before somebody has asked for them ``after`` times."""

    after = 3

    def __init__(self, metrics: Any) -> None:
        super().__init__(metrics)
        self.asked = 0

    @property
    def is_there(self) -> bool:
        self.asked += 1
        return self.asked > self.after

    def numbers(self) -> dict[str, Any]:
        assert self.asked > self.after, "somebody waited"
        return super().numbers()


class Rows(Logger):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, dict[str, Any]]] = []
        self.ends: list[str] = []
        self.saved: list[int] = []

    name, version = "rows", 0

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def save(self):
        self.saved.append(len(self.rows))

    def finalize(self, status):
        self.ends.append(f"{status} after {len(self.rows)}")


class Net(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("number", float(batch_idx), prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", super().validation_step(batch, batch_idx)["x"])

    def on_train_start(self):
        self.log("step", 7.0)


def trainer(**kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, **{**quiet, **kwargs})


def logged() -> Rows:
    torch.manual_seed(0)
    logger = Rows()
    trainer(
        logger=logger, max_epochs=2, limit_train_batches=8, limit_val_batches=2, val_check_interval=4, log_every_n_steps=1,
        callbacks=LearningRateMonitor("step"),
    ).fit(Net())  # fmt: skip
    return logger


@pytest.mark.parametrize("after", [1, 3, 40])
def test_loggers_get_all_rows_in_the_order_in_which_they_were_logged(after, monkeypatch):
    at_once = logged()
    monkeypatch.setattr(unsent, "Reading", Late)
    monkeypatch.setattr(Late, "after", after)
    later = logged()
    assert (later.rows, later.saved) == (at_once.rows, at_once.saved)
    assert [step for step, row in later.rows if "number" in row] == list(range(16))
    # What callbacks send is written with the next row of the loop.
    of_callbacks = [i for i, (_, row) in enumerate(later.rows, 1) if "lr-SGD" in row]
    assert len(of_callbacks) == 16
    assert set(of_callbacks).isdisjoint(later.saved)
    assert {*of_callbacks, *later.saved} >= set(range(1, len(later.rows) + 1))


def test_values_on_a_device_weigh_what_their_batches_weigh():
    block = Block("mean", torch.device("cpu"), torch.float64, size=3)
    for value, weight in ((1.0, 1), (2.0, 2), (4.0, 3), (8.0, 1), (16.0, 5)):
        block.put(torch.tensor(value))
        block.weights.append(weight)
    assert block.sum().item() == 1 * 1 + 2 * 2 + 4 * 3 + 8 * 1 + 16 * 5


def test_a_step_does_not_wait_for_its_values(monkeypatch):
    monkeypatch.setattr(unsent, "Reading", Late)
    logger, known = Rows(), []

    class Looking(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            known.append(len(logger.rows))

        def on_train_epoch_end(self, trainer, pl_module):
            known.append(len(logger.rows))

    # Asked when it is logged and after each later batch: there at the third of them, or when the epoch ends.
    monkeypatch.setattr(Late, "after", 3)
    trainer(logger=logger, max_epochs=1, limit_train_batches=8, limit_val_batches=0, log_every_n_steps=4, callbacks=Looking()).fit(Net())  # fmt: skip
    assert known == [0, 0, 0, 0, 0, 0, 0, 1, 2]
    assert [step for step, row in logger.rows if "number" in row] == [3, 7]


def test_what_was_logged_is_sent_before_a_checkpoint_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(unsent, "Reading", Late)
    monkeypatch.setattr(Late, "after", 30)
    logger, known = Rows(), {}

    class Saving(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 5:
                trainer.save_checkpoint(tmp_path / "a.ckpt")

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            known[trainer.global_step] = [step for step, row in logger.rows if "number" in row]

    trainer(logger=logger, max_epochs=1, limit_train_batches=8, limit_val_batches=0, log_every_n_steps=1, callbacks=Saving()).fit(Net())  # fmt: skip
    assert known[6] == [0, 1, 2, 3, 4]


class Broken(Net):
    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            raise KeyError("mine")
        return super().training_step(batch, batch_idx)


def test_after_an_error_loggers_get_what_was_computed_before(monkeypatch):
    monkeypatch.setattr(unsent, "Reading", Late)
    monkeypatch.setattr(Late, "after", 30)
    logger = Rows()
    with pytest.raises(KeyError, match="mine"):
        trainer(logger=logger, max_epochs=1, limit_val_batches=0, log_every_n_steps=1).fit(Broken())
    assert [step for step, row in logger.rows] == [0, 1, 2, 3, 4]
    assert logger.ends == ["failed after 5"]


def test_values_that_are_lost_with_the_device_do_not_hide_the_error(monkeypatch, caplog):
    class Lost(Late):
        def numbers(self):
            raise RuntimeError("device-side assert")

    monkeypatch.setattr(unsent, "Reading", Lost)
    monkeypatch.setattr(Late, "after", 30)
    logger = Rows()
    with pytest.raises(KeyError, match="mine"):
        trainer(logger=logger, max_epochs=1, limit_val_batches=0, log_every_n_steps=1).fit(Broken())
    assert logger.ends == ["failed after 0"]
    assert "The last logged values were not sent: RuntimeError: device-side assert" in caplog.text


def test_values_that_never_come_hold_up_an_error_for_a_moment_only(monkeypatch):
    from levin.loops import on_error

    monkeypatch.setattr(unsent, "Reading", Late)
    monkeypatch.setattr(Late, "after", 10**9)
    monkeypatch.setattr(on_error, "UNSENT_TIMEOUT_S", 0.1)
    with pytest.raises(KeyError, match="mine"):
        trainer(logger=Rows(), max_epochs=1, limit_val_batches=0, log_every_n_steps=1).fit(Broken())


def test_the_newest_numbers_that_are_there():
    latest = Latest()
    assert latest.of({"a": torch.tensor(1.0)}) == {"a": 1.0}
    assert latest.of({"a": torch.tensor(2.0), "b": "text"}) == {"a": 2.0, "b": "text"}


def test_while_numbers_travel_those_of_before_are_shown(monkeypatch):
    monkeypatch.setattr(numbers, "Reading", Late)
    monkeypatch.setattr(Late, "after", 2)
    latest = Latest()
    shown = [latest.of({"a": torch.tensor(float(i))}).get("a") for i in range(7)]
    # Each travels over two calls; the next begins where the last one ends.
    assert shown == [None, None, 0.0, 0.0, 2.0, 2.0, 4.0]


def test_a_bar_does_not_wait_between_batches_and_shows_the_last_values_at_the_end(monkeypatch):
    class Travelling(Reading):
        is_there = False

    monkeypatch.setattr(numbers, "Reading", Travelling)
    monkeypatch.setattr(runs, "to_numbers", lambda metrics: Reading(metrics).numbers())
    seen: dict[str, Any] = {"batch": [], "epoch": []}

    class Bar(ProgressBar):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen["batch"].append(self.get_metrics(trainer, pl_module))
            assert trainer.progress_bar_metrics["number"] == batch_idx

        def on_train_epoch_end(self, trainer, pl_module):
            seen["epoch"].append(self.get_metrics(trainer, pl_module))

    trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, enable_progress_bar=True, callbacks=Bar()).fit(Net())  # fmt: skip
    assert seen["batch"] == [{}, {}, {}]
    assert seen["epoch"][0]["number"] == 2.0


def test_values_that_come_late_go_to_the_loggers_of_when_they_were_logged(monkeypatch):
    monkeypatch.setattr(unsent, "Reading", Late)
    monkeypatch.setattr(Late, "after", 40)
    before, after = Rows(), Rows()

    class Exchanger(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 4:
                trainer.loggers = [after]

    trainer(
        logger=before,
        max_epochs=1,
        limit_train_batches=8,
        limit_val_batches=0,
        log_every_n_steps=1,
        callbacks=Exchanger(),
    ).fit(Net())
    assert [step for step, row in before.rows if "number" in row] == [0, 1, 2, 3]
    assert [step for step, row in after.rows if "number" in row] == [4, 5, 6, 7]
