"""Stages of a pipeline under the Trainer, on two and four ranks: what comes out is what one device gives."""

from __future__ import annotations

import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.data import DataLoader, DistributedSampler

from levin import Fabric, Trainer
from levin.checkpoint import consolidate
from levin.strategies import ModelParallelStrategy
from levin.strategies.microbatches import merge_logged, size_of, split
from levin.strategies.stages import PipelinePlan, cut, layers_of
from tests.distributed import world_size
from tests.strategies.small import QUIET, WithLosses, dataset
from tests.strategies.test_fsdp import Block, alone

pytestmark = pytest.mark.skipif(
    not hasattr(PipelineStage, "_warmup_forward_vote"), reason="torch's pipelines do not run over Gloo in this version"
)
DEPTH = 3
SLOW = pytest.mark.slow


class Deep(WithLosses):
    """Layers one after another, of different widths at the cuts."""

    def __init__(self, batch_size: int = 8, size: int = 32) -> None:
        super().__init__()
        self.batch_size, self.size = batch_size, size
        torch.manual_seed(1)
        self.net = nn.Sequential(
            nn.Linear(4, 6), nn.Tanh(), nn.Sequential(*(Block(6) for _ in range(DEPTH))), nn.Linear(6, 2)
        )
        self.num_seen: int = 0

    def training_step(self, batch, batch_idx):
        x, index = batch
        loss = (self.net(x * 2) - index[:, None] / 32).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.num_seen += len(x)
        self.log("largest", index.max().float(), reduce_fx="max")
        return loss

    def configure_optimizers(self):
        # Not Adam, to which the size of gradients makes no difference.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(dataset(self.size), shuffle=False, **ranks)
        return DataLoader(dataset(self.size), batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(dataset(7), batch_size=3)


def pipelined(size: int = 2, data: int = 1, **arguments) -> ModelParallelStrategy:
    return ModelParallelStrategy(data, 1, pipeline_parallel_size=size, **arguments)


def in_rank(strategy, devices: int = 2, **settings) -> Trainer:
    return Trainer(
        strategy=strategy, devices=devices, **{"max_epochs": 2, "enable_checkpointing": False, **QUIET, **settings}
    )


def own(module: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.full_tensor().detach() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in module.named_parameters()
    }


def assert_part_of(module: nn.Module, reference: nn.Module) -> None:
    expected = own(reference)
    found = own(module)
    assert 0 < len(found) < len(expected)
    torch.testing.assert_close(found, {name: expected[name] for name in found})


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        pytest.param({}, {}, marks=SLOW),
        pytest.param({"pipeline_schedule": "gpipe", "num_microbatches": 8}, {"gradient_clip_val": 0.05}, marks=SLOW),
        ({"pipeline_split": ["net.2.1"]}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}),
        (
            {"pipeline_schedule": "interleaved", "num_microbatches": 4},
            {"limit_train_batches": 3, "accumulate_grad_batches": 2},
        ),
    ],
    ids=["1f1b", "gpipe, clipped", "named, accumulated", "interleaved"],
)
@world_size(2, connect=False, timeout_s=120)
def test_two_stages_are_one_device(arguments, settings):
    module, reference = Deep(), Deep()
    trainer, single = in_rank(pipelined(**arguments), **settings), alone(**settings)
    trainer.fit(module)
    single.fit(reference)
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses))
    assert_part_of(module, reference)
    assert module.num_seen == (reference.num_seen if trainer.global_rank == 1 else 0)
    metrics = dict(single.callback_metrics)
    torch.testing.assert_close(dict(trainer.callback_metrics), metrics)
    assert metrics["largest"] == (31 if "limit_train_batches" not in settings else 23)
    found, expected = (
        trainer.predict(module, module.val_dataloader()),
        single.predict(reference, module.val_dataloader()),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"pipeline_schedule": "interleaved"},
        pytest.param({}, marks=SLOW),
        pytest.param({"copies": 2, "pipeline_schedule": "gpipe"}, marks=SLOW),
    ],
    ids=["interleaved", "sharded", "copies"],
)
@world_size(4, connect=False, timeout_s=180)
def test_stages_with_data_parallel_processes_are_one_device(tmp_path, arguments):
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    settings = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    # The last batches are smaller, and of a validation one process has fewer.
    module, reference = Deep(4, size=30), Deep(8, size=30)
    trainer = in_rank(pipelined(data=2, **arguments), 4, **settings)
    trainer.fit(module)
    assert trainer.strategy.data_parallel.size == 2 and any(isinstance(p, DTensor) for p in module.parameters())
    single = alone(**settings)
    single.fit(reference)
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses))
    assert_part_of(module, reference)
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], single.callback_metrics["val_loss"])
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    torch.testing.assert_close(dict(consolidate(path)["state_dict"]), own(reference))


@SLOW
@world_size(4, connect=False, timeout_s=120)
def test_stages_whose_layers_are_shared_are_one_device():
    plan = {"net.2.*.layer": ColwiseParallel(output_layouts=Replicate())}
    module, reference = Deep(), Deep()
    in_rank(ModelParallelStrategy(1, 2, plan=plan, pipeline_parallel_size=2), 4, gradient_clip_val=0.05).fit(module)
    assert any(isinstance(parameter, DTensor) for parameter in module.parameters())
    alone(gradient_clip_val=0.05).fit(reference)
    assert_part_of(module, reference)


class Noisy(Deep):
    """Draws random numbers before the layers, in them, and after them."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        self.net[1] = nn.Dropout(0.5)
        self.path = ""
        self.noise: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        noise = torch.randn(len(batch[0]), 4)
        self.noise.append(noise.sum())
        loss = (self.net(batch[0] + noise)[:, 0] - noise.sum(1)).pow(2).mean()
        self.log("loss", loss, on_epoch=True)
        return {"loss": loss, "weight": len(batch[0])}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.path and self.trainer.global_step == 1 and batch_idx == 2:
            self.trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("data", [pytest.param(1, marks=SLOW), 2])
@pytest.mark.parametrize("saves_folders", [pytest.param(True, marks=SLOW), False], ids=["folder", "file"])
@world_size(4, connect=False, timeout_s=120)
def test_an_open_window_goes_on_exactly(tmp_path, saves_folders, data):
    def run(path, ckpt_path=None):
        module = Noisy(8 // data)
        module.path = path
        strategy = pipelined(4 // data, data, save_distributed_checkpoint=saves_folders)
        trainer = in_rank(strategy, 4, accumulate_grad_batches=2)
        trainer.fit(module, ckpt_path=ckpt_path)
        return own(module), dict(trainer.callback_metrics), module.noise

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    path = str(tmp_path / "open.ckpt")
    weights, metrics, noise = run(path)
    resumed, metrics_then, noise_then = run("", path)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)
    torch.testing.assert_close(metrics_then, metrics, rtol=0, atol=0)
    torch.testing.assert_close(noise_then, noise[len(noise) - len(noise_then) :], rtol=0, atol=0)


@pytest.mark.parametrize("saves_folders", [True, pytest.param(False, marks=SLOW)], ids=["folder", "file"])
@world_size(2, connect=False, timeout_s=120)
def test_a_checkpoint_goes_on_with_one_device_and_back(tmp_path, saves_folders):
    warnings.filterwarnings("ignore", "The checkpoint was saved by")
    module, reference = Deep(), Deep()
    first = in_rank(pipelined(save_distributed_checkpoint=saves_folders), max_epochs=1)
    first.fit(module)
    path, back = str(tmp_path / "stages.ckpt"), str(tmp_path / f"one_{first.global_rank}.ckpt")
    first.save_checkpoint(path)
    alone(max_epochs=3).fit(reference)
    single = alone(max_epochs=2)
    on_one = Deep()
    single.fit(on_one, ckpt_path=path)
    single.save_checkpoint(back)
    last = Deep()
    in_rank(pipelined(pipeline_schedule="interleaved"), max_epochs=3).fit(last, ckpt_path=back)
    assert_part_of(last, reference)


def tied() -> Deep:
    module = Deep()
    module.net[2][2].layer.weight = module.net[2][0].layer.weight
    return module


def with_more(**parts: nn.Module) -> Deep:
    module = Deep()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def normalized() -> Deep:
    module = Deep()
    module.net[1] = nn.BatchNorm1d(6)
    return module


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Deep, {"pipeline_split": ["net.9"]}, r"names 'net.9', which is no layer.* net.0, net.1, net.2.0"),
        (Deep, {"pipeline_split": ["net.0"]}, r"and not the first, received \['net.0'\]"),
        (tied, {}, r"net.2.0.layer.weight and net.2.2.layer.weight are one parameter, and would be in stages 0 and 1"),
        (normalized, {}, "net.1 normalizes over the batch"),
        (lambda: with_more(head=nn.Linear(2, 2)), {}, "Deep has net, and leaves out head.weight, head.bias"),
        (lambda: with_more(net=Plain()), {}, "Deep has none"),
        (lambda: with_more(net=nn.Sequential(nn.Linear(4, 2), nn.Tanh())), {}, "2 stages need as many layers"),
    ],
    ids=["unknown", "first", "tied", "batch norm", "outside", "no chain", "too few"],
)
def test_modules_that_cannot_be_cut_are_told_before_a_process_starts(monkeypatch, make, arguments, message):
    trainer = in_rank(pipelined(**arguments))
    monkeypatch.setattr(trainer.strategy.launcher, "launch", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(ValueError, match=message):
        trainer.fit(make())


def test_weights_may_be_shared_within_a_stage():
    module = tied()
    layers = layers_of(module.net, "net")
    stages = cut(layers, PipelinePlan(2, split=["net.3"]))
    assert stages == [["net.0", "net.1", "net.2.0", "net.2.1", "net.2.2"], ["net.3"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "pipeline_parallel_size must be an int >= 1, received 0"),
        ({"num_microbatches": 0}, "num_microbatches must be an int >= 1, received 0"),
        ({"pipeline_schedule": "2f2b"}, "must be one of 'gpipe', '1f1b', 'interleaved', received '2f2b'"),
        ({"num_microbatches": 3}, "must be a multiple of pipeline_parallel_size=2 .* received 3. Use 4"),
        ({"pipeline_split": "net.2"}, "must name the layer that each stage but the first begins with"),
        ({"pipeline_split": ["a", "b"]}, r"received \['a', 'b'\]"),
        ({"pipeline_split": ["a", "b", "c"]}, "makes 4 stages for 2 processes.* Use pipeline_schedule='interleaved'"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipelined(**arguments)


def test_a_scaled_loss_is_refused():
    with pytest.raises(ValueError, match="precision='16-mixed' scales the loss .* Use 'bf16-mixed'"):
        in_rank(pipelined(), precision="16-mixed")


def test_a_torch_whose_stages_do_not_find_each_other_is_refused(monkeypatch):
    monkeypatch.delattr(PipelineStage, "_warmup_forward_vote")
    with pytest.raises(ValueError, match=r"A pipeline on the CPU needs a newer torch .*received torch"):
        in_rank(pipelined())


def test_sizes_that_do_not_multiply_are_refused():
    with pytest.raises(
        ValueError, match=r"tensor_parallel_size=1 times pipeline_parallel_size=2 must be .* which is 3"
    ):
        in_rank(pipelined(), 3)


class Wrong(Deep):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch, batch_idx):
        if self.kind == "not called":
            return batch[0].sum()
        if self.kind == "by name":
            return self.net(input=batch[0]).sum()
        loss = self.net(batch[0]).sum()
        if self.kind == "metric":
            self.log("parts", nn.Linear(1, 1))
        return {"twice": lambda: self.net(batch[0]).sum() + loss, "no loss": lambda: None, "metric": lambda: loss}[
            self.kind
        ]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not called", "`Wrong.training_step` did not call the layers"),
        pytest.param("by name", "take their input by position, received input", marks=SLOW),
        pytest.param("twice", "called the layers of a pipeline twice", marks=SLOW),
        pytest.param("no loss", "must return the loss, or a dict .* received None", marks=SLOW),
        ("metric", "received Linear, which is updated in the last stage alone"),
    ],
)
@world_size(2, connect=False)
def test_steps_that_cannot_be_run_in_parts(kind, message):
    trainer = in_rank(pipelined())
    has_error = trainer.global_rank == (kind in ("twice", "no loss", "metric"))
    # The other one waits for it, and is told so by the connection, or by torch.
    with pytest.raises(ValueError if has_error else RuntimeError, match=message if has_error else None):
        trainer.fit(Wrong(kind))


def test_manual_optimization_is_refused_before_a_process_starts():
    module = Deep()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="Deep has automatic_optimization=False. Use automatic optimization"):
        in_rank(pipelined()).fit(module)


@world_size(2)
def test_fabric_is_refused():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="mesh:pp=2")
    fabric.launch()
    with pytest.raises(ValueError, match="received a Sequential in Fabric. Use the Trainer"):
        fabric.setup(Deep().net)


@world_size(2, connect=False)
def test_a_cut_module_is_not_cut_again():
    module = Deep()
    in_rank(pipelined(), max_epochs=1).fit(module)
    with pytest.raises(RuntimeError, match="were called outside of `training_step` with gradients"):
        module.net(torch.ones(2, 4))
    with pytest.raises(ValueError, match="Deep.net was cut into stages before"):
        in_rank(pipelined()).fit(module)


def test_what_parts_log_is_one_call():
    parts = [
        [{"name": "a", "value": torch.tensor([1.0]), "batch_size": 1}, {"name": "b", "value": 2, "reduce_fx": "sum"}],
        [{"name": "a", "value": torch.tensor(4.0), "batch_size": 3}, {"name": "b", "value": 3, "reduce_fx": "sum"}],
    ]
    merged = merge_logged(parts)
    assert [call["name"] for call in merged] == ["a", "b"]
    assert merged[0]["value"] == 3.25 and merged[0]["batch_size"] == 4
    assert merged[1] == {"name": "b", "value": 5.0, "reduce_fx": "sum"}
    with pytest.raises(ValueError, match="received Linear, which is updated in the last stage alone"):
        merge_logged([[{"name": "a", "value": nn.Linear(1, 1)}]])
    with pytest.raises(ValueError, match="'mean', 'sum', 'min' or 'max'"):
        merge_logged([[{"name": "a", "value": 1.0, "reduce_fx": "medium"}]])


def test_batches_are_cut_along_their_samples():
    Pair = namedtuple("Pair", "x y")
    batch = {
        "pair": Pair(torch.arange(4), torch.arange(8).reshape(4, 2)),
        "names": list("abcd"),
        "scale": torch.tensor(2.0),
    }
    assert size_of(batch) == 4
    first, second = split(batch, 2, 4)
    assert first["pair"].x.tolist() == [0, 1] and second["pair"].y.tolist() == [[4, 5], [6, 7]]
    assert (first["names"], second["names"], second["scale"]) == (["a", "b"], ["c", "d"], 2.0)
    with pytest.raises(ValueError, match="received a batch without any: list"):
        size_of(["a", torch.tensor(1)])
