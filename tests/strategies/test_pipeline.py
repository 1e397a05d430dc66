"""Stages of a pipeline under the Trainer, on two and four ranks: what comes out is what one device gives."""

from __future__ import annotations

import inspect
import warnings
from collections import namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.utils.data import DataLoader, DistributedSampler

from levin import Fabric, Trainer
from levin.checkpoint import consolidate
from levin.strategies import ModelParallelStrategy
from levin.strategies.microbatches import merge_logged, size_of, split
from levin.strategies.pipeline import Pipeline, _Step
from levin.strategies.replay import ReachedError, Replay
from levin.strategies.stages import PipelinePlan, cut, layers_of
from levin.utilities.exceptions import MisconfigurationException
from tests.distributed import run_ranks, world_size
from tests.strategies.small import QUIET, WithLosses, dataset
from tests.strategies.test_fsdp import Block, alone

pipelines = pytest.mark.skipif(
    not hasattr(PipelineStage, "_warmup_forward_vote"), reason="torch's pipelines do not run over Gloo in this version"
)
pytestmark = pipelines
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


class Shrinking(Deep):
    """Changes its weights after each validation."""

    def on_train_epoch_end(self):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.9)


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
    module, reference = Shrinking(4, size=30), Shrinking(8, size=30)
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


class Attention(nn.Module):
    """A block of a transformer: what it is called with beside its input comes by name, and it returns two tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.up = nn.Linear(width, width)

    def forward(self, x, total, *, mask):
        x = x + self.attend(*[self.norm(x)] * 3, attn_mask=mask, need_weights=False)[0]
        return x + torch.tanh(self.up(x)), total + x.mean()


class Transformer(nn.Module):
    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.places = nn.Parameter(torch.randn(6, width))
        self.blocks = nn.ModuleList(Attention(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, tokens, *, causal=True):
        length = tokens.shape[1]
        x = self.embed(tokens) + self.places[:length]
        mask = torch.triu(torch.full((length, length), float("-inf"), device=x.device), 1) if causal else None
        total = x.new_zeros(())
        for block in self.blocks:
            x, total = block(x, total, mask=mask)
        return {"logits": self.head(self.norm(x)) * self.scale, "total": total.expand(len(tokens))}


def to_tokens(samples):
    """Return sequences of 4 or of 6 tokens, by turns."""
    x = (torch.stack([x for x, _ in samples]).abs() * 10).long() % 32
    return x if samples[0][1] // 8 % 2 else torch.cat([x, x[:, :2]], 1)


class General(Deep):
    """A transformer with a forward of its own, on sequences of several lengths."""

    def __init__(self, batch_size: int = 8, size: int = 32) -> None:
        super().__init__(batch_size, size)
        torch.manual_seed(2)
        self.net = Transformer()

    def training_step(self, batch, batch_idx):
        output = self.net(batch, causal=True)
        loss = nn.functional.cross_entropy(output["logits"].flatten(0, 1), batch.flatten())
        loss = loss + output["total"].mean() / 10
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def train_dataloader(self):
        loader = super().train_dataloader()
        return DataLoader(loader.dataset, self.batch_size, sampler=loader.sampler, collate_fn=to_tokens)

    def val_dataloader(self):
        return DataLoader(dataset(7), batch_size=3, collate_fn=to_tokens)

    def validation_step(self, batch, batch_idx):
        output = self.net(batch)
        self.log("val_loss", output["logits"].pow(2).mean() + output["total"].mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self.net(tokens=batch, causal=False)


class Apart(General):
    """The same with layers that the LightningModule calls itself."""

    def __init__(self, batch_size: int = 8, size: int = 32) -> None:
        super().__init__(batch_size, size)
        for name, part in list(self.net.named_children()):
            setattr(self, name, part)
        self.places, self.scale = self.net.places, torch.tensor(0.5)
        del self.net
        self.net = self.__call__

    forward = Transformer.forward


@pytest.mark.parametrize(
    ("kind", "arguments", "settings"),
    [
        (General, {"pipeline_split": ["net.blocks.1"]}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
        pytest.param(
            General,
            {"pipeline_schedule": "interleaved", "pipeline_split": [f"net.blocks.{place}" for place in range(3)]},
            {},
            marks=SLOW,
        ),
        pytest.param(General, {}, {"precision": "bf16-mixed"}, marks=SLOW),
        pytest.param(Apart, {}, {"compile": {"backend": "eager"}}, marks=SLOW),
    ],
    ids=["named", "interleaved", "bf16", "apart, compiled"],
)
@world_size(2, connect=False, timeout_s=180)
def test_a_forward_of_its_own_is_one_device(tmp_path, kind, arguments, settings):
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # of torch.compile
    module, reference = kind(), kind()
    # An interleaved process has no parameters beside its layers.
    if arguments.get("pipeline_schedule") == "interleaved":
        for one in (module, reference):
            places = one.net.places.detach()
            del one.net.places
            one.net.register_buffer("places", places)
    trainer, single = in_rank(pipelined(**arguments), **settings), alone(**settings)
    trainer.fit(module)
    single.fit(reference)
    close = {"rtol": 0.02, "atol": 0.01} if settings.get("precision") == "bf16-mixed" else {}
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses), **close)
    expected, found = own(reference), own(module)
    assert 0 < len(found) < len(expected)
    torch.testing.assert_close(found, {name: expected[name] for name in found}, **close)
    torch.testing.assert_close(dict(trainer.callback_metrics), dict(single.callback_metrics), **close)
    predicted = trainer.predict(module, module.val_dataloader())
    torch.testing.assert_close(predicted, single.predict(reference, module.val_dataloader()), **close)
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    torch.testing.assert_close(dict(consolidate(path)["state_dict"]), reference.state_dict(), **close)


class Tied(General):
    """Its head is its embedding, as in most language models; every other batch leaves the head out."""

    def __init__(self, batch_size: int = 8, size: int = 32) -> None:
        super().__init__(batch_size, size)
        self.net.head.weight = self.net.embed.weight

    def training_step(self, batch, batch_idx):
        return self.net(batch)["total"].mean() if batch_idx % 2 else super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, eps=1e-3)


@pytest.mark.parametrize(
    ("devices", "arguments"),
    [
        (2, {"save_distributed_checkpoint": False}),
        (2, {}),
        pytest.param(4, {"data": 2, "save_distributed_checkpoint": False}, marks=SLOW),
        pytest.param(4, {"data": 2}, marks=SLOW),
        pytest.param(4, {"data": 2, "copies": 2}, marks=SLOW),
        pytest.param(4, {"size": 4, "pipeline_split": [f"net.blocks.{place}" for place in range(3)]}, marks=SLOW),
    ],
    ids=["file", "folder", "sharded, file", "sharded, folder", "copies", "four"],
)
def test_weights_that_stages_share_are_those_of_one_device(tmp_path, devices, arguments):
    run_ranks(train_tied, devices, {"folder": tmp_path, "devices": devices, "arguments": arguments}, 180, connect=False)


def train_tied(folder, devices, arguments):
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    warnings.filterwarnings("ignore", "The checkpoint was saved by")
    data = arguments.pop("data", 1)
    settings = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    module, reference = Tied(8 // data), Tied()
    trainer, single = in_rank(pipelined(data=data, **arguments), devices, **settings), alone(**settings)
    trainer.fit(module)
    single.fit(reference)
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses))
    assert_part_of(module, reference)
    is_first, is_last = trainer.strategy._pipeline.is_first, trainer.strategy._pipeline.is_last
    assert ("net.embed.weight" in own(module)) == (is_first or is_last)
    path, back = str(folder / "tied.ckpt"), str(folder / f"one_{trainer.global_rank}.ckpt")
    trainer.save_checkpoint(path)
    if arguments.get("save_distributed_checkpoint", True):
        saved = consolidate(path)["state_dict"]
    else:
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert list(saved) == list(reference.state_dict())
        assert saved["net.head.weight"].data_ptr() == saved["net.embed.weight"].data_ptr(), "saved once"
    torch.testing.assert_close(dict(saved), dict(reference.state_dict()))
    # On one device, back, and on from where it was.
    one = Tied()
    on_one = alone(max_epochs=3, **settings)
    on_one.fit(one, ckpt_path=path)
    again = Tied(8 // data)
    resumed = in_rank(pipelined(data=data, **arguments), devices, max_epochs=3, **settings)
    resumed.fit(again, ckpt_path=path)
    assert_part_of(again, one)
    on_one.save_checkpoint(back)
    last, expected = Tied(8 // data), Tied()
    in_rank(pipelined(data=data, **arguments), devices, max_epochs=4, **settings).fit(last, ckpt_path=back)
    alone(max_epochs=4, **settings).fit(expected, ckpt_path=back)
    assert_part_of(last, expected)


class Counting(nn.Module):
    """A block that draws random numbers and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("num_calls", torch.tensor(0))
        self.register_buffer("drawn", torch.zeros(3))

    def forward(self, x):
        if self.training:
            self.num_calls += 1
            self.drawn = torch.rand(3)
        return self.layer(x)


@world_size(2, connect=False, timeout_s=120)
def test_each_stage_draws_numbers_and_keeps_buffers_of_its_own(tmp_path):
    module = Deep()
    module.net = nn.Sequential(nn.Linear(4, 6), nn.Sequential(Counting(), Counting()), nn.Linear(6, 2))
    trainer = in_rank(pipelined(pipeline_split=["net.1.1"], save_distributed_checkpoint=False), max_epochs=1)
    trainer.fit(module)
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    # Four parts of each of four batches, in the stage that has the block.
    assert [int(saved[f"net.1.{place}.num_calls"]) for place in (0, 1)] == [16, 16]
    first, second = saved["net.1.0.drawn"], saved["net.1.1.drawn"]
    assert first.min() > 0 and second.min() > 0 and not torch.equal(first, second), (first, second)


class Remade(Transformer):
    def reset_parameters(self):
        nn.init.normal_(self.places)
        self.scale.fill_(0.5)


class Late(Tied):
    """Makes its layers without memory."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self):
        if not hasattr(self, "net"):
            with torch.device("meta"):
                self.net = Remade()
            self.net.head.weight = self.net.embed.weight
            torch.manual_seed(self.global_rank)  # what each would draw for itself


@world_size(2, connect=False, timeout_s=120)
def test_weights_that_stages_share_and_make_begin_alike():
    module = Late()
    trainer = in_rank(pipelined(), max_epochs=1, gradient_clip_val=0.5)
    trainer.fit(module)
    everyone = trainer.strategy.all_gather(own(module)["net.embed.weight"])
    assert torch.equal(everyone[0], everyone[1]) and everyone[0].std() > 0.5


class WithLoss(Transformer):
    """Returns the mean over the batch too, as modules do that compute their loss."""

    def forward(self, tokens, *, causal=False):
        output = super().forward(tokens, causal=causal)
        return output["logits"], output["logits"].pow(2).mean()


class OfBatches(General):
    def __init__(self, batch_size: int = 8, size: int = 32) -> None:
        super().__init__(batch_size, size)
        torch.manual_seed(2)
        self.net = WithLoss()

    def training_step(self, batch, batch_idx):
        return self.net(batch, causal=True)[1]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.net(batch)[1])


@world_size(2, connect=False, timeout_s=120)
def test_an_output_of_the_whole_batch_is_that_of_one_device():
    module, reference = OfBatches(), OfBatches()
    trainer, single = in_rank(pipelined(), max_epochs=1), alone(max_epochs=1)
    trainer.fit(module)
    single.fit(reference)
    torch.testing.assert_close(dict(trainer.callback_metrics), dict(single.callback_metrics))
    # A batch of three samples, which are no parts, and one of four.
    batches = DataLoader(dataset(7), batch_size=4, collate_fn=to_tokens)
    torch.testing.assert_close(
        [dict(row) for row in trainer.validate(module, batches)],
        [dict(row) for row in single.validate(reference, batches)],
    )


@pytest.mark.parametrize("arguments", [{}, {"copies": 2}], ids=["sharded", "copies"])
@SLOW
@world_size(4, connect=False, timeout_s=180)
def test_a_forward_of_its_own_with_data_parallel_processes_is_one_device(arguments):
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    module, reference = General(4), General(8)
    in_rank(pipelined(data=2, **arguments), 4, gradient_clip_val=0.5).fit(module)
    alone(gradient_clip_val=0.5).fit(reference)
    assert any(isinstance(parameter, DTensor) for parameter in module.parameters())
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses))
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
    # A run begins with a trial of its first part.
    torch.testing.assert_close(noise_then[1:], noise[len(noise) - len(noise_then) + 1 :], rtol=0, atol=0)


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
        (
            tied,
            {"pipeline_schedule": "interleaved"},
            r"net.2.0.layer.weight is a parameter of stages \[1, 3\] of the pipeline, of which one process has several",
        ),
        (normalized, {}, "net.1 normalizes over the batch"),
        (lambda: with_more(net=Plain()), {}, "2 stages need as many layers with parameters, received 1 in net"),
        (lambda: with_more(net=nn.Sequential(nn.Linear(4, 2), nn.Tanh())), {}, "2 stages need as many layers"),
    ],
    ids=["unknown", "first", "tied", "batch norm", "one layer", "too few"],
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


@pytest.mark.parametrize(("num_layers", "end"), [(20, "net.18, net.19. "), (21, "net.18, net.19, .... ")])
def test_an_error_names_the_first_twenty_layers(num_layers, end):
    layers = layers_of(nn.Sequential(*(nn.Linear(1, 1) for _ in range(num_layers))), "net")
    for plan in (PipelinePlan(2, split=["net.0"]), PipelinePlan(2, split=["none"]), PipelinePlan(num_layers + 1)):
        with pytest.raises(ValueError) as told:
            cut(layers, plan)
        assert end in f"{told.value} "
        assert "net.20" not in str(told.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "pipeline_parallel_size must be an int >= 1, received 0"),
        ({"num_microbatches": 0}, "num_microbatches must be an int >= 1, received 0"),
        ({"pipeline_schedule": "2f2b"}, "must be one of 'gpipe', '1f1b', 'interleaved', received '2f2b'"),
        ({"num_microbatches": 3}, "must be a multiple of pipeline_parallel_size=2 .* received 3. Use 4"),
        (
            {"pipeline_split": "net.2"},
            "must name the layer that each stage but the first begins with, which are 1 layers for 2 processes, received 'net.2'",
        ),
        ({"pipeline_split": ["a", "b"]}, r"which are 1 layers for 2 processes, received \['a', 'b'\]"),
        ({"pipeline_split": ["a"] * 4, "pipeline_schedule": "interleaved"}, "which are 3 layers for 2 processes"),
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
        loss = self.net(batch[0]).sum()
        if self.kind == "metric":
            self.log("parts", nn.Linear(1, 1))
        return {"twice": lambda: self.net(batch[0]).sum() + loss, "no loss": lambda: None, "metric": lambda: loss}[
            self.kind
        ]()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("not called", "in Wrong did not call net.2.1, with which a stage of it begins"),
        pytest.param("twice", "net.0 was called twice for one batch", marks=SLOW),
        pytest.param("no loss", "must return the loss, or a dict .* received None", marks=SLOW),
        ("metric", "received Linear, which is updated in the last stage alone"),
    ],
)
@world_size(2, connect=False)
def test_steps_that_cannot_be_run_in_parts(kind, message):
    trainer = in_rank(pipelined())
    # Where the first process cannot know, it waits for the other one, and is told so by the connection, or by torch.
    has_error = kind == "not called" or trainer.global_rank == 1
    with pytest.raises(ValueError if has_error else RuntimeError, match=message if has_error else None):
        trainer.fit(Wrong(kind))


class Crossing(nn.Module):
    """Layers of which one is used where no stage has it, or gives what the stages after it do not get."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "order":
            self.head = nn.Linear(6, 2)
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(4))
        if kind != "order":
            self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = first = self.embed(x)
        for block in self.blocks:
            x = block(x)
            if self.kind == "write":
                kept = torch.zeros(first.shape)
                kept[:] = first
                x = x + kept
            if self.kind == "read" and x.mean() > 100:
                return x
        if self.kind == "skip":
            x = x @ first.T @ first
        if self.kind == "apart":
            x = self.embed.weight.sum() + x
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "message", "failing"),
    [
        ("order", "net.head is in stage 0 of the pipeline of Deep, and runs in stage 1", [1]),
        pytest.param(
            "read",
            r"Stage 1 .* with net.blocks.2, needs the value .*at .*test_pipeline.py:\d+ .aten",
            [0, 1],
            marks=SLOW,
        ),
        ("skip", r"Stage 1 .* with net.blocks.2, needs the value .*at .*test_pipeline.py:\d+ .aten.mm", [1]),
        pytest.param("apart", "needs the value of what an earlier stage computes, at", [1], marks=SLOW),
        pytest.param("write", "needs the value .*test_pipeline.py:.* .aten.copy_", [0, 1], marks=SLOW),
    ],
)
@world_size(2, connect=False)
def test_what_another_stage_computes_is_told(kind, message, failing):
    module = with_more(net=Crossing(kind))
    trainer = in_rank(pipelined(pipeline_split=["net.blocks.2"]))
    is_told = trainer.global_rank in failing
    with pytest.raises(ValueError if is_told else RuntimeError, match=message if is_told else None):
        trainer.fit(module)


class ByHand(Deep):
    def validation_step(self, batch, batch_idx):
        x = batch[0]
        for layer in self.net:
            x = layer(x)
        self.log("val_loss", x.mean())


@world_size(2, connect=False)
def test_layers_called_by_themselves_in_validation_are_told():
    trainer = in_rank(pipelined())
    with pytest.raises(ValueError, match=r"A step of ByHand calls layers .* Call self.net\(x\)"):
        trainer.validate(ByHand())


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
    with pytest.raises(ValueError, match="Deep was cut into stages before"):
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
    for kind, sizes, value, size in (
        ("mean", [3, None], 2.0, 3),
        ("mean", [None, None], 2.0, None),
        ("sum", [3, 1], 4.0, 4),
    ):
        calls = [[{"name": "a", "value": x, "reduce_fx": kind, "batch_size": n}] for x, n in zip((1.0, 3.0), sizes)]
        (call,) = merge_logged(calls)
        assert (call["value"], call.get("batch_size")) == (value, size)
    with pytest.raises(ValueError, match="received Linear, which is updated in the last stage alone"):
        merge_logged([[{"name": "a", "value": nn.Linear(1, 1)}]])
    with pytest.raises(ValueError, match="'mean', 'sum', 'min' or 'max'"):
        merge_logged([[{"name": "a", "value": 1.0, "reduce_fx": "medium"}]])


@dataclass(frozen=True)
class Graph:
    nodes: torch.Tensor
    kind: str


def test_batches_are_cut_along_their_samples():
    Pair = namedtuple("Pair", "x y")
    batch = {
        "pair": Pair(torch.arange(4), torch.arange(8).reshape(4, 2)),
        "names": list("abcd"),
        "classes": list("abc"),
        "scale": torch.tensor(2.0),
        "graph": Graph(torch.arange(4), "ring"),
    }
    assert size_of(batch) == 4
    first, second = split(batch, 2, 4)
    assert first["pair"].x.tolist() == [0, 1] and second["pair"].y.tolist() == [[4, 5], [6, 7]]
    assert (first["names"], second["names"], second["scale"]) == (["a", "b"], ["c", "d"], 2.0)
    assert first["classes"] == second["classes"] == ["a", "b", "c"]
    assert (first["graph"].nodes.tolist(), second["graph"].nodes.tolist()) == ([0, 1], [2, 3])
    assert second["graph"].kind == "ring" and len(batch["graph"].nodes) == 4
    fixed = split(MappingProxyType({"x": torch.arange(2)}), 1, 2)
    assert [part["x"].tolist() for part in fixed] == [[0], [1]]
    assert size_of([torch.zeros(()), torch.zeros(4, 2), torch.zeros(3)]) == 4
    with pytest.raises(ValueError, match="received a batch without any: list"):
        size_of(["a", torch.tensor(1)])


class Passing(nn.Module):
    """The third layer is called with what the first one gives, or with what is computed of that between the layers."""

    def __init__(self, is_between: bool) -> None:
        super().__init__()
        self.is_between = is_between
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Bilinear(2, 2, 1)

    def forward(self, x):
        first = self.a(x)
        between = first * 2
        return self.c(self.b(first), between if self.is_between else first)


@pytest.mark.parametrize("is_between", [False, True])
def test_what_a_stage_was_called_with_goes_on_to_the_next(is_between):
    module = Passing(is_between)
    replay = Replay(module, dict(module.named_children()), [["a"], ["b"], ["c"]], torch.device("cpu"))
    x = torch.randn(3, 2)
    lacks = [replay.lacks(stage, lambda: module(x)) for stage in range(3)]
    assert [len(announced) for announced in lacks] == [0, 1, 2]
    with pytest.raises(ReachedError) as reached:
        replay.run(0, lambda: module(x), [], lacks[1])
    sent = reached.value.tensors
    if is_between:
        with pytest.raises(ValueError, match="needs the value of what an earlier stage computes, for the call of c"):
            replay.run(1, lambda: module(x), sent, lacks[2])
        return
    with pytest.raises(ReachedError) as reached:
        replay.run(1, lambda: module(x), sent, lacks[2])
    found = replay.run(2, lambda: module(x), reached.value.tensors, [])
    torch.testing.assert_close(found, module(x), rtol=0, atol=0)


def test_a_stage_may_begin_with_a_layer_without_parameters():
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    replay = Replay(module, dict(module.named_children()), [["0"], ["1", "2"]], torch.device("cpu"))
    x = torch.randn(4, 2)
    lacks = replay.lacks(1, lambda: module(x))
    assert [shape for _, shape, _ in lacks] == [(4, 3)]
    with pytest.raises(ReachedError) as reached:
        replay.run(0, lambda: module(x), [], lacks)
    has_begun = []
    found = replay.run(1, lambda: module(x), reached.value.tensors, [], lambda: has_begun.append(replay.has_begun))
    assert has_begun == [True]
    torch.testing.assert_close(found, module(x), rtol=0, atol=0)


class Both(nn.Module):
    def forward(self, x, y):
        return x + y


class Repeating(nn.Module):
    """A layer without parameters runs in both stages, another one begins the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.aside, self.act = nn.Linear(2, 2), nn.Linear(2, 2), nn.Tanh()
        self.both, self.b = Both(), nn.Linear(2, 2)

    def forward(self, x):
        x = self.act(x)
        return self.act(self.b(self.both(self.act(self.a(x)), self.aside(x))))


def test_layers_without_parameters_run_wherever_they_are_called_and_may_begin_a_stage():
    module = Repeating()
    stages = [["a", "aside", "act"], ["both", "b"]]
    replay = Replay(module, dict(module.named_children()), stages, torch.device("cpu"))
    x = torch.randn(3, 2)
    lacks = [replay.lacks(stage, lambda: module(x)) for stage in range(2)]
    assert [len(announced) for announced in lacks] == [0, 2]
    with pytest.raises(ReachedError) as reached:
        replay.run(0, lambda: module(x), [], lacks[1])
    found = replay.run(1, lambda: module(x), reached.value.tensors, [])
    torch.testing.assert_close(found, module(x), rtol=0, atol=0)


def bare(is_last: bool = True, body: str = "net", **plan) -> Pipeline:
    """Return a pipeline that is connected with nobody."""
    pipeline = Pipeline.__new__(Pipeline)
    pipeline.plan, pipeline.module, pipeline.body = PipelinePlan(2, **plan), Deep(), body
    pipeline.is_last, pipeline.data_group, pipeline.device = is_last, None, torch.device("cpu")
    pipeline._ways, pipeline._evaluates_whole = {}, False
    pipeline._log_signature = inspect.signature(Deep.log)
    children = dict(pipeline.module.net.named_children())
    pipeline.replay = Replay(pipeline.module, children, [["0", "1"], ["2", "3"]], pipeline.device)
    return pipeline


def told(function, *args) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        function(*args)
    return str(caught.value)


def test_a_step_that_calls_layers_by_themselves_is_told_what_to_call():
    for error in (RuntimeError("of a FakeTensor"), AssertionError("tensor subclasses must")):
        for body, called in (("net", "self.net(x)"), ("", "self(x)")):

            def step(batch, error=error):
                raise error

            assert told(bare(body=body).evaluation_step(step), 1) == (
                f"A step of Deep calls layers of a pipeline by themselves, and this process has a part of them. Call {called}, which runs "
                "all of them, in all steps but `training_step`."
            )
    with pytest.raises(RuntimeError, match="another"):
        bare().evaluation_step(lambda: (_ for _ in ()).throw(RuntimeError("another")))()
    assert bare().evaluation_step(lambda *args: args)(1, 2) == (1, 2)


def test_the_loss_of_a_part_is_kept_and_counts_by_its_weight():
    pipeline = bare()
    step = _Step([1, 2], (), seed=0)
    loss = torch.tensor(3.0, requires_grad=True)
    assert pipeline._loss_of(step, 0, loss) is loss and pipeline._loss_of(step, 1, {"loss": loss}) is loss
    assert step.losses == {0: 3.0, 1: 3.0} and step.weights == {} and not step.losses[0].requires_grad
    assert pipeline._loss_of(step, 1, {"loss": loss, "weight": 4}) == 12.0
    assert (step.losses[1], step.weights) == (12.0, {1: 4})
    for result in (None, {"x": loss}, {"loss": 1.0}):
        assert told(pipeline._loss_of, step, 0, result) == (
            f"`training_step` in a pipeline must return the loss, or a dict with it under 'loss', received {result!r}."
        )


def test_batches_go_through_in_as_many_parts_as_fit_and_a_schedule_is_made_for_each_shape():
    pipeline = bare(num_microbatches=4)
    assert [pipeline._num_parts("a", size, True) for size in (8, 6, 7)] == [(4, True), (2, True), (1, True)]
    pipeline._ways[True] = ("a", 4, [], None)
    assert [pipeline._num_parts("a", size, True) for size in (8, 6)] == [(4, False), (2, True)]
    assert pipeline._num_parts("b", 8, True) == (4, True) and pipeline._num_parts("a", 8, False) == (4, True)
    pipeline._evaluates_whole = True
    assert pipeline._num_parts("a", 8, False) == (1, True) and pipeline._num_parts("a", 8, True) == (4, False)


@pytest.mark.parametrize("is_last", [False, True])
def test_what_a_part_logs_is_kept_as_keywords(is_last):
    pipeline = bare(is_last)
    calls = []

    def training_step(batch, *more):
        pipeline.module.log("loss", 1.0, True, on_step=True)
        calls.append((batch, more))
        return "result"

    pipeline._run_user_step = training_step
    step = _Step(["first", "second"], (5,), seed=0)
    assert pipeline._run_part(step, 1) == "result" and calls == [("second", (5,))]
    assert step.calls == {1: [{"name": "loss", "value": 1.0, "prog_bar": True, "on_step": True}]}
    assert "log" not in vars(pipeline.module)


def test_a_shared_weight_that_a_stage_does_not_use_counts_as_zero_there(monkeypatch):
    pipeline, reduced = bare(), []
    first, second, frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
    pipeline.module = nn.ParameterDict({"first": first, "second": second, "frozen": frozen.requires_grad_(False)})
    first.grad = torch.full((2,), 3.0)
    pipeline.shared = {"first": "a", "second": "b", "frozen": "c"}
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: reduced.append((tensor.tolist(), group)))
    pipeline._add_up_shared()
    assert reduced == [([3.0, 3.0], "a"), ([0.0, 0.0], "b")] and frozen.grad is None
