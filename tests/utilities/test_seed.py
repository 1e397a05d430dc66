import io
import logging
import os
import random
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from levin.utilities import rng_states
from levin.utilities.seed import (
    MAX_SEED,
    collect_rng_states,
    isolate_rng,
    pl_worker_init_function,
    reset_seed,
    seed_everything,
    set_rng_states,
)


@pytest.fixture(autouse=True)
def _no_seed_in_the_environment(monkeypatch):
    # Set first, so that what seed_everything writes is undone as well.
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    with isolate_rng():
        yield


def draw():
    return [
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item(), torch.randn(1).item()
    ]  # fmt: skip


def test_the_same_seed_gives_the_same_numbers():
    assert seed_everything(7) == 7
    first = draw()
    assert draw() != first
    seed_everything(7)
    assert draw() == first


def test_generators_that_are_not_in_use_have_no_state():
    names = {"torch", "python", "numpy"} | ({"torch.cuda"} if torch.cuda.is_initialized() else set())
    assert set(collect_rng_states()) == names
    assert set(collect_rng_states(include_cuda=False)) == {"torch", "python", "numpy"}


def test_numbers_are_those_of_the_plain_generators():
    seed_everything(3)
    numbers = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    assert numbers == (random.random(), np.random.rand(), torch.rand(1).item())


def test_seed_is_left_in_the_environment():
    seed_everything(5, workers=True)
    assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert os.environ["PL_SEED_WORKERS"] == "1"
    assert seed_everything() == 5
    assert os.environ["PL_SEED_WORKERS"] == "0"


def test_without_any_seed_zero_is_used_with_a_warning():
    with pytest.warns(UserWarning, match="No seed found"):
        assert seed_everything() == 0


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, "x", [1], 1j])
def test_wrong_seed_is_an_error_with_the_value(seed):
    with pytest.raises(ValueError, match="seed must be an integer from 0 to 4294967295, received"):
        seed_everything(seed)


@pytest.mark.parametrize("text", ["x", "3.5", "-2"])
def test_wrong_seed_in_the_environment_names_the_variable(monkeypatch, text):
    monkeypatch.setenv("PL_GLOBAL_SEED", text)
    with pytest.raises(ValueError, match="PL_GLOBAL_SEED must be"):
        seed_everything()


def test_limits_of_the_range_are_accepted():
    assert seed_everything(0) == 0
    assert seed_everything(MAX_SEED) == MAX_SEED


def test_verbose_logs_the_seed(caplog):
    with caplog.at_level(logging.INFO, logger="levin"):
        seed_everything(9)
        seed_everything(10, verbose=False)
    assert [record.message for record in caplog.records] == ["Seed set to 9"]


def test_reset_seed_goes_back_to_the_seed_and_keeps_the_workers_flag():
    before = draw()
    reset_seed()  # nothing to go back to
    assert draw() != before
    seed_everything(4, workers=True)
    first = draw()
    reset_seed()
    assert draw() == first
    assert os.environ["PL_SEED_WORKERS"] == "1"


def test_isolate_rng_restores_all_generators_also_after_an_error():
    seed_everything(1)
    draw()
    states = collect_rng_states()
    expected = draw()
    set_rng_states(states)
    with pytest.raises(RuntimeError), isolate_rng():
        draw()
        raise RuntimeError
    assert draw() == expected


def test_states_survive_a_file_that_is_read_without_running_code():
    seed_everything(1)
    random.gauss(0, 1), np.random.randn()  # both keep a second number back
    file = io.BytesIO()
    torch.save(collect_rng_states(), file)
    expected = draw()
    file.seek(0)
    set_rng_states(torch.load(file, weights_only=True))
    assert draw() == expected


def test_states_in_the_plain_forms_of_the_libraries_are_accepted():
    seed_everything(1)
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    expected = draw()
    states["python"] = [states["python"][0], list(states["python"][1]), states["python"][2]]
    set_rng_states(states)
    assert draw() == expected


def test_generators_that_are_not_named_are_left_alone():
    state = torch.get_rng_state()
    set_rng_states({})
    set_rng_states({"python": random.getstate()})
    assert torch.equal(state, torch.get_rng_state())


def _worker_numbers(base_seed, worker_id, rank):
    torch.manual_seed(base_seed + worker_id)
    pl_worker_init_function(worker_id, rank)
    return tuple(draw())


def test_each_worker_of_each_rank_draws_its_own_numbers():
    numbers = [_worker_numbers(11, worker, rank) for worker in range(4) for rank in range(4)]
    for column in zip(*numbers, strict=True):
        assert len(set(column)) == 16
    assert _worker_numbers(11, 2, 3) == numbers[4 * 2 + 3]
    assert _worker_numbers(12, 2, 3) != numbers[4 * 2 + 3]


def test_the_numbers_of_a_worker_are_the_same_in_every_version():
    torch.manual_seed(13)
    pl_worker_init_function(2, 3)
    assert (torch.initial_seed(), random.getrandbits(32), np.random.randint(2**31)) == (
        16774692172850418234,
        153927960,
        566949943,
    )


class Draws(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor(draw())


def test_worker_seeding_inside_a_loader():
    def rows():
        torch.manual_seed(2)
        return torch.cat(list(DataLoader(Draws(), num_workers=2, worker_init_fn=pl_worker_init_function)))

    first = rows()
    assert len(first.unique(dim=0)) == 8
    assert torch.equal(first, rows())


@pytest.mark.parametrize("reads_memory", [True, False])
def test_the_state_of_python_is_read_as_it_is(monkeypatch, reads_memory):
    assert rng_states._can_read_memory() == (sys.implementation.name == "cpython")
    monkeypatch.setattr(rng_states, "_can_read_memory", lambda: reads_memory)
    for seed in range(40):
        random.seed(seed)
        for _ in range(seed * 40):  # past the end of the 624 words
            random.random()
        if seed % 2:
            random.gauss(0, 1)  # of two numbers, one waits
        state = rng_states.ProcessRng().read(("python",))["python"]
        assert rng_states.unpack_python(state) == random.getstate()


def test_the_state_of_numpy_is_that_of_the_generator_that_is_there():
    rng = rng_states.ProcessRng()
    own = np.random.get_bit_generator()
    try:
        for generator in (own, np.random.MT19937(1), np.random.PCG64(2), np.random.MT19937(3), own):
            np.random.set_bit_generator(generator)
            for draw in (np.random.rand, np.random.randn, np.random.randn, int):
                draw()
                read = rng_states.unpack_arrays(rng.read(("numpy",))["numpy"])
                np.testing.assert_equal(read, np.random.get_state(legacy=False))
    finally:
        np.random.set_bit_generator(own)


def test_the_state_of_numpy_is_not_read_again_before_a_number_is_drawn():
    rng = rng_states.ProcessRng()
    np.random.seed(0)
    first = rng.read(("numpy",))["numpy"]
    assert rng.read(("numpy",))["numpy"] is first
    np.random.rand()
    assert rng.read(("numpy",))["numpy"] != first
