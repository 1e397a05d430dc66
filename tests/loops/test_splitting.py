"""Batches that do not fit into memory go through in parts, and the run is that of whole batches."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.callbacks import GradientAccumulationScheduler
from levin.loops.splitting import check_splitting, num_samples
from levin.strategies import FSDPStrategy
from levin.strategies.microbatches import split
from tests.distributed import world_size

QUIET: dict[str, Any] = dict(
    accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    enable_model_summary=False,
)  # fmt: skip


class Net(LightningModule):
    """Is out of memory for more samples than ``room``, ``where`` it says."""

    def __init__(self, room: int = 100, where: str = "forward") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        self.room, self.where = room, where
        self.mean = torchmetrics.MeanMetric()
        self.register_buffer("seen", torch.zeros(()))
        self.sizes: list[int] = []
        self.outputs: list[Any] = []
        self.means: list[float] = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        self.seen += len(x)
        loss = ((self.layers(x) - y) ** 2).mean()
        self.mean.update(y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("most", y.max(), on_epoch=True, on_step=False, reduce_fx="max")
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        if len(x) > self.room:
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            loss.register_hook(self.fail)
        return {"loss": loss, "x": x}

    def fail(self, gradient):
        self.layers[2].weight.grad = torch.ones_like(self.layers[2].weight)  # what had come so far
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.outputs.append((outputs["loss"].item(), outputs["x"].tolist() == batch[0].tolist()))

    def on_train_epoch_end(self):
        if self.mean.weight > 0:
            self.means.append(self.mean.compute().item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def data(size: int = 10, num: int = 40) -> DataLoader:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(num, 6, generator=drawn, dtype=torch.float64)
    return DataLoader(list(zip(x, x.sum(1, keepdim=True))), batch_size=size)


def fit(module: LightningModule, loader: DataLoader | None = None, **settings: Any) -> Trainer:
    trainer = Trainer(**{**QUIET, "max_epochs": 2, **settings})
    trainer.fit(module, data() if loader is None else loader)
    return trainer


def assert_same(module: Net, trainer: Trainer, whole: Net, plain: Trainer) -> None:
    torch.testing.assert_close(module.state_dict(), whole.state_dict(), rtol=1e-10, atol=1e-10)
    assert trainer.global_step == plain.global_step
    torch.testing.assert_close(dict(trainer.callback_metrics), dict(plain.callback_metrics), rtol=1e-6, atol=1e-6)
    assert module.means == pytest.approx(whole.means)
    for (loss, has_samples), (other, _) in zip(module.outputs, whole.outputs, strict=True):
        assert loss == pytest.approx(other) and has_samples


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("room", [100, 6, 3, 1])
def test_a_run_in_parts_is_that_of_whole_batches(room, where, caplog):
    caplog.set_level(logging.INFO, "levin")
    whole, module = Net(), Net(room, where)
    plain = fit(whole, gradient_clip_val=0.5)
    trainer = fit(module, accumulate_grad_batches="auto", gradient_clip_val=0.5)
    assert trainer.accumulate_grad_batches == 1
    assert_same(module, trainer, whole, plain)
    tried = {100: [10], 6: [10, 5, 5], 3: [10, 5, 3, 3, 3, 1], 1: [10, 5, 3, 2, *[1] * 10]}[room]
    # What fits is tried again in each batch that follows.
    again = {100: [10], 6: [5, 5], 3: [3, 3, 3, 1], 1: [1] * 10}[room]
    assert module.sizes == tried + again * 7
    assert ("Batches go through in parts" in caplog.text) == (room < 10)


def test_steps_of_several_batches_in_parts_are_those_of_whole_batches():
    whole, module = Net(), Net(3)
    plain = fit(whole, callbacks=GradientAccumulationScheduler({0: 3}))
    trainer = fit(module, accumulate_grad_batches="auto", callbacks=GradientAccumulationScheduler({0: 3}))
    assert trainer.global_step == 4
    assert_same(module, trainer, whole, plain)


def test_a_run_that_goes_on_splits_as_before(tmp_path):
    unbroken = Net(3)
    fit(unbroken, accumulate_grad_batches="auto", max_epochs=3)
    first = fit(Net(3), accumulate_grad_batches="auto", max_epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    module = Net(3)
    Trainer(**QUIET, max_epochs=3, accumulate_grad_batches="auto").fit(module, data(), ckpt_path=tmp_path / "a.ckpt")
    assert module.sizes == [3, 3, 3, 1] * 8
    torch.testing.assert_close(module.state_dict(), unbroken.state_dict(), rtol=0, atol=0)


def test_weights_of_the_user_count_in_parts():
    class Weighted(Net):
        def training_step(self, batch, batch_idx):
            x, y = batch
            if len(x) > self.room:
                raise MemoryError
            tokens = (y > 0).sum()
            loss = ((self.layers(x) - y) ** 2 * (y > 0)).sum() / tokens.clamp(min=1)
            return {"loss": loss, "weight": tokens, "x": x}

    whole, module = Weighted(), Weighted(4)
    assert_same(module, fit(module, accumulate_grad_batches="auto"), whole, fit(whole))


@world_size(2, connect=False)
def test_one_of_two_ranks_splits():
    whole = Net()
    plain = Trainer(**{**QUIET, "devices": 2, "strategy": "ddp"}, max_epochs=2)
    plain.fit(whole, data())
    module = Net(3 if plain.global_rank else 100, "backward")
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": "ddp"}, max_epochs=2, accumulate_grad_batches="auto")
    trainer.fit(module, data())
    assert len(module.sizes) == (2 + 4 * 4 if plain.global_rank else 4)
    assert_same(module, trainer, whole, plain)


def test_where_not_even_one_sample_fits_the_error_says_what_holds_the_memory():
    with pytest.raises(torch.OutOfMemoryError, match=r"parameters hold 0\.00 GiB(.|\n)*the batch"):
        fit(Net(0), accumulate_grad_batches="auto")


def test_another_error_is_raised_at_once():
    class Wrong(Net):
        def training_step(self, batch, batch_idx):
            self.sizes.append(len(batch[0]))
            raise RuntimeError("shapes")

    module = Wrong()
    with pytest.raises(RuntimeError, match="shapes"):
        fit(module, accumulate_grad_batches="auto")
    assert module.sizes == [10]


def manual(module: Net) -> dict[str, Any]:
    module.automatic_optimization = False
    return {}


def own_backward(module: Net) -> dict[str, Any]:
    module.backward = lambda loss: loss.backward()
    return {}


def hook(module: Net) -> dict[str, Any]:
    module.layers[0].weight.register_hook(lambda gradient: None)
    return {}


def lbfgs(module: Net) -> dict[str, Any]:
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())
    return {}


def iterator(module: Net) -> dict[str, Any]:
    module.training_step = lambda dataloader_iter: None
    return {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (manual, r"not possible in manual optimization, received Trainer\(accumulate_grad_batches='auto'\)"),
        (own_backward, "a `backward` of the module's own. Use a number"),
        (hook, "gradient hooks on parameters"),
        (lbfgs, "LBFGS"),
        (iterator, "dataloader_iter"),
        (lambda module: {"compile": True}, "compile='blocks' is possible"),
    ],
)
def test_what_needs_whole_batches_is_refused(change, message):
    module = Net()
    settings = change(module)
    with pytest.raises(ValueError, match=message):
        fit(module, accumulate_grad_batches="auto", **settings)


def test_a_batch_without_a_common_dimension_is_not_split():
    assert num_samples([torch.zeros(4, 2), torch.zeros(3)]) == num_samples("text") == 1
    module = Net(2)
    loader = DataLoader([(torch.zeros(4, 6).double(), torch.zeros(3, 1).double())], batch_size=None)
    module.training_step = own = lambda batch, batch_idx: Net.training_step(
        module, (batch[0], batch[0][:, :1]), batch_idx
    )
    with pytest.raises(torch.OutOfMemoryError):
        fit(module, loader, accumulate_grad_batches="auto")
    assert module.training_step is own
    assert module.sizes == [4]


def test_batches_of_all_kinds_are_cut():
    @dataclasses.dataclass
    class Sample:
        x: torch.Tensor
        names: list[str]

    first, second = split(Sample(torch.arange(3), ["a", "b", "c"]), 2, 3)
    assert (first.x.tolist(), first.names, second.x.tolist(), second.names) == ([0, 1], ["a", "b"], [2], ["c"])


PROGRAM = """
import resource, sys, torch, levin
from torch import nn

class Net(levin.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 2**20), nn.Tanh(), nn.Linear(2**20, 1))
        self.sizes = []
    def training_step(self, batch, batch_idx):
        self.sizes.append(len(batch))
        return self.layers(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

torch.set_num_threads(1)
drawn = torch.Generator().manual_seed(0)
loader = torch.utils.data.DataLoader(torch.randn(128, 4, generator=drawn), batch_size=64)
trainer = levin.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, accumulate_grad_batches=eval(sys.argv[1]))
model = Net()
levin.Trainer(accelerator="cpu", fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False).fit(
    model, loader)  # all that is imported late is there now
model = Net()
if sys.argv[1] != "1" or sys.argv[2] == "full":
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (450 << 20),) * 2)
trainer.fit(model, loader)
print(model.sizes, sum(p.double().sum().item() for p in model.parameters()))
"""


def run_program(value: str, memory: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, value, memory], capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_memory_that_is_really_full_is_done_with_in_parts():
    whole, full, split_up = run_program("1", "free"), run_program("1", "full"), run_program("'auto'", "full")
    assert whole.returncode == 0 and split_up.returncode == 0, whole.stderr + split_up.stderr
    assert full.returncode != 0 and "can't allocate memory" in full.stderr and "parameters hold" in full.stderr
    sizes, total = split_up.stdout.rsplit(" ", 1)
    assert sizes.startswith("[64, 32") and sizes.count("64") == 1
    assert float(total) == pytest.approx(float(whole.stdout.rsplit(" ", 1)[1]), abs=1e-3)


def test_fsdp_is_refused():
    trainer = fit(Net())
    trainer.run.engine.strategy = trainer.run.strategy = FSDPStrategy()
    with pytest.raises(ValueError, match="FSDPStrategy, whose processes meet in forward"):
        check_splitting(trainer.run)


def test_the_backward_pass_of_a_part_is_outside_of_autocast():
    seen: list[bool] = []

    class Looks(Net):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            output["loss"].register_hook(lambda gradient: seen.append(torch.is_autocast_enabled("cpu")))
            return output

    fit(Looks(3), accumulate_grad_batches="auto", precision="bf16-mixed", max_epochs=1)
    assert seen and not any(seen)


@pytest.mark.parametrize("room", [100, 3])
def test_a_value_is_logged_as_it_was_when_it_was_logged(room):
    class Counts(Net):
        def training_step(self, batch, batch_idx):
            count = torch.ones(())
            self.log("count", count, on_step=False, on_epoch=True)
            count += 1
            return super().training_step(batch, batch_idx)

    assert fit(Counts(room), accumulate_grad_batches="auto").callback_metrics["count"] == 1
