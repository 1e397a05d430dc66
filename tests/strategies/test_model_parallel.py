"""Tensor parallel and data parallel processes under the Trainer, on four ranks."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from levin import Trainer
from levin.checkpoint import consolidate
from levin.environments import LightningEnvironment
from levin.strategies import ModelParallelStrategy
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET, dataset
from tests.strategies.test_fsdp import Deep, alone, whole

PLAN = {"net.embed": "column", "net.head": "row"}


class Wide(Deep):
    """An embedding that is cut by columns and a head that is cut by rows, with nothing between that mixes features."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        torch.manual_seed(1)
        self.net = nn.Sequential()
        self.net.embed, self.net.act, self.net.head = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)

    def train_dataloader(self):
        ranks = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        return DataLoader(
            dataset(), batch_size=self.batch_size, sampler=DistributedSampler(dataset(), shuffle=False, **ranks)
        )


class ByHand(Wide):
    """Cuts itself in `configure_model`, with torch's functions."""

    def configure_model(self):
        mesh = self.device_mesh
        assert mesh.mesh_dim_names == ("data_parallel", "tensor_parallel")
        parallelize_module(self.net, mesh["tensor_parallel"], {"embed": ColwiseParallel(), "head": RowwiseParallel()})
        fully_shard(self.net, mesh=mesh["data_parallel"])


def in_rank(strategy: ModelParallelStrategy, devices: int, **settings) -> Trainer:
    return Trainer(
        strategy=strategy, devices=devices, **{"max_epochs": 2, "enable_checkpointing": False, **QUIET, **settings}
    )


class Cut(Wide):
    def configure_model(self):
        mesh = self.device_mesh["tensor_parallel"]
        parallelize_module(self.net, mesh, {"embed": ColwiseParallel(), "head": RowwiseParallel()})


class Sharded(Wide):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


@pytest.mark.parametrize("is_sharded", [False, True], ids=["by layers", "sharded"])
@cuts_on_cpu
@world_size(2, connect=False)
def test_layers_that_a_later_call_cuts_again_are_told_apart(is_sharded):
    kind, sizes = (Sharded, (2, 1)) if is_sharded else (Cut, (1, 2))

    class Once(kind):
        def configure_model(self):
            if not isinstance(self.net.embed.weight, DTensor):
                super().configure_model()

    for module in (Once(4), kind(4)):
        trainer = in_rank(ModelParallelStrategy(*sizes), 2, max_epochs=1)
        trainer.fit(module)
        with nullcontext() if isinstance(module, Once) else pytest.raises((RuntimeError, AssertionError)) as caught:
            trainer.validate(module, verbose=False)
        if caught is not None:
            text = str(caught.value)
            assert text.startswith("`configure_model` runs in every call (fit, validate") and "are cut already" in text


@pytest.mark.parametrize("kind", ["plan", "by hand", "copies"])
@cuts_on_cpu
@world_size(4, connect=False, timeout_s=120)
def test_two_dimensions_are_one_device(tmp_path, kind):
    module, reference = (ByHand if kind == "by hand" else Wide)(4), Wide(8)
    strategy = ModelParallelStrategy(
        2, 2, plan=None if kind == "by hand" else PLAN, copies=2 if kind == "copies" else 1
    )
    trainer = in_rank(strategy, 4, gradient_clip_val=0.05)
    # torch's advice for those who change the output of a layer in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    trainer.fit(module)
    assert trainer.strategy.data_parallel.size == 2
    weight = module.net.embed.weight
    assert isinstance(weight, DTensor) and weight.to_local().shape == (4 if kind == "copies" else 2, 4)
    alone(gradient_clip_val=0.05).fit(reference)
    torch.testing.assert_close(whole(module), whole(reference))
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    saved = consolidate(path)["state_dict"]
    torch.testing.assert_close(dict(saved), whole(reference))


class ByHandOnMeta(Wide):
    """Is made without memory, and cut before its weights are."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.net.to("meta")

    configure_model = ByHand.configure_model


@cuts_on_cpu
@world_size(2, connect=False)
def test_weights_are_made_of_layers_that_were_cut_on_the_meta_device():
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    module = ByHandOnMeta(8)
    seen = []
    module.on_fit_start = lambda: seen.append({name: value.clone() for name, value in whole(module).items()})
    in_rank(ModelParallelStrategy(1, 2), 2, max_epochs=1).fit(module)
    assert all(0 < value.abs().max() <= 0.5 for value in seen[0].values())
    changed = whole(module)
    assert all(not torch.equal(value, changed[name]) for name, value in seen[0].items())


@world_size(2, connect=False)
def test_tensor_parallel_alone_saves_one_file_that_one_device_goes_on_from(tmp_path):
    import warnings

    module, reference = Wide(8), Wide(8)
    trainer = in_rank(ModelParallelStrategy(1, 2, save_distributed_checkpoint=False, plan=PLAN), 2, max_epochs=1)
    trainer.fit(module)
    path = str(tmp_path / "saved.ckpt")
    trainer.save_checkpoint(path)
    alone().fit(reference)
    resumed = Wide(8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The checkpoint was saved by")
        alone().fit(resumed, ckpt_path=path)
    torch.testing.assert_close(whole(resumed), whole(reference))


class Tied(Wide):
    """Its head is its embedding."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(batch_size)
        self.net.embed, self.net.head = nn.Embedding(32, 8), nn.Linear(8, 32, bias=False)
        self.net.head.weight = self.net.embed.weight

    def training_step(self, batch, batch_idx):
        tokens = (batch[0].abs() * 10).long() % 32
        return nn.functional.cross_entropy(self.net(tokens).flatten(0, 1), tokens.roll(1).flatten())


CUT_ALIKE = {
    "net.embed": RowwiseParallel(input_layouts=Replicate()),
    "net.head": ColwiseParallel(output_layouts=Replicate()),
}


@world_size(2, connect=False)
def test_a_weight_of_two_layers_that_are_cut_stays_one():
    module, reference = Tied(), Tied()
    settings = {"gradient_clip_val": 0.05, "limit_val_batches": 0}
    in_rank(ModelParallelStrategy(1, 2, plan=CUT_ALIKE), 2, **settings).fit(module)
    alone(**settings).fit(reference)
    assert module.net.head.weight is module.net.embed.weight and isinstance(module.net.head.weight, DTensor)
    torch.testing.assert_close(whole(module), whole(reference))


@pytest.mark.parametrize("style", ["column", None], ids=["otherwise", "alone"])
@world_size(2, connect=False)
def test_a_weight_of_two_layers_that_are_cut_in_different_ways_is_told(style):
    plan = {**CUT_ALIKE, "net.embed": style}
    trainer = in_rank(ModelParallelStrategy(1, 2, plan={name: way for name, way in plan.items() if way}), 2)
    with pytest.raises(ValueError, match=r"net.embed.weight and net.head.weight are one parameter, and the plan cuts"):
        trainer.fit(Tied())


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4)], ids=str)
@cuts_on_cpu
@world_size(4, connect=False, timeout_s=120)
def test_an_open_window_goes_on_exactly(tmp_path, sizes):
    class Stopping(Wide):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 0 and self.path:
                self.trainer.save_checkpoint(self.path)

    def run(path, ckpt_path=None):
        module = Stopping(2)
        module.path = path
        strategy = ModelParallelStrategy(*sizes, plan=PLAN)
        in_rank(strategy, 4, accumulate_grad_batches=2, max_epochs=1).fit(module, ckpt_path=ckpt_path)
        return whole(module)

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    path = str(tmp_path / "open.ckpt")
    unbroken = run(path)
    torch.testing.assert_close(run("", path), unbroken, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"data_parallel_size": 2, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}, [0, 0, 1, 1, 0, 0, 1, 1]),
        ({"data_parallel_size": 3, "tensor_parallel_size": 1, "context_parallel_size": 2}, [0, 0, 1, 1, 2, 2]),
        ({"data_parallel_size": 4, "tensor_parallel_size": 1, "copies": 2}, [0, 1, 2, 3]),
    ],
    ids=["pipeline", "sequences", "copies"],
)
def test_each_process_knows_whose_data_it_sees_before_it_is_connected(arguments, expected):
    strategy = ModelParallelStrategy(**arguments)
    strategy.environment = environment = LightningEnvironment()
    found = []
    for rank in range(len(expected)):
        environment.set_global_rank(rank)
        found.append(strategy.data_parallel.rank)
    assert found == expected and strategy.data_parallel.size == arguments["data_parallel_size"]


def test_sizes_that_do_not_multiply_are_refused_before_a_process_starts():
    with pytest.raises(
        ValueError, match="data_parallel_size=2 times tensor_parallel_size=3 must be the number of processes"
    ):
        in_rank(ModelParallelStrategy(2, 3), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_parallel_size": 0}, "data_parallel_size must be 'auto' or an int >= 1"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size must be 'auto'"),
        ({"plan": {"net": "diagonal"}}, "must be one of 'column', 'row', 'sequence'"),
    ],
)
def test_arguments_that_cannot_be_meant(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModelParallelStrategy(**arguments)


@pytest.mark.parametrize(
    ("plan", "message"),
    [({"net.nothing": "row"}, "fits no submodule of Wide"), ({"net.head": "column"}, "has 1 output features")],
)
@world_size(2, connect=False)
def test_a_plan_that_does_not_fit_names_what_is_there(plan, message):
    with pytest.raises(ValueError, match=message):
        in_rank(ModelParallelStrategy(1, 2, plan=plan), 2).fit(Wide(8))


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (partial(torch.optim.AdamW, fused=True), r"AdamW\(fused=True\) steps all parameters at once"),
        pytest.param(partial(torch.optim.SGD, foreach=True), r"SGD\(foreach=True\) steps all", marks=pytest.mark.slow),
        pytest.param(torch.optim.LBFGS, "LBFGS makes one vector of all parameters", marks=pytest.mark.slow),
    ],
    ids=["fused", "foreach", "one vector"],
)
@world_size(2, connect=False)
def test_optimizers_that_put_parameters_together_are_refused(optimizer, message):
    module = Wide(8)
    module.optimizer = optimizer
    with pytest.raises(ValueError, match=message):
        in_rank(ModelParallelStrategy(1, 2, plan={"net.embed": "column"}), 2).fit(module)


@cuts_on_cpu
@world_size(2, connect=False)
def test_weights_that_the_module_lacks_are_told(tmp_path):
    larger = Wide(4)
    larger.net.more = nn.Linear(1, 1)
    trainer = in_rank(ModelParallelStrategy(2, 1), 2, max_epochs=1)
    trainer.fit(larger)
    path = str(tmp_path / "larger.ckpt")
    trainer.save_checkpoint(path)
    module = Wide(4)
    with pytest.raises(ValueError, match=r"holds net.more.bias, net.more.weight, which this module lacks"):
        in_rank(ModelParallelStrategy(2, 1), 2).validate(module, ckpt_path=path)
    module = Wide(4)
    module.strict_loading = False
    in_rank(ModelParallelStrategy(2, 1), 2).validate(module, ckpt_path=path)
    expected = whole(larger)
    torch.testing.assert_close(whole(module), {name: expected[name] for name in whole(module)})
