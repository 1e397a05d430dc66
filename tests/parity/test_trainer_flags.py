"""The flags of a fit interact; drawn combinations of them run on both frameworks and are compared hook by hook."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tests.parity import both
from tests.parity.trainer_runs import assert_alike, fit, raise_at, stop_at, watch

FLAGS: dict[str, list[Any]] = {
    "max_epochs": [0, 1, 2, 3, -1],
    "max_steps": [0, 1, 3, 5, 7],
    "min_epochs": [1, 2, 3],
    "min_steps": [1, 3, 6],
    "limit_train_batches": [0, 1, 2, 3, 0.5, 0.3, 10],
    "limit_val_batches": [0, 1, 0.5, 5],
    "val_check_interval": [1, 2, 3, 4, 0.25, 0.5, 0.7, 1.0],
    "check_val_every_n_epoch": [1, 2, 3],
    "accumulate_grad_batches": [2, 3, 5],
    "overfit_batches": [1, 2, 0.5],
    "fast_dev_run": [True, 2, 3],
    "num_sanity_val_steps": [0, 1, 5, -1],
    "log_every_n_steps": [0, 2, 3],
    "reload_dataloaders_every_n_epochs": [1, 2],
    "gradient_clip_val": [0.1, 0],
    "logger": [False],
}


def draw(seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Some flags, and options of the module."""
    draws = random.Random(seed)
    flags: dict[str, Any] = {"max_epochs": draws.choice([1, 2, 3])}
    for name in draws.sample(sorted(FLAGS), draws.randint(1, 5)):
        flags[name] = draws.choice(FLAGS[name])
    if draws.random() < 0.2:
        flags.update(check_val_every_n_epoch=None, val_check_interval=draws.choice([1, 2, 3, 5, 6, 9]))
    if flags["max_epochs"] == -1 and "max_steps" not in flags:
        flags["max_steps"] = 6
    if flags["max_epochs"] == -1 and flags.get("limit_train_batches") == 0:
        del flags["limit_train_batches"]
    options: dict[str, Any] = {}
    if draws.random() < 0.3:
        options.update(scheduler=draws.choice(["step", "epoch"]), frequency=draws.choice([1, 2]))
    if draws.random() < 0.15:
        options = {"manual": True}
    if draws.random() < 0.1:
        options["none_at"] = draws.choice([0, 1, 3])
    return flags, options


def compare(tmp_path, seed, then=None):
    flags, options = draw(seed)
    theirs_seen: list = []
    ours_seen: list = []
    theirs = fit(both.lightning(), tmp_path, flags, options, act=watch(theirs_seen, then))
    ours = fit(both.levin(), tmp_path, flags, options, act=watch(ours_seen, then))
    # The last, short window of accumulated batches is divided by what it holds: design, "last, short accumulation window".
    assert_alike(theirs, ours, values="accumulate_grad_batches" not in flags)
    for call, theirs_now, ours_now in zip(theirs.calls, theirs_seen, ours_seen):
        assert ours_now == theirs_now, call


@pytest.mark.lightning_raises("MisconfigurationException", "ValueError")
@pytest.mark.parametrize("seed", range(40))
def test_combinations_of_flags_give_the_same_run(tmp_path, seed):
    compare(tmp_path, seed)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("seed", range(100, 130))
def test_should_stop_set_in_any_hook_gives_the_same_run(tmp_path, seed):
    compare(tmp_path, seed, stop_at(random.Random(seed).randint(0, 120)))


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("seed", range(200, 220))
def test_an_exception_in_any_hook_gives_the_same_run(tmp_path, seed):
    compare(tmp_path, seed, raise_at(random.Random(seed).randint(0, 120), ValueError("meant")))


@pytest.mark.parametrize(
    ("interval", "every"),
    [
        *itertools.product([1, 2, 3, 4, 5, 0.25, 0.3, 0.5, 0.8, 1.0], [1, 2]),
        *((batches, None) for batches in (1, 2, 3, 5, 7, 11)),
    ],
)
def test_validation_runs_after_the_same_batches(tmp_path, interval, every):
    flags = {"max_epochs": 3, "val_check_interval": interval, "check_val_every_n_epoch": every}
    theirs, ours = (fit(make(), tmp_path, flags, train=both.loader(5)) for make in (both.lightning, both.levin))
    assert_alike(theirs, ours)


@pytest.mark.lightning_raises("ValueError")
@pytest.mark.parametrize("batches", [1, 2])
def test_an_interval_longer_than_the_epoch_is_refused(tmp_path, batches):
    flags = {"max_epochs": 1, "val_check_interval": batches + 1}
    theirs, ours = (fit(make(), tmp_path, flags, train=both.loader(batches)) for make in (both.lightning, both.levin))
    assert type(theirs.error) is ValueError and isinstance(ours.error, ValueError)
    assert ours.calls == theirs.calls


STOPS_EARLY = [
    "on_fit_start", "on_sanity_check_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start",
    "on_train_batch_end", "on_validation_start", "on_validation_end", "on_train_epoch_end",
]  # fmt: skip


@pytest.mark.parametrize("minimum", [{}, {"min_epochs": 2}, {"min_steps": 6}], ids=["free", "epochs", "steps"])
@pytest.mark.parametrize("hook", STOPS_EARLY)
def test_a_stop_asked_for_in_each_hook(tmp_path, hook, minimum):
    def then(trainer, number, call):
        if call[:2] == ("C", hook):
            trainer.should_stop = True

    flags = {"max_epochs": 3, "val_check_interval": 2, **minimum}
    theirs = fit(both.lightning(), tmp_path, flags, act=then)
    ours = fit(both.levin(), tmp_path, flags, act=then)
    assert_alike(theirs, ours)
    minima = [[line for line in run.heard["lines"] if "signaled to stop" in line] for run in (theirs, ours)]
    assert minima[0] == minima[1]
