"""When values go to the loggers, and at which step, on Lightning and on levin."""

from __future__ import annotations

import pytest
import torch

from tests.parity.logged import Log, assert_same, run_both

SIZES = (2, 2, 1, 2, 2)
FLAGS = [
    {}, {"log_every_n_steps": 2}, {"log_every_n_steps": 7}, {"log_every_n_steps": 0}, {"accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 2, "log_every_n_steps": 2}, {"accumulate_grad_batches": 3, "log_every_n_steps": 2, "max_epochs": 3},
    {"val_check_interval": 1}, {"val_check_interval": 2, "accumulate_grad_batches": 2}, {"val_check_interval": 0.5},
    {"limit_train_batches": 2}, {"limit_train_batches": 0.5, "limit_val_batches": 1}, {"limit_val_batches": 0},
    {"fast_dev_run": 2}, {"max_steps": 4, "max_epochs": -1}, {"check_val_every_n_epoch": 2}, {"overfit_batches": 2},
    {"check_val_every_n_epoch": None, "val_check_interval": 4, "max_epochs": 3}, {"num_sanity_val_steps": 0}, {"num_sanity_val_steps": -1},
]  # fmt: skip


def counted(module, batch, index):
    return torch.tensor(index + 1.0)


def everything(by_callback: bool) -> list[Log]:
    where = ("on_train_batch_end", "on_validation_batch_end") if by_callback else ("training_step", "validation_step")
    return [
        Log(where[0], "t", counted, {"on_epoch": True, "prog_bar": True}, by_callback),
        Log(where[1], "v", counted, {"on_step": True, "on_epoch": True}, by_callback),
        Log("on_train_epoch_end", "e", 5.0, {}, by_callback),
    ]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("by_callback", [False, True], ids=["module", "callback"])
def test_cadence_and_axis(tmp_path, flags, by_callback):
    assert_same(*run_both(tmp_path, everything(by_callback), flags, sizes=SIZES, reads=not by_callback))


OVERRIDES = [
    ("training_step", "step", 100.0, {}),
    ("training_step", "step", 100.0, {"on_epoch": True, "on_step": False}),
    ("training_step", "epoch", 7.0, {}),
    ("training_step", "epoch", 7.0, {"on_epoch": True, "on_step": False}),
    ("on_train_epoch_end", "step", 3.7, {}),
    ("on_train_epoch_end", "epoch", 3.7, {}),
    ("validation_step", "step", 40.0, {}),
    ("validation_step", "step", 40.0, {"on_step": True}),
    ("validation_step", "step", 40.0, {"on_step": True, "on_epoch": False}),
    ("validation_step", "epoch", 4.0, {"on_step": True, "on_epoch": False}),
    ("on_validation_epoch_end", "epoch", 11.0, {}),
    ("on_validation_epoch_end", "step", 11.0, {"logger": False}),
]


@pytest.mark.parametrize(("hook", "name", "value", "arguments"), OVERRIDES)
@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_the_user_sets_the_axis(tmp_path, hook, name, value, arguments, flags):
    assert_same(*run_both(tmp_path, [*everything(False), Log(hook, name, value, arguments)], flags, sizes=SIZES))


@pytest.mark.parametrize("stop_at", [(0, 0), (0, 1), (0, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 2}, {"min_epochs": 2}, {"min_steps": 3}], ids=str)
def test_a_run_that_is_told_to_stop_logs_its_last_step(tmp_path, stop_at, flags):
    flags = {"log_every_n_steps": 50, **flags}
    assert_same(*run_both(tmp_path, everything(False), flags, sizes=SIZES, stop_at=stop_at))


@pytest.mark.parametrize("flags", [{}, {"log_every_n_steps": 2}, {"max_steps": 3, "max_epochs": -1}], ids=str)
def test_manual_optimization(tmp_path, flags):
    assert_same(*run_both(tmp_path, everything(False), flags, sizes=SIZES, manual=True))


@pytest.mark.parametrize("num_loaders", [1, 2])
@pytest.mark.parametrize("flags", [{"val_check_interval": 2}, {"limit_val_batches": 1}], ids=str)
def test_the_steps_of_evaluations_count_on(tmp_path, flags, num_loaders):
    script = [Log("validation_step", "v", counted, {"on_step": True, "on_epoch": True})]
    assert_same(*run_both(tmp_path, script, flags, num_loaders=num_loaders, sizes=SIZES))


@pytest.mark.parametrize("method", ["validate", "test"])
@pytest.mark.parametrize("num_loaders", [1, 3])
def test_the_steps_of_an_evaluation_alone(tmp_path, method, num_loaders):
    hook = "validation_step" if method == "validate" else "test_step"
    script = [Log(hook, "v", counted, {"on_step": True, "on_epoch": True}), Log(hook, "step", 3.0, {"on_step": True})]
    assert_same(*run_both(tmp_path, script, method=method, num_loaders=num_loaders))
    assert_same(*run_both(tmp_path, script[:1], {"fast_dev_run": True}, method=method, num_loaders=num_loaders))
