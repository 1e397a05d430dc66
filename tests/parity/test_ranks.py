"""The same user code on two ranks, under Lightning and under levin: what is logged and which samples each rank sees."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, TensorDataset

from tests.distributed import world_size
from tests.parity.both import levin, lightning

LOGGED = ["mean", "sum", "min", "max"]


def data(size: int = 16) -> TensorDataset:
    return TensorDataset(torch.arange(float(size)).unsqueeze(1))


def trainer_of(framework, **kwargs):
    defaults = {
        "accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, "logger": False, "barebones": False,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
    }  # fmt: skip
    return framework.Trainer(**{**defaults, **kwargs})


def logging_module(framework, seen: dict):
    class Logging(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            value = batch[0].mean() + self.global_rank
            for name in LOGGED:
                for on_step, on_epoch in ((True, False), (False, True), (True, True)):
                    key = f"{name}-{int(on_step)}{int(on_epoch)}"
                    self.log(key, value, on_step=on_step, on_epoch=on_epoch, reduce_fx=name, sync_dist=True)
            self.log("number", float(batch_idx + 10 * self.global_rank), on_step=True, on_epoch=True, sync_dist=True)
            self.log("own", value, on_step=True, on_epoch=True, sync_dist_group=None)
            if self.global_rank == 0:
                self.log("zero", value, on_step=True, on_epoch=True, rank_zero_only=True)
            self.log("alone", value, on_step=True, on_epoch=True, sync_dist=True, sync_dist_group=self.alone)
            return self.net(batch[0]).mean()

        def on_train_batch_end(self, outputs, batch, batch_idx):
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            seen.setdefault("steps", []).append({name: metrics[name] for name in metrics if "epoch" not in name})

        def validation_step(self, batch, batch_idx):
            for name in LOGGED:
                self.log(f"val-{name}", batch[0].mean(), reduce_fx=name, sync_dist=True, batch_size=len(batch[0]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Logging()


@world_size(2, timeout_s=150)
def test_every_reduction_over_ranks():
    groups = [dist.new_group([index]) for index in range(2)]
    found = {}
    for framework in (lightning(), levin()):
        seen: dict = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = logging_module(framework, seen)
            module.alone = groups[dist.get_rank()]
            trainer = trainer_of(framework)
            trainer.fit(module, DataLoader(data(), batch_size=3), DataLoader(data(), batch_size=2))
        found[framework.name] = (
            {name: float(value) for name, value in trainer.callback_metrics.items()},
            seen["steps"],
        )
    theirs, ours = found["lightning"], found["levin"]
    assert ours[0].keys() == theirs[0].keys()
    for name, value in theirs[0].items():
        torch.testing.assert_close(ours[0][name], value, msg=lambda text: f"{name}: {text}")
    for own, other in zip(ours[1], theirs[1], strict=True):
        # Lightning shows the value of the epoch so far under the plain name, levin too where both are logged.
        for name in other.keys() & own.keys():
            torch.testing.assert_close(own[name], other[name], msg=lambda text: f"{name}: {text}")


class Reversed(Sampler):
    """A sampler of the user's own."""

    def __init__(self, source) -> None:
        self.source = source

    def __iter__(self):
        return iter(range(len(self.source) - 1, -1, -1))

    def __len__(self) -> int:
        return len(self.source)


class OwnBatches(BatchSampler):
    """A batch sampler of a class of the user's own."""


def loaders() -> dict[str, DataLoader]:
    source = data()
    return {
        "in order": DataLoader(source, batch_size=2),
        "shuffled": DataLoader(source, batch_size=2, shuffle=True),
        "own sampler": DataLoader(source, batch_size=2, sampler=Reversed(source)),
        "own batches": DataLoader(source, batch_sampler=OwnBatches(SequentialSampler(source), 2, drop_last=True)),
        "distributed": DataLoader(
            source,
            batch_size=2,
            sampler=torch.utils.data.DistributedSampler(source, 2, int(os.environ["RANK"]), shuffle=False),
        ),
        "no batches": DataLoader(source, batch_size=None),
    }


def watching_module(framework, seen: list):
    class Watching(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            seen.append(("train", batch[0].flatten().tolist()))
            return self.net(batch[0].reshape(-1, 1)).mean()

        def validation_step(self, batch, batch_idx):
            seen.append(("val", batch[0].flatten().tolist()))

        def test_step(self, batch, batch_idx):
            seen.append(("test", batch[0].flatten().tolist()))

        def predict_step(self, batch, batch_idx):
            return batch[0].flatten().tolist()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Watching()


@world_size(2, timeout_s=150, connect=False)
def test_samplers_of_torch_over_a_part_of_the_data_are_split_and_replaced_by_all_of_it_in_lightning():
    data = torch.utils.data.TensorDataset(torch.arange(20.0))
    for framework, num_seen in ((lightning(), 10), (levin(), 3)):
        for make in (
            lambda: torch.utils.data.SequentialSampler(range(6)),
            lambda: torch.utils.data.RandomSampler(data, num_samples=6),
        ):
            seen: list = []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = trainer_of(framework, max_epochs=1)
                trainer.fit(watching_module(framework, seen), DataLoader(data, sampler=make()))
            assert sum(len(numbers) for _, numbers in seen) == num_seen


@world_size(2, timeout_s=150, connect=False)
def test_every_rank_sees_the_same_samples():
    found = {}
    for framework in (lightning(), levin()):
        found[framework.name] = runs = {}
        for name, loader in loaders().items():
            for is_split in (True, False):
                seen: list = []
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    torch.manual_seed(3)
                    trainer = trainer_of(framework, use_distributed_sampler=is_split, max_epochs=2)
                    module = watching_module(framework, seen)
                    trainer.fit(module, loader, loader)
                    sampler = type(trainer.train_dataloader.sampler).__name__
                    trainer.test(module, loader, verbose=False)
                    if name != "shuffled":
                        # Nobody predicts in random order; the orders differ.
                        seen.append(("predict", trainer.predict(module, loader)))
                runs[name, is_split] = seen, sampler
    for key, (seen, sampler) in found["lightning"].items():
        ours, own_sampler = found["levin"][key]
        if key == ("own sampler", True):
            # Lightning shuffles what the user's own sampler draws for training; here that keeps its order.
            trained = [numbers for kind, numbers in ours if kind == "train"]
            first = 15.0 - int(os.environ["RANK"])
            assert trained == 2 * [[first - 4 * step, first - 4 * step - 2] for step in range(4)]
            ours, seen = ([entry for entry in entries if entry[0] != "train"] for entries in (ours, seen))
        assert ours == seen, key
        if "own" not in key[0]:
            assert own_sampler == sampler, key


def searching_module(framework, losses: list):
    class Searching(framework.LightningModule):
        """Its loss falls with other rates on each rank."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.net, self.lr = nn.Linear(1, 1), 0.01

        def training_step(self, batch, batch_idx):
            loss = self.net(batch[0]).pow(2).mean()
            loss = loss + (0.1 * batch_idx if self.global_rank else -0.01 * batch_idx**2)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    return Searching()


@world_size(2, timeout_s=150)
def test_a_search_finds_one_rate_for_all_ranks(tmp_path):
    for framework in (lightning(), levin()):
        for is_callback in (True, False):
            losses: list = []
            module, arguments = searching_module(framework, losses), {"early_stop_threshold": 2.0}
            finder = framework.module.callbacks.LearningRateFinder(num_training_steps=20, **arguments)
            loader, callbacks = DataLoader(data(128), batch_size=2), [finder] if is_callback else []
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trainer = trainer_of(
                    framework, callbacks=callbacks, default_root_dir=tmp_path, enable_checkpointing=True
                )
                if is_callback:
                    trainer.fit(module, loader)
                    found = finder.optimal_lr
                else:
                    found = framework.module.tuner.Tuner(trainer).lr_find(module, loader, num_training=20, **arguments)
            everywhere: list = [None, None]
            dist.all_gather_object(everywhere, (module.lr, found.results, losses[0]))
            (rate, results, first), (other_rate, other_results, other_first) = everywhere
            assert rate == other_rate != 0.01
            assert results == other_results
            # Rank 0 decides there, the mean here, whose gradients the ranks step by.
            expected = first if framework.name == "lightning" else (first + other_first) / 2
            assert results["loss"][0] == pytest.approx(expected * (1 - 0.98) / (1 - 0.98**2))  # smoothed
