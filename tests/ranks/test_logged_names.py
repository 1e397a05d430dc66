"""What all ranks log together is matched by its name, in steps and for epochs."""

from __future__ import annotations

import warnings

import pytest
import torch.distributed as dist
import torchmetrics

from levin import Trainer
from levin.log_slot import Arguments
from levin.log_store import LogStore
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small


def in_rank(**kwargs) -> Trainer:
    return Trainer(**{**QUIET, "devices": 2, "strategy": "ddp", "enable_checkpointing": False, **kwargs})


class Logs(Small):
    """Logs other names, or in another order, on each rank."""

    def __init__(self, names: list[list[str]], hook: str) -> None:
        super().__init__(batch_size=4)
        self.names, self.hook = names, hook

    def training_step(self, batch, batch_idx):
        self.log_all("training_step", on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log_all("validation_step")

    def on_train_epoch_end(self):
        self.log_all("on_train_epoch_end")

    def log_all(self, hook, **kwargs):
        rank = dist.get_rank()
        for name in self.names[rank] if hook == self.hook else ():
            self.log(name, {"even": 2.0, "odd": 5.0}[name] + rank, sync_dist=True, **kwargs)


@world_size(2, connect=False)
def test_values_that_are_synced_are_matched_by_name():
    for hook in ("training_step", "validation_step", "on_train_epoch_end"):
        for names in ([["even"], ["odd"]], [["even", "odd"], ["even"]]):
            with pytest.raises(
                RuntimeError, match=rf"self.log\('\w+', \.\.\.\).*called in {hook} on rank \d and not on rank \d"
            ):
                in_rank(max_epochs=1).fit(Logs(names, hook))
        trainer = in_rank(max_epochs=1)
        trainer.fit(Logs([["even", "odd"], ["odd", "even"]], hook))
        metrics = trainer.callback_metrics
        assert (float(metrics["even"]), float(metrics["odd"])) == (2.5, 5.5)


class LogsOtherwise(Small):
    """Logs what ``log(self, rank, batch_idx)`` does, in training steps and in validation steps."""

    def __init__(self, train=None, val=None, size: int = 32) -> None:
        super().__init__(size=size)
        self.first, self.second = torchmetrics.MeanMetric(), torchmetrics.SumMetric()
        self.train_log, self.val_log = train, val

    def training_step(self, batch, batch_idx):
        if self.train_log is not None:
            self.train_log(self, dist.get_rank(), batch_idx)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.val_log is not None:
            self.first.update(1.0)
            self.second.update(1.0)
            self.val_log(self, dist.get_rank(), batch_idx)


def log_in_step(names: list[list[str]]):
    """Return a function that logs ``names[rank]`` in turn, one in each step."""

    def log(module, rank, batch_idx):
        module.log(names[rank][batch_idx % len(names[rank])], float(rank), on_step=True, on_epoch=False, sync_dist=True)

    return log


@world_size(2, connect=False)
def test_values_of_steps_are_of_one_name_on_all_ranks():
    for names in [["a"], ["b"]], [["a", "b"], ["b", "a"]]:
        trainer = in_rank(max_epochs=1)
        said = r"received 'a' in training_step on rank 0 and 'b' in training_step on rank 1"
        with pytest.raises(RuntimeError, match=said):
            trainer.fit(LogsOtherwise(train=log_in_step(names)))
        assert trainer.global_step == 0
    # Names that all have logged before are compared at the next exchange, long before the end of the epoch.
    for size in 32, 80_000:
        trainer = in_rank(max_epochs=2)
        said = r"values of several names were mixed. Logged were 'a', 'b' on ranks 0, 1"
        with pytest.raises(RuntimeError, match=said):
            trainer.fit(LogsOtherwise(train=log_in_step([["a", "b", "a", "b"], ["a", "b", "b", "a"]]), size=size))
        assert trainer.current_epoch == 0
        assert trainer.global_step < 9_000
    trainer = in_rank(max_epochs=1)
    trainer.fit(LogsOtherwise(train=log_in_step([["a", "b"], ["a", "b"]])))
    assert float(trainer.callback_metrics["a"]) == 0.5


@world_size(2, connect=False)
def test_values_of_an_epoch_are_made_in_one_way_on_all_ranks():
    def otherwise(first, second):
        return lambda module, rank, _: module.log("x", sync_dist=True, **(first, second)[rank](module))

    of_first, of_second = (lambda module: {"value": module.first}), (lambda module: {"value": module.second})
    a_sum, a_mean = (lambda _: {"value": 1.0, "reduce_fx": sum}), (lambda _: {"value": 1.0})
    for log, said in (
        (otherwise(of_first, a_mean), r"the metric first on rank 0 and reduce_fx='mean' on rank 1"),
        (otherwise(of_first, of_second), r"the metric first on rank 0 and the metric second on rank 1"),
        (otherwise(a_sum, a_mean), r"reduce_fx='sum' on rank 0 and reduce_fx='mean' on rank 1"),
    ):
        with pytest.raises(RuntimeError, match=rf"self.log\('x', .*in validation_step on all ranks, with {said}"):
            in_rank(max_epochs=1).fit(LogsOtherwise(val=log))
    trainer = in_rank(max_epochs=1)
    trainer.fit(LogsOtherwise(val=otherwise(of_second, of_second)))
    assert float(trainer.callback_metrics["x"]) == 4.0


@pytest.mark.parametrize(
    ("arguments", "warns"),
    [
        ({}, True),
        ({"on_step": True, "on_epoch": False}, False),
        ({"sync_dist": True}, False),
        ({"rank_zero_only": True}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_value_of_an_epoch_that_each_rank_has_for_itself_is_told(arguments, warns, num_ranks):
    store = LogStore(training=False, modules=dict, num_ranks=num_ranks)
    store.hook = "validation_step"
    given = Arguments(False, True, None, None, "mean", False, None, True, None, False)._replace(**arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store.log("a", 1.0, tuple(given), 1)
    assert [str(warning.message)[:27] for warning in caught] == ["Each rank has its own value"] * (
        warns and num_ranks == 2
    )
