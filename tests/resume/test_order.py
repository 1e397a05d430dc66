"""The order of an epoch, listed again from what its first batches left behind."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from levin.resume.order import Rest, describe_order, list_order
from levin.resume.position import Position

SIZE = 23


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(8)


def shuffled_with(epoch: int, rank: int) -> DistributedSampler:
    sampler = DistributedSampler(range(SIZE), 2, rank, shuffle=True, seed=4)
    sampler.set_epoch(epoch)
    return sampler


LOADERS = {
    "in order": {},
    "shuffled": {"shuffle": True},
    "the loader's generator": {"shuffle": True, "generator": generator()},
    "the sampler's generator": {"sampler": RandomSampler(range(SIZE), generator=generator())},
    "one of two ranks": {"sampler": shuffled_with(epoch=3, rank=0)},
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_what_was_seen_is_the_beginning_of_the_listed_order(name, num_workers):
    torch.manual_seed(3)
    loader = DataLoader(range(SIZE), batch_size=2, num_workers=num_workers, **LOADERS[name])
    position = Position()
    batches = position.iterate(loader)
    # Something else draws between the beginning of the epoch and its first batch.
    torch.rand(3) if not num_workers else None
    seen = [index for _ in range(4) for index in next(batches).tolist()]
    state = position.state_dict()
    torch.manual_seed(99)
    before = torch.get_rng_state()
    order = list_order(state["order"])
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(order) == list(range(SIZE))
    step = 2 if name == "one of two ranks" else 1
    assert order[::step][: len(seen)] == seen


def test_samplers_that_repeat_or_are_not_known_have_no_order():
    for sampler in (RandomSampler(range(4), replacement=True), WeightedRandomSampler([1.0] * 4, 4)):
        assert describe_order(DataLoader(range(4), batch_size=2, sampler=sampler)) is None
    assert describe_order(DataLoader(range(4), batch_size=None)) is None


def test_ranks_share_what_is_left():
    rests = [Rest({"total": 10}, DistributedSampler(range(10), 3, rank), num_seen=3) for rank in range(3)]
    assert [list(rest) for rest in rests] == [[3, 6, 9], [4, 7], [5, 8]]
    assert [len(rest) for rest in rests] == [3, 2, 2]
