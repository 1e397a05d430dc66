"""Sequences that several processes share, on two and four ranks: what comes out is what one device gives."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from levin import LightningModule, Trainer
from levin.strategies import ModelParallelStrategy, collectives
from levin.strategies.context import share_sequences
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET
from tests.strategies.test_fsdp import alone, whole

SLOW = pytest.mark.slow
WIDTH, HEADS, LENGTH = 16, 4, 8


class Attention(nn.Module):
    """Causal, with fewer heads for keys and values than for queries."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, rotations=None):
        batch, length, _ = x.shape
        normed = self.norm(x)
        if self.kind == "positions":
            normed = normed + torch.arange(length)[:, None] / length
        query = self.query(normed).view(batch, length, HEADS, -1).transpose(1, 2)
        key, value = self.both(normed).view(batch, length, 2, HEADS // 2, -1).permute(2, 0, 3, 1, 4)
        if rotations is not None:
            cosines, sines = rotations[0][:, None], rotations[1]
            query, key = (part * cosines + part.roll(2, -1) * sines for part in (query, key))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Layer(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(WIDTH, HEADS, 32, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, x, **_):
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return super().forward(x, src_mask=mask, is_causal=True)


class Language(LightningModule):
    """Learned positions, and a next token that crosses the border between two parts."""

    def __init__(self, block=Attention, batch_size: int = 4, length: int = LENGTH) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.batch_size, self.length = batch_size, length
        self.tokens, self.places = nn.Embedding(12, WIDTH), nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 12)
        self.losses: list[float] = []
        self.path = ""
        self.rotates = block is Attention

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        angles = torch.arange(tokens.shape[1])[:, None] / torch.tensor([1.0, 3.0, 9.0, 27.0])
        inputs = {"rotations": (angles.cos().expand(len(x), -1, -1), angles.sin())} if self.rotates else {}
        for block in self.blocks:
            x = block(x, **inputs)
        return self.head(x)

    def training_step(self, batch, batch_idx):
        tokens = batch[0]
        # Of each sample another number of tokens counts.
        targets = tokens[:, 1:].masked_fill(tokens[:, 1:] > 9, -100)
        loss = functional.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), targets.flatten())
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": loss, "weight": targets.ge(0).sum()}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.losses.append(float(self.all_gather(outputs["loss"]).mean()))
        if self.path and batch_idx == 2:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self(batch[0]).pow(2).mean(), sync_dist=True)

    def configure_optimizers(self):
        # Not Adam: the gradient of a bias of keys is zero, and Adam makes a step of its rounding.
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        tokens = torch.randint(12, (16, self.length), generator=torch.Generator().manual_seed(2))
        data = TensorDataset(tokens)
        return DataLoader(data, batch_size=self.batch_size, sampler=DistributedSampler(data, shuffle=False, **ranks))

    def val_dataloader(self):
        tokens = torch.randint(12, (5, self.length), generator=torch.Generator().manual_seed(3))
        return DataLoader(TensorDataset(tokens), batch_size=1)


def in_rank(strategy, devices: int = 2, **settings) -> Trainer:
    # torch's advice for those who change the output of a layer in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return Trainer(
        strategy=strategy, devices=devices, **{"max_epochs": 2, "enable_checkpointing": False, **QUIET, **settings}
    )


def shared(data: int = 1, context: int = 2, tensor: int = 1, **arguments) -> ModelParallelStrategy:
    return ModelParallelStrategy(data, tensor, context_parallel_size=context, **arguments)


@pytest.mark.parametrize(
    ("block", "settings"),
    [
        (Attention, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
        pytest.param(Layer, {}, marks=SLOW),
    ],
    ids=["grouped heads", "torch's layer"],
)
@cuts_on_cpu
@world_size(2, connect=False, timeout_s=120)
def test_two_processes_are_one_device(block, settings):
    module, reference = Language(block), Language(block)
    trainer, single = in_rank("mesh:cp=2", **settings), alone(**settings)
    trainer.fit(module)
    single.fit(reference)
    assert trainer.strategy.data_parallel.size == 1
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    torch.testing.assert_close(torch.tensor(module.losses), torch.tensor(reference.losses))
    torch.testing.assert_close(whole(module), whole(reference), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(trainer.callback_metrics), dict(single.callback_metrics), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 2}, pytest.param({"context": 2, "tensor": 2, "plan": {"blocks.*.mlp.0": "column", "blocks.*.mlp.2": "row"}}, marks=SLOW)],
    ids=["with data", "with layers"],
)  # fmt: skip
@cuts_on_cpu
@world_size(4, connect=False, timeout_s=180)
def test_four_processes_are_one_device(sizes):
    data = sizes.get("data", 1)
    module, reference = Language(batch_size=4 // data), Language()
    trainer, single = in_rank(shared(**sizes), 4, gradient_clip_val=0.05), alone(gradient_clip_val=0.05)
    trainer.fit(module)
    single.fit(reference)
    assert trainer.strategy.data_parallel.size == data
    torch.testing.assert_close(whole(module), whole(reference), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        trainer.callback_metrics["val_loss"], single.callback_metrics["val_loss"], rtol=1e-4, atol=1e-5
    )


@cuts_on_cpu
@world_size(2, connect=False, timeout_s=120)
def test_an_open_window_goes_on(tmp_path):
    def run(path, ckpt_path=None):
        module = Language()
        module.path = path
        in_rank(shared(), max_epochs=1, accumulate_grad_batches=4).fit(module, ckpt_path=ckpt_path)
        return whole(module)

    path = str(tmp_path / "open.ckpt")
    unbroken = run(path)
    torch.testing.assert_close(run("", path), unbroken, rtol=1e-5, atol=1e-6)


class Placed(Attention):
    def __init__(self) -> None:
        super().__init__("positions")


class Flat(nn.Linear):
    """Takes tokens of all samples in one dimension."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x):
        return super().forward(x).flatten(0, 1)


class Masked(nn.Module):
    """Passes its mask to torch's layer, which holds it against the part of the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        mask = torch.zeros(8, 8)
        return x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize(
    ("block", "length", "message"),
    [
        (Masked, 8, r"Masked cannot run on parts of a sequence: .*\(4, 4\)\. Only the mask that is passed to"),
        (Placed, 8, "Placed gives other results for parts of a sequence than for the whole"),
        (Attention, 7, r"2 processes can share evenly, received \(4, 7, 16\). Pad sequences to a multiple of 2"),
        pytest.param(Flat, 8, "Flat gives other results", marks=SLOW),
    ],
)
@cuts_on_cpu
@world_size(2, connect=False)
def test_blocks_that_cannot_share_a_sequence(block, length, message):
    with pytest.raises(ValueError, match=message):
        in_rank(shared()).fit(Language(block, length=length))


@cuts_on_cpu
@world_size(4, connect=False)
def test_heads_that_cannot_be_shared():
    with pytest.raises(ValueError, match=r"on 4 processes takes .*received \(4, 2, 2, 4\).* divides the heads"):
        in_rank(shared(context=4), 4).fit(Language())


@cuts_on_cpu
@world_size(2, connect=False)
def test_a_module_without_blocks_is_refused():
    module = Language()
    module.blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="and Language has no repeated blocks"):
        in_rank(shared()).fit(module)


class Wide(nn.Module):
    """Attends under a mask that the caller gives, and takes further inputs of every form."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.kind, self.num_calls = kind, 0
        self.inner = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, mask=None, rows=None, scales=None, weight=1.0):
        self.num_calls += 1
        heads = self.inner(x).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        attended = functional.scaled_dot_product_attention(*heads, mask, dropout_p=0.0)
        x = x + attended.transpose(1, 2).flatten(2) * weight
        x = x + (0 if rows is None else rows) + (0 if scales is None else scales)
        return {"tuple": (x,), "two": (x, x), "dict": {"x": x}}.get(self.kind, x)


class Another(Wide):
    """Of a class of its own, which is tried out."""


@world_size(2)
def test_blocks_with_further_inputs_masks_and_tuples_give_what_they_give_alone():
    generator = torch.Generator().manual_seed(6)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator)

    attention, is_fast = functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    inputs = {"rows": drawn(LENGTH, WIDTH), "scales": drawn(2, LENGTH, WIDTH), "weight": torch.tensor(2.0)}
    for kind, masks in (
        ("plain", (None, drawn(2, HEADS, LENGTH, LENGTH), drawn(2, 1, LENGTH, LENGTH), drawn(LENGTH, LENGTH))),
        ("tuple", (None,)),
    ):
        kinds = Wide if kind == "plain" else Another
        reference, blocks = kinds(kind), [kinds(kind), kinds(kind)]
        share_sequences(blocks, None)
        for block in blocks:
            for mask in masks:
                x = drawn(2, LENGTH, WIDTH)
                ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
                found, expected = block(ours, mask, **inputs), reference(theirs, mask, **inputs)
                torch.testing.assert_close(found, expected)
                weight = drawn(2, LENGTH, WIDTH)
                for module, output in ((block, found), (reference, expected)):
                    module.zero_grad()
                    ((output[0] if kind == "tuple" else output) * weight).sum().backward()
                torch.testing.assert_close(ours.grad, theirs.grad)
                # The gradients of the processes are averaged, as those of other data are.
                gradients = [collectives.reduce(parameter.grad) for parameter in block.parameters()]
                torch.testing.assert_close(gradients, [parameter.grad for parameter in reference.parameters()])
        # The first of a class is tried out: once with the whole and once with its part.
        assert [block.num_calls for block in blocks] == [len(masks) + 2, len(masks)]
    known = Wide("plain")
    share_sequences([known], None, is_tried=True)
    known(drawn(2, LENGTH, WIDTH))
    assert known.num_calls == 1
    # Formats of autocast are coarse; what is the same in them is the same.
    coarse = Wide("plain")
    share_sequences([coarse], None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert coarse(drawn(2, LENGTH, WIDTH) * 3).shape == (2, LENGTH, WIDTH)
    for kind, given, message in (
        ("dict", drawn(2, LENGTH, WIDTH), "Wide must return (batch, sequence, features) to share its sequence, received dict."),
        ("two", drawn(2, LENGTH, WIDTH), "Wide must return (batch, sequence, features) to share its sequence, received tuple."),
        (
            "plain", drawn(LENGTH, WIDTH),
            "Wide must take (batch, sequence, features) whose sequence 2 processes can share evenly, received (8, 16). Pad sequences to "
            "a multiple of 2, or choose another context_parallel_size.",
        ),
        (
            "plain", "text",
            "Wide must take (batch, sequence, features) whose sequence 2 processes can share evenly, received str. Pad sequences to a "
            "multiple of 2, or choose another context_parallel_size.",
        ),
    ):  # fmt: skip
        wrong = Wide(kind)
        share_sequences([wrong], None, is_tried=True)
        with pytest.raises(ValueError) as told:
            wrong(given)
        assert str(told.value) == message
    assert functional.scaled_dot_product_attention is attention
    assert torch.backends.mha.get_fastpath_enabled() == is_fast is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context_parallel_size must be an int >= 1, received 0"),
        ({"data": 2, "copies": 2}, "received copies=2 and pipeline_parallel_size=1. Leave these out"),
        ({"pipeline_parallel_size": 2}, "received copies=1 and pipeline_parallel_size=2"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        shared(**arguments)
