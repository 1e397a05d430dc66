"""Modules that differ between ranks are told with their layers, before anything of them is sent."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from levin import Fabric, Trainer
from levin.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET, Small

ONCE = {**QUIET, "devices": 2, "max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0}


def on_rank(number: int) -> bool:
    return dist.get_rank() == number


def another_type(net):
    net.first.to(torch.bfloat16)


def another_shape(net):
    net.first = nn.Linear(3, 7)


def another_layer(net):
    net.third = nn.Linear(3, 3)


def another_buffer(net):
    net.register_buffer("scale", torch.ones(3))


def another_size_of_a_buffer(net):
    net.second.register_buffer("running_mean", torch.ones(5))


def frozen(net):
    net.first.bias.requires_grad = False


def another_order(net):
    net.first, first = nn.Identity(), net.first
    del net.first
    net.first = first


def another_order_of_memory(net):
    net.first.weight = nn.Parameter(torch.ones(3, 2).t())


def a_shared_weight(net):
    net.first.bias = net.second.bias


DIFFERENCES = {
    another_type: r"{}first\.weight: float32 of shape \(2, 3\) on rank 0 and bfloat16 of shape \(2, 3\) on rank 1; {}first\.bias: ",
    another_shape: r"{}first\.weight: float32 of shape \(2, 3\) on rank 0 and float32 of shape \(7, 3\) on rank 1",
    another_layer: r"{}third\.weight: none on rank 0 and float32 of shape \(3, 3\) on rank 1; {}third.bias",
    another_buffer: r"{}scale: none on rank 0 and float32 of shape \(3,\) on rank 1\.",
    another_size_of_a_buffer: r"{}second\.running_mean: float32 of shape \(2,\) on rank 0 and float32 of shape \(5,\) on rank 1\.",
    frozen: r"{}first\.bias: float32 of shape \(2,\) on rank 0 and .*, requires_grad=False on rank 1\.",
    another_order: r"another order: {}first.weight, .* on rank 0 and {}second.weight, .* on rank 1\.",
    another_order_of_memory: r"{}first\.weight: .* on rank 0 and .* in another order of memory, \(1, 2\) on rank 1\.",
    a_shared_weight: r"{}second\.bias: float32 of shape \(2,\) on rank 0 and none on rank 1\.",
}


def fabric_with(strategy) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    return fabric


def net_of_rank(difference) -> nn.Sequential:
    net = nn.Sequential()
    net.first, net.second = nn.Linear(3, 2), nn.BatchNorm1d(2)
    if on_rank(1):
        difference(net)
    return net


@world_size(2)
def test_a_module_that_differs_between_ranks_is_told_with_its_layers():
    for difference, message in DIFFERENCES.items():
        model = Small()
        model.net = net_of_rank(difference)
        expected = "Small must have the same parameters and buffers on all ranks, received " + message.format(
            *["net."] * 2
        )
        with pytest.raises(ValueError, match=expected):
            Trainer(**ONCE, strategy="ddp").fit(model)
        assert model.seen == []
        with pytest.raises(ValueError, match=message.format("", "")):
            fabric_with("ddp").setup(net_of_rank(difference))
    # The ranks can still talk to each other, and train.
    Trainer(**ONCE, strategy="ddp").fit(Small())


@cuts_on_cpu
@world_size(2)
def test_a_module_that_differs_between_ranks_is_told_before_it_is_cut():
    for strategy in (FSDPStrategy, ModelParallelStrategy):
        for difference, message in DIFFERENCES.items():
            fabric = fabric_with(strategy())
            with pytest.raises(ValueError, match=message.format("", "")):
                fabric.setup(net_of_rank(difference))


@world_size(2)
def test_the_first_of_many_differences_are_told():
    net = nn.Sequential(*[nn.Linear(2, 2 + dist.get_rank()) for _ in range(150)])
    with pytest.raises(ValueError, match=r"received 0.weight: .*; 2.weight: [^;]*; 295 more\. Make"):
        fabric_with("ddp").setup(net)


@world_size(2)
def test_differences_that_make_none_are_left_alone():
    rank = dist.get_rank()
    # What DistributedDataParallel is told to leave alone.
    net = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1 + rank))
    net._ddp_params_and_buffers_to_ignore = ["1.weight", "1.bias"]
    fabric_with("ddp").setup(net)
    # Nothing learns in an evaluation.
    model = Small()
    model.net.requires_grad_(rank == 0)
    Trainer(**{**ONCE, "limit_val_batches": 1}, strategy="ddp").validate(model, verbose=False)


@world_size(2)
def test_parameters_that_come_to_learn_on_one_rank_alone_are_told():
    class Thawing(Small):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2), nn.Linear(2, 1))
            self.net[0].requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                (self.net[0].weight if self.global_rank else self.net[0].bias).requires_grad = True

    with pytest.raises(
        ValueError, match=r"net\.0\.weight: .*, requires_grad=False on rank 0 and .*; net\.0\.bias: .* on rank 0"
    ):
        Trainer(**ONCE, strategy=DDPStrategy()).fit(Thawing())
