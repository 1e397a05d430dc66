"""What a loader's samplers hold, read again and again."""

from __future__ import annotations

import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from levin.resume.sampler_state import SamplerState


def test_a_generator_that_a_program_exchanges_is_the_one_that_is_read():
    sampler = RandomSampler(range(5), generator=torch.Generator().manual_seed(1))
    state = SamplerState(DataLoader(range(5), batch_sampler=BatchSampler(sampler, 2, drop_last=False)))
    before = state.read()
    assert repr(state.read()) == repr(before)
    sampler.generator = torch.Generator().manual_seed(2)
    after = state.read()
    assert repr(after) != repr(before)
    list(sampler)
    state.write(after)
    assert torch.equal(sampler.generator.get_state(), torch.Generator().manual_seed(2).get_state())
