"""What processes say to each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from levin import Trainer
from levin.strategies import collectives
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small


@world_size(2)
def test_reduce_in_every_operation():
    rank = dist.get_rank()
    value = torch.tensor([1.0 + rank, 4.0 - rank])
    expected = {
        "mean": [1.5, 3.5],
        "AVG": [1.5, 3.5],
        "sum": [3.0, 7.0],
        "min": [1.0, 3.0],
        "max": [2.0, 4.0],
        "product": [2.0, 12.0],
    }
    for op, result in expected.items():
        assert collectives.reduce(value, reduce_op=op).tolist() == result
    assert collectives.reduce(value, reduce_op=dist.ReduceOp.MAX).tolist() == [2.0, 4.0]
    assert collectives.reduce(value, reduce_op=None).tolist() == [3.0, 7.0]
    assert value.tolist() == [1.0 + rank, 4.0 - rank]


@world_size(2)
def test_reduce_of_integers_booleans_numbers_and_collections():
    rank = dist.get_rank()
    mean = collectives.reduce(torch.tensor([rank, 3]))
    assert mean.tolist() == [0.5, 3.0]
    assert mean.dtype == torch.float32
    assert collectives.reduce(torch.tensor([rank, 3]), reduce_op="sum").dtype == torch.int64
    assert collectives.reduce(torch.tensor([rank == 0, True]), reduce_op="sum").tolist() == [1, 2]
    nested = collectives.reduce({"a": [rank, 2.0], "name": "x"})
    assert nested["a"][0].item() == 0.5
    assert nested["a"][1].item() == 2.0
    assert nested["name"] == "x"


@world_size(2)
def test_reduced_tensors_carry_no_gradient_and_keep_their_precision():
    leaf = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    result = collectives.reduce(leaf * 3)
    assert result.dtype == torch.float64
    assert not result.requires_grad
    assert collectives.reduce(torch.ones(2, 3).t()).shape == (3, 2)


@world_size(2)
def test_all_gather_stacks_and_sends_gradients_home():
    rank = dist.get_rank()
    leaf = torch.tensor([1.0 + rank, 2.0], requires_grad=True)
    gathered = collectives.all_gather(leaf)
    assert gathered.tolist() == [[1.0, 2.0], [2.0, 2.0]]
    assert not gathered.requires_grad
    with_grads = collectives.all_gather(leaf, sync_grads=True)
    # Each rank weighs the parts differently; the gradient is the sum of what all ranks say.
    weight = torch.tensor([[1.0, 10.0], [100.0, 1000.0]]) * (rank + 1)
    (with_grads * weight).sum().backward()
    assert leaf.grad.tolist() == ([3.0, 30.0] if rank == 0 else [300.0, 3000.0])
    assert collectives.all_gather(rank).tolist() == [0, 1]
    assert collectives.all_gather({"a": [leaf]})["a"][0].shape == (2, 2)


@world_size(3)
def test_objects_and_decisions():
    rank = dist.get_rank()
    assert collectives.broadcast_object({"from": rank}, src=2) == {"from": 2}
    assert collectives.agree(rank == 1, all_must=False)
    assert not collectives.agree(rank == 1, all_must=True)
    assert collectives.agree(True, all_must=True)
    assert not collectives.agree(False, all_must=False)


@world_size(2)
def test_collectives_within_a_group():
    rank = dist.get_rank()
    groups = [dist.new_group([index]) for index in range(2)]
    own = groups[rank]
    assert collectives.reduce(torch.tensor(float(rank)), group=own, reduce_op="mean").item() == rank
    assert collectives.all_gather(torch.tensor(rank), group=own).tolist() == [rank]


@world_size(2)
def test_sync_tensors_overwrites_also_strided_ones():
    rank = dist.get_rank()
    base = torch.full((2, 3), float(rank + 1))
    strided = torch.arange(6.0).view(2, 3).t() * (rank + 1)
    collectives.sync_tensors([base, strided], src=1)
    assert base.eq(2).all()
    assert strided.tolist() == (torch.arange(6.0).view(2, 3).t() * 2).tolist()


def test_unknown_operation():
    with pytest.raises(ValueError, match=r"reduce_op must be .* received 'median'. Use 'mean'"):
        collectives.parse_reduce_op("median")


@world_size(2)
def test_tensors_of_different_shapes_are_refused_on_all_ranks_before_they_are_gathered():
    rank = dist.get_rank()
    for data, message in (
        (torch.zeros(2 + rank), r"rank 0: float32 of shape \(2,\); rank 1: float32 of shape \(3,\)"),
        (torch.zeros(2, 1 + rank), r"float32 of shape \(2, 1\); .* \(2, 2\)"),
        (torch.zeros(2, dtype=[torch.float32, torch.float64][rank]), r"rank 0: float32 .* rank 1: float64 of shape"),
        ({"a": torch.zeros(1), **({"b": 1} if rank else {})}, r"rank 1: float32 of shape \(1,\), int"),
    ):
        with pytest.raises(ValueError, match=message):
            collectives.check_same_shapes(data)
    # Everybody has heard of it, so that the ranks can still talk to each other.
    collectives.check_same_shapes([torch.zeros(2), 1])
    assert collectives.all_gather(torch.tensor(rank)).tolist() == [0, 1]


@world_size(2, connect=False)
def test_a_module_that_gathers_different_shapes_hears_of_it():
    class Gathering(Small):
        def training_step(self, batch, batch_idx):
            with pytest.raises(
                ValueError, match=r"one shape and type on all ranks, received rank 0: .*\(1,\); rank 1:"
            ):
                self.all_gather(torch.zeros(1 + self.global_rank))
            return super().training_step(batch, batch_idx)

    Trainer(**QUIET, devices=2, strategy="ddp", max_steps=1, enable_checkpointing=False, limit_val_batches=0).fit(
        Gathering()
    )
