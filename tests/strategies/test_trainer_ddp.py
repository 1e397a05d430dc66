"""Trainer on several processes: the same numbers as on one, and everything back where the user looks for it."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from levin import Callback, LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.strategies import DDPStrategy
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small, loader, ordered_loader


def in_rank(**kwargs) -> Trainer:
    """Return a Trainer for a process that is one of two."""
    return Trainer(
        **{**QUIET, "devices": 2, "strategy": "ddp", "enable_checkpointing": False, "max_epochs": 2, **kwargs}
    )


def alone(**kwargs) -> Trainer:
    return Trainer(**{**QUIET, "devices": 1, "enable_checkpointing": False, "max_epochs": 2, **kwargs})


@world_size(2, connect=False)
def test_two_processes_with_half_the_batch_are_one_with_the_whole():
    rank = int(os.environ["RANK"])
    module, reference = Small(batch_size=4), Small(batch_size=8)
    in_rank().fit(module)
    assert sorted(module.seen) == sorted([*range(rank, 16, 2)] * 2)
    alone().fit(reference)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [16, 20])
@world_size(2, connect=False)
def test_accumulation_is_the_same_on_two_processes(size):
    module, reference = Small(batch_size=2, size=size), Small(batch_size=4, size=size)
    in_rank(accumulate_grad_batches=2).fit(module)
    alone(accumulate_grad_batches=2).fit(reference)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@world_size(2, connect=False)
def test_logged_values_are_those_of_all_ranks():
    module, reference = Small(lr=0.0), Small(lr=0.0, batch_size=8)
    ours, theirs = in_rank(max_epochs=1), alone(max_epochs=1)
    ours.fit(module)
    theirs.fit(reference)
    for name in ("loss", "val_loss"):
        torch.testing.assert_close(ours.callback_metrics[name], theirs.callback_metrics[name])
    (result,) = ours.test(module, loader(4), verbose=False)
    assert result["val_loss"] == pytest.approx(theirs.callback_metrics["val_loss"].item())


class Adversaries(LightningModule):
    """Two networks, two optimizers, four backward passes in a step."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, 16
        torch.manual_seed(1)
        self.automatic_optimization = False
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        self.calls: list[str] = []

    def training_step(self, batch, batch_idx):
        for _ in range(2):
            for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
                loss = sign * self.second(self.first(batch[0])).pow(2).mean()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.first, self.second)]

    def train_dataloader(self):
        return ordered_loader(self)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
@world_size(2, connect=False)
def test_manual_optimization(strategy):
    module, reference = Adversaries(4), Adversaries(8)
    in_rank(strategy=strategy).fit(module)
    alone().fit(reference)
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@world_size(2, connect=False)
def test_validation_sees_the_statistics_of_rank_zero():
    class Looking(Small):
        def on_validation_epoch_start(self):
            means = self.all_gather(self.net[0].running_mean)
            assert torch.equal(means[0], means[1])

    module = Looking(has_norm=True)
    in_rank(max_epochs=1, num_sanity_val_steps=1).fit(module)


@world_size(2, connect=False)
def test_batch_norm_over_all_ranks():
    module, reference = Small(has_norm=True), Small(has_norm=True, batch_size=8)
    in_rank(sync_batchnorm=True, limit_val_batches=0).fit(module)
    alone(limit_val_batches=0).fit(reference)
    assert isinstance(module.net[0], nn.BatchNorm1d)
    for ours, theirs in zip(module.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@world_size(2, connect=False)
def test_the_model_is_wrapped_while_it_trains_only(tmp_path):
    seen = {}

    class Looking(Callback):
        def on_train_start(self, trainer, pl_module):
            seen["train"] = type(trainer.model).__name__
            assert trainer.lightning_module is pl_module is trainer.model.module
            assert (trainer.world_size, trainer.num_devices, trainer.num_nodes) == (2, 2, 1)
            assert trainer.distributed_sampler_kwargs == {"num_replicas": 2, "rank": trainer.global_rank}

        def on_test_start(self, trainer, pl_module):
            seen["test"] = type(trainer.model).__name__

    module = Small()
    trainer = in_rank(callbacks=[Looking()])
    trainer.fit(module)
    trainer.test(module, loader(), verbose=False)
    assert seen == {"train": "DistributedDataParallel", "test": "Small"}


@world_size(2, connect=False)
def test_strategy_hooks_are_called():
    calls = []

    class Telling(DDPStrategy):
        def on_train_start(self):
            calls.append("train")

        def on_train_batch_start(self, batch, batch_idx):
            calls.append(batch_idx)

        def on_predict_end(self):
            calls.append("predict")

    trainer = in_rank(strategy=Telling(), max_epochs=1)
    module = Small()
    trainer.fit(module)
    outputs = trainer.predict(module, loader())
    assert calls == ["train", 0, 1, "predict"]
    assert len(outputs) == 2


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_results_come_back_from_started_processes(strategy, tmp_path):
    module, reference = Small(), Small(batch_size=8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "saved", monitor="val_loss")
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": strategy, "max_epochs": 2, "callbacks": [checkpoint]})
    assert trainer.fit(module) is None
    alone().fit(reference)
    assert any(not torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for ours, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert (trainer.global_step, trainer.current_epoch) == (4, 2)
    assert trainer.state.finished
    assert str(trainer.state.fn) == "fit"
    assert os.path.exists(checkpoint.best_model_path)
    assert checkpoint.best_model_score.item() == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert trainer.callback_metrics["loss"].device.type == "cpu"
    assert not dist.is_initialized()
    # The other methods run in processes of their own, one after the other.
    (result,) = trainer.test(module, loader(4), verbose=False)
    assert result["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item())
    assert trainer.predict(module, loader(4)) is None
    with pytest.raises(ValueError, match="return_predictions=True"):
        trainer.predict(module, loader(4), return_predictions=True)
    with pytest.raises(NotImplementedError, match="called twice"):
        trainer.fit(module)


class Breaking(Small):
    def __init__(self, rank: int) -> None:
        super().__init__(batch_size=2)
        self.rank = rank

    def training_step(self, batch, batch_idx):
        if self.global_rank == self.rank and batch_idx == 1:
            raise KeyError("broken in the step")
        return super().training_step(batch, batch_idx)


class Telling(Callback):
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_exception(self, trainer, pl_module, exception):
        path = os.path.join(self.folder, f"{type(exception).__name__}-{trainer.global_rank}-{trainer.global_step}")
        open(path, "w").close()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_in_one_process_is_told_there_and_raised_here(rank, tmp_path):
    trainer = Trainer(
        **{**QUIET, "devices": 2, "strategy": "ddp_fork", "max_epochs": 1, "callbacks": [Telling(str(tmp_path))]}
    )
    with pytest.raises(KeyError, match="broken in the step") as caught:
        trainer.fit(Breaking(rank))
    assert f"local rank {rank} failed" in str(caught.value.__cause__)
    assert trainer.interrupted
    assert (tmp_path / f"KeyError-{rank}-1").exists()


class Plateau(Small):
    """Watches a value that falls on rank 0 and rises on rank 1."""

    def __init__(self, sync: bool = False, only_rank_0: bool = False, nan: bool = False) -> None:
        super().__init__(batch_size=4)
        self.sync, self.only_rank_0, self.nan, self.rates = sync, only_rank_0, nan, []

    def on_train_epoch_end(self):
        rank, epoch = dist.get_rank(), float("nan") if self.nan else float(self.current_epoch)
        if not (self.only_rank_0 and rank):
            self.log("watched", epoch * 3 if rank else -epoch, sync_dist=self.sync, rank_zero_only=self.only_rank_0)

    def on_train_epoch_start(self):
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "watched"}}


@world_size(2, connect=False)
def test_a_plateau_is_one_for_all_ranks():
    # The mean over ranks rises, and what rank 0 alone has falls.
    for arguments, rates, num_warnings in (
        ({}, [1.0, 1.0, 0.1], 1),
        ({"sync": True}, [1.0, 1.0, 0.1], 0),
        ({"only_rank_0": True}, [1.0, 1.0, 1.0], 1),
        ({"nan": True}, [1.0, 0.1, 0.01], 0),
    ):
        module = Plateau(**arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            in_rank(max_epochs=3).fit(module)
        assert module.rates == pytest.approx(rates), (arguments, module.rates)
        heard = [str(each.message) for each in caught if "is not the same on all ranks" in str(each.message)]
        assert len(heard) == (num_warnings if dist.get_rank() == 0 else 0), heard


class AnyLoader(Small):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    test_step = predict_step = validation_step


@world_size(2, connect=False)
def test_ranks_with_different_numbers_of_loaders_are_told_before_the_first_batch():
    loaders = [loader(4)] * (1 + int(os.environ["RANK"]))
    for method in ("fit", "validate", "test", "predict"):
        with pytest.raises(ValueError, match=r"must give as many loaders .*, received \[1, 2\] in the order of ranks"):
            data = {"val_dataloaders": loaders} if method == "fit" else {"dataloaders": loaders}
            getattr(in_rank(), method)(AnyLoader(batch_size=4), **data)


@world_size(2, connect=False)
def test_one_rank_may_have_a_trainer_for_itself():
    os.environ["TORCHELASTIC_RUN_ID"] = "started by torchrun"
    with pytest.raises(ValueError, match="must be the 2 processes that torchrun started"):
        alone(devices="auto")
    assert alone(strategy="single_device").world_size == 1
    if os.environ["RANK"] == "0":
        with pytest.warns(UserWarning, match="This process works for itself"):
            (result,) = alone().test(Small(batch_size=4), loader(4), verbose=False)
        assert "val_loss" in result
    module, trainer = Small(batch_size=4), in_rank(max_epochs=1)
    trainer.fit(module)
    if dist.get_rank() == 0:
        side = alone()
        (result,) = side.test(module, loader(4), verbose=False)
        assert side.world_size == 1 and "val_loss" in result
        alone(max_epochs=1).fit(Small(batch_size=4))
    dist.barrier()
    (result,) = trainer.test(module, loader(4), verbose=False)
    assert "val_loss" in result
