"""Callbacks whose ranks see different things agree on what to do."""

from __future__ import annotations

import time
import warnings
from datetime import timedelta

import torch

from levin.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, Timer, WeightAveraging
from tests.callbacks.small import Small, loader, names, trainer
from tests.distributed import world_size


class OwnValues(Small):
    """Each rank logs values of its own."""

    def __init__(self, *values):
        super().__init__()
        self.of_ranks = values

    def validation_step(self, batch, batch_idx):
        values = self.of_ranks[self.global_rank]
        self.log("val", values[min(self.current_epoch, len(values) - 1)])


def run_on_ranks(folder, callbacks, module, **kwargs):
    run = trainer(folder, callbacks, strategy="ddp", devices=2, **kwargs)
    run.fit(module, loader(8), loader(2))
    return run


@world_size(2, connect=False)
def test_names_are_those_of_rank_zero(tmp_path):
    callback = ModelCheckpoint(tmp_path / "files", filename="{val:.1f}", save_top_k=-1)
    run = run_on_ranks(tmp_path, [callback], OwnValues((1.0, 2.0), (8.0, 9.0)), max_epochs=2)
    assert callback.best_model_path == str(tmp_path / "files" / "val=2.0.ckpt")
    run.strategy.barrier()
    assert names(tmp_path / "files") == ["val=1.0.ckpt", "val=2.0.ckpt"]


@world_size(2, connect=False)
def test_a_checkpoint_is_among_the_best_when_all_ranks_say_so(tmp_path):
    callback = ModelCheckpoint(tmp_path / "files", monitor="val", save_last="link")
    warnings.filterwarnings("ignore", message=".*the value differs from rank to rank")
    run = run_on_ranks(tmp_path, [callback], OwnValues((3.0, 2.0, 1.0), (3.0, 4.0, 1.0)), max_epochs=3)
    run.strategy.barrier()
    assert names(tmp_path / "files") == ["epoch=2-step=12.ckpt", "last.ckpt"]


@world_size(2, connect=False)
def test_one_rank_that_wants_to_stop_stops_all(tmp_path):
    callback = EarlyStopping("val", patience=1)
    run = run_on_ranks(tmp_path, [callback], OwnValues((4.0, 3.0, 2.0, 1.0), (4.0, 3.0, 3.0, 1.0)), max_epochs=4)
    assert run.current_epoch == 3
    assert callback.stopped_epoch == 2


class Slow(Small):
    def training_step(self, batch, batch_idx):
        time.sleep(0.01 * (1 + self.global_rank))
        return super().training_step(batch, batch_idx)


@world_size(2, connect=False)
def test_ranks_stop_at_the_same_batch_when_time_is_up(tmp_path):
    run = run_on_ranks(tmp_path, [Timer(timedelta(milliseconds=300))], Slow(), max_epochs=1000)
    steps = run.strategy.all_gather(torch.tensor(run.global_step))
    assert steps[0] == steps[1]
    assert 2 <= run.global_step < 100


@world_size(2, connect=False)
def test_ranks_save_at_the_same_batches_when_time_has_passed(tmp_path):
    callback = ModelCheckpoint(tmp_path / "files", save_top_k=-1, train_time_interval=timedelta(milliseconds=100))
    run = run_on_ranks(tmp_path, [callback], Slow(), max_epochs=10)
    run.strategy.barrier()
    found = names(tmp_path / "files")
    assert 2 <= len(found) <= 20
    assert callback.best_model_path.rsplit("/", 1)[1] in found


@world_size(2, connect=False)
def test_averages_are_the_same_on_all_ranks(tmp_path):
    class Normed(Small):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(2)

        def training_step(self, batch, batch_idx):
            return self.layer(self.norm(batch[0].repeat(2, 1) + torch.tensor([[0.0], [1.0]]))).pow(2).mean()

    for averaging in (WeightAveraging(), StochasticWeightAveraging(0.01, swa_epoch_start=2)):
        module = Normed()
        run = run_on_ranks(tmp_path, [averaging], module, max_epochs=3)
        weights = run.strategy.all_gather(module.layer.weight.detach())
        assert torch.equal(weights[0], weights[1])


@world_size(2, connect=False)
def test_one_rank_decides_which_files_are_the_best_and_says_so_once(tmp_path):
    callback = ModelCheckpoint(tmp_path / "files", monitor="val", save_top_k=2)
    module = OwnValues((3.0, 1.0, 2.0, 4.0), (1.0, 4.0, 2.5, 0.5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = run_on_ranks(tmp_path, [callback], module, max_epochs=4)
    run.strategy.barrier()
    folder = tmp_path / "files"
    assert names(folder) == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]
    assert callback.best_model_path == str(folder / "epoch=1-step=8.ckpt")
    assert {path: float(score) for path, score in callback.best_k_models.items()} == {
        str(folder / "epoch=1-step=8.ckpt"): 1.0,
        str(folder / "epoch=2-step=12.ckpt"): 2.0,
    }
    told = [str(entry.message) for entry in caught if "differs from rank to rank" in str(entry.message)]
    assert len(told) == (1 if run.global_rank == 0 else 0)


class OnOneRank(Small):
    """Logs the value on one rank alone."""

    def validation_step(self, batch, batch_idx):
        if self.global_rank == 0:
            self.log("val", 1.0 - 0.1 * self.current_epoch)


@world_size(2, connect=False)
def test_a_value_that_one_rank_alone_logs_hangs_nobody(tmp_path):
    """Nor does it stop training before its time, and then it stops all."""
    stopping = EarlyStopping("val", stopping_threshold=0.95)
    callback = ModelCheckpoint(tmp_path / "files", monitor="val")
    warnings.filterwarnings("ignore", message=".*the value differs from rank to rank")
    run = run_on_ranks(tmp_path, [callback, stopping], OnOneRank(), max_epochs=3)
    run.strategy.barrier()
    assert names(tmp_path / "files") == ["epoch=1-step=8.ckpt"]
    assert (run.current_epoch, stopping.stopped_epoch) == (2, 1)
