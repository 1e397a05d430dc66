"""What processes say to each other."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from levin import Fabric, Trainer
from levin.strategies import SingleDeviceCollective, TorchCollective, collectives, group_collectives
from levin.strategies.control_group import ControlGroup
from levin.utilities.process_group import disconnect_processes
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small, loader


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
    tensors = [torch.tensor(10.0 * rank + number, requires_grad=True) for number in range(20)]
    collectives.sync_tensors(iter(tensors), device=torch.device("cpu"))
    assert [float(tensor.detach()) for tensor in tensors] == list(range(20))
    own = [dist.new_group([index]) for index in range(2)][rank]
    alone = torch.tensor(float(rank))
    collectives.sync_tensors([alone], group=own)
    assert alone == rank


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
        ({"a": torch.zeros(1), **({"b": 1} if rank else {})}, r"rank 1: a: float32 of shape \(1,\), b: int"),
        ({"ab"[rank]: torch.zeros(1)}, r"rank 0: a: float32 of shape \(1,\); rank 1: b: float32"),
        (dict.fromkeys(["ab", "ba"][rank], 1.0), r"rank 0: a: float, b: float; rank 1: b: float, a: float"),
        ([{"a": 1}] * rank, r"rank 0: none; rank 1: a: int"),
    ):
        with pytest.raises(ValueError, match=message):
            collectives.check_same_shapes(data)
    # Everybody has heard of it, so that the ranks can still talk to each other.
    collectives.check_same_shapes([torch.zeros(2), 1])
    assert collectives.all_gather(torch.tensor(rank)).tolist() == [0, 1]


@world_size(2)
def test_tensors_of_different_shapes_are_refused_on_all_ranks_before_they_are_reduced():
    rank = dist.get_rank()
    for data in (torch.zeros(2 + rank), torch.zeros(2, dtype=[torch.float32, torch.float64][rank]), {"ab"[rank]: 1.0}):
        with pytest.raises(
            ValueError, match="a reduction takes tensors of one shape and type on all ranks, .* rank 0: .*; rank 1: "
        ):
            collectives.reduce(data, is_checked=True)
    # What becomes one type is reduced.
    assert collectives.reduce([torch.tensor([1, 2]), torch.tensor([1.0, 2.0])][rank], is_checked=True).tolist() == [
        1,
        2,
    ]


@world_size(2)
def test_tensors_that_are_reduced_in_different_ways_are_refused_on_all_ranks():
    rank, two = dist.get_rank(), torch.ones(2)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    all_reduce, gather = fabric.all_reduce, fabric.all_gather
    for calls, message in (
        (
            [lambda: all_reduce(two, reduce_op="sum"), lambda: all_reduce(two)],
            "by sum on rank 0 and .* by mean on rank 1",
        ),
        (
            [lambda: all_reduce(two, reduce_op=dist.ReduceOp.MIN), lambda: all_reduce({"a": two}, reduce_op="max")],
            "by min on rank 0 and a reduction by max on rank 1",
        ),
        ([lambda: gather(two), lambda: all_reduce(two)], "all_gather on rank 0 and a reduction by mean on rank 1"),
        ([lambda: gather(two), lambda: gather(None)], r"rank 0: float32 of shape \(2,\); rank 1: none"),
        ([lambda: gather(two), fabric.barrier], "All ranks have to make the same calls, .* on rank 0; .* on rank 1"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            calls[rank]()
    # These are the same.
    names = ["mean", dist.ReduceOp.AVG]
    assert fabric.all_reduce(two + rank, reduce_op=names[rank]).tolist() == [1.5, 1.5]


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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({"a": 1.0}, {"b": 1.0}), r"rank 0: a: float32 of shape \(\); rank 1: b: float32"),
        (({"a": 1, "b": 2}, {"b": 1, "a": 2}), r"rank 0: a: int64 .*, b: int64 .*; rank 1: b: int64 .*, a: int64"),
        (([1], [1, 2]), r"rank 0: int64 of shape \(\); rank 1: int64 of shape \(\), int64 of shape \(\)"),
        ((torch.zeros(1), None), r"rank 0: float32 of shape \(1,\); rank 1: none"),
        (({}, torch.zeros(1)), r"rank 0: none; rank 1: float32 of shape \(1,\)"),
    ],
)
@world_size(2, connect=False)
def test_a_module_that_gathers_other_names_on_each_rank_hears_of_it(given, message):
    class Gathering(Small):
        def test_step(self, batch, batch_idx):
            with pytest.raises(ValueError, match=message):
                self.all_gather(given[self.global_rank])
            assert self.all_gather({"a": self.global_rank})["a"].tolist() == [0, 1]

    Trainer(**QUIET, devices=2, strategy="ddp", enable_checkpointing=False).test(Gathering(), loader(4), verbose=False)


@world_size(2)
def test_ranks_that_differ_in_what_one_line_does_hear_what_each_was_about_to_do():
    group = ControlGroup(timedelta(seconds=20))
    with pytest.raises(RuntimeError, match="for batches on rank 0; .* for the run on rank 1"):
        group.exchange([0.0], ["batches", "the run"][dist.get_rank()])


@world_size(2)
def test_a_process_that_leaves_is_waited_for_by_nobody_though_it_lives_on(tmp_path):
    # As the first process does at the end of a script, whose others may go on with a call that it does not make.
    group, has_heard = ControlGroup(timedelta(seconds=30)), tmp_path / "heard"
    group.exchange([0.0])
    if dist.get_rank() == 0:
        disconnect_processes()
        deadline = time.monotonic() + 10.0
        while not has_heard.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert has_heard.exists(), group
    else:
        with pytest.raises(RuntimeError, match="Connection closed|Connection reset"):
            group.exchange([0.0])
        has_heard.touch()


def noting(calls, name, result=None):
    def call(*args, **kwargs):
        calls.append((name, args, kwargs))
        return result

    return call


def test_each_collective_is_torchs_over_the_group(monkeypatch):
    calls = []
    results = {"new_group": "group", "get_rank": 1, "get_world_size": 4, "is_initialized": True}
    names = (
        "broadcast all_reduce reduce all_gather gather scatter reduce_scatter all_to_all send recv barrier monitored_barrier "
        "all_gather_object broadcast_object_list gather_object scatter_object_list"
    )
    for name in (*results, *names.split()):
        monkeypatch.setattr(dist, name, noting(calls, name, results.get(name)))
    collective = TorchCollective()
    # Without a group of its own it speaks to all that are connected.
    assert collective.group is dist.group.WORLD and collective.is_initialized() and collective.setup() is collective
    assert collective.create_group(ranks=[0, 1]) is collective and collective.group == "group"
    assert ("new_group", (), {"ranks": [0, 1]}) in calls
    assert (collective.rank, collective.world_size) == (1, 4)
    with pytest.raises(RuntimeError, match=r"TorchCollective has a group already. Call teardown\(\) before"):
        collective.create_group()
    tensor, tensors, objects, op = torch.ones(2), [torch.ones(2)], ["x"], dist.ReduceOp
    of_group = {"group": "group"}
    for got, returned, name, args, kwargs in (
        (lambda: collective.broadcast(tensor, 3), tensor, "broadcast", (tensor, 3), {}),
        (lambda: collective.all_reduce(tensor), tensor, "all_reduce", (tensor,), {"op": op.SUM}),
        (lambda: collective.all_reduce(tensor, "max"), tensor, "all_reduce", (tensor,), {"op": op.MAX}),
        (lambda: collective.reduce(tensor, 2, "min"), tensor, "reduce", (tensor, 2), {"op": op.MIN}),
        (lambda: collective.all_gather(tensors, tensor), tensors, "all_gather", (tensors, tensor), {}),
        (lambda: collective.gather(tensor, tensors), tensors, "gather", (tensor, tensors, 0), {}),
        (lambda: collective.gather(tensor, [], dst=2), [], "gather", (tensor, None, 2), {}),
        (lambda: collective.scatter(tensor, tensors), tensor, "scatter", (tensor, tensors, 0), {}),
        (lambda: collective.scatter(tensor, [], src=2), tensor, "scatter", (tensor, None, 2), {}),
        (lambda: collective.reduce_scatter(tensor, tensors), tensor, "reduce_scatter", (tensor, tensors), {"op": op.SUM}),
        (lambda: collective.all_to_all(tensors, objects), tensors, "all_to_all", (tensors, objects), {}),
        (lambda: collective.send(tensor, 2), None, "send", (tensor, 2), {"tag": 0}),
        (lambda: collective.send(tensor, 2, tag=7), None, "send", (tensor, 2), {"tag": 7}),
        (lambda: collective.recv(tensor), tensor, "recv", (tensor, None), {"tag": 0}),
        (lambda: collective.recv(tensor, 2, tag=7), tensor, "recv", (tensor, 2), {"tag": 7}),
        (lambda: collective.barrier([1]), None, "barrier", (), {"device_ids": [1]}),
        (lambda: collective.monitored_barrier(), None, "monitored_barrier", (), {"timeout": None, "wait_all_ranks": False}),
        (lambda: collective.all_gather_object(objects, 1), objects, "all_gather_object", (objects, 1), {}),
        (
            lambda: collective.broadcast_object_list(objects, 2), objects, "broadcast_object_list", (objects, 2), {"device": None},
        ),
        (lambda: collective.gather_object(1, objects), objects, "gather_object", (1, objects, 0), {}),
        (lambda: collective.gather_object(1, [], 2), [], "gather_object", (1, None, 2), {}),
        (lambda: collective.scatter_object_list(objects, [1]), objects, "scatter_object_list", (objects, [1], 0), {}),
    ):  # fmt: skip
        calls.clear()
        found = got()
        assert found == [] if returned == [] else found is returned, name
        assert calls[0] == (name, args, {**of_group, **kwargs})
    assert tensor.tolist() == [1.0, 1.0]
    # torch's transports do not all know a mean.
    assert collective.all_reduce(torch.ones(2), "mean").tolist() == [0.25, 0.25]
    assert collective.reduce_scatter(torch.ones(2), tensors, "mean").tolist() == [0.25, 0.25]
    assert collective.reduce(torch.ones(2), 1, "mean").tolist() == [0.25, 0.25]
    assert collective.reduce(torch.ones(2), 0, "mean").tolist() == [1.0, 1.0]
    destroyed = []
    monkeypatch.setattr(dist, "destroy_process_group", destroyed.append)
    assert collective.teardown() is collective and destroyed == []
    monkeypatch.setitem(dist.distributed_c10d._world.pg_map, "group", ("gloo", None))
    collective.create_group().teardown()
    assert destroyed == ["group"]
    monkeypatch.setattr(dist, "is_available", lambda: False)
    assert not TorchCollective.is_available()
    with pytest.raises(RuntimeError, match="built without torch.distributed"):
        TorchCollective()


def test_who_connected_a_process_disconnects_it(monkeypatch):
    calls = []
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(group_collectives, "disconnect_processes", noting(calls, "disconnect"))
    monkeypatch.setattr(dist, "new_group", lambda: "group")
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda **how: calls.append((os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], how)),
    )
    collective = TorchCollective()
    with pytest.raises(RuntimeError, match=r"TorchCollective has no group yet. Call create_group\(\) before"):
        collective.teardown()
    assert not collective.is_initialized()
    assert collective.setup("here", "2", backend="gloo") is collective
    assert calls == [("here", "2", {"backend": "gloo"})] and os.environ["MASTER_PORT"] == "1"
    for _ in range(2):
        collective.create_group().teardown()
    assert [call[0] for call in calls] == ["here", "disconnect"]
    monkeypatch.setenv("MASTER_ADDR", "there")
    TorchCollective.init_group(rank=0)
    assert calls[-1] == ("there", "1", {"rank": 0})


def test_one_process_gets_back_what_it_gives():
    alone = SingleDeviceCollective()
    assert (alone.rank, alone.world_size, alone.is_available(), alone.is_initialized()) == (0, 1, True, True)
    assert alone.setup(anything=1) is alone and alone.create_group() is alone and alone.group is not None
    tensor, other = torch.ones(1), torch.zeros(1)
    for same in (alone.broadcast, alone.all_reduce, alone.reduce, alone.recv):
        assert same(tensor, 0) is tensor
    assert alone.all_gather([other], tensor) == alone.gather(tensor, [other], 0) == [tensor]
    assert alone.scatter(other, [tensor], 0) is alone.reduce_scatter(other, [tensor]) is tensor
    assert alone.all_to_all([other], [tensor]) == [tensor]
    assert alone.send(tensor, 0) is alone.barrier() is alone.init_group() is None
    assert alone.teardown() is alone
    with pytest.raises(RuntimeError, match="SingleDeviceCollective has no group yet"):
        assert alone.group
