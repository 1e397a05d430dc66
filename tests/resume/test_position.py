"""A run that stopped at any batch goes on with the batches of the unbroken one."""

from __future__ import annotations

import io
import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from levin.data.combined import Joint
from levin.resume.position import Position
from levin.utilities.rng_states import collect_rng_states, set_rng_states
from tests.data.loaders_for_tests import (
    RESUMABLE,
    SAMPLERS,
    Config,
    ContinuingStream,
    CountingStream,
    EagerStream,
    StatefulStream,
    Stream,
)

EPOCHS = 3
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    numpy.random.seed(number)


def train_step() -> None:
    """What a model with dropout does to the generators of the process."""
    torch.rand(3)
    random.random()
    numpy.random.randn()


def with_lookahead(iterator: Iterator[Any], lookahead: int) -> Iterator[tuple[Any, int]]:
    """Yield each batch with how many are held back."""
    held: list[Any] = []
    for item in iterator:
        held.append(item)
        if len(held) > lookahead:
            yield held.pop(0), len(held)
    while held:
        yield held.pop(0), len(held)


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class Run:
    """Iterates a loader for some epochs, from where a state says, and keeps what it sees."""

    def __init__(
        self, make: Callable[[], Any], limit: int | None = None, lookahead: int = 0, epochs: int = EPOCHS,
        keeps_limit: bool = False,
    ) -> None:  # fmt: skip
        self.loader = make()
        # Whether nothing is taken ahead beyond the limit, as a feed does.
        self.keeps_limit = keeps_limit
        self.epochs = epochs
        self.limit = limit
        self.lookahead = lookahead
        self.position = Position()
        self.seen: list[Any] = []
        self.place = (0, 0)

    def go(self, state: Any = None, stop: tuple[int, int] | None = None) -> Any:
        """Return the state at batch ``stop`` = (epoch, number of batches done), or None at the end."""
        first, begun = 0, 0
        if state is not None:
            state = saved_and_loaded(state)
            first, begun = state["epoch"], state["num_done"]
            self.position.load_state_dict(state["position"])
            set_rng_states(state["rng"])
        for epoch in range(first, self.epochs):
            num_done = begun if epoch == first else 0
            self.place = (epoch, num_done)
            pulled = self.position.iterate(self.loader, self.lookahead)
            if self.limit is not None and self.keeps_limit:
                pulled = itertools.islice(pulled, self.limit - num_done)
            batches = with_lookahead(pulled, self.lookahead)
            if num_done != self.limit:
                for batch, _held in batches:
                    self.seen.append((epoch, num_done, batch))
                    train_step()
                    num_done += 1
                    self.place = (epoch, num_done)
                    if stop == (epoch, num_done):
                        return self.state(epoch, num_done)
                    if num_done == self.limit:
                        break
            batches.close()
            self.position.finish()
            if stop is not None and stop[0] == epoch and stop[1] >= num_done:
                return self.state(epoch + 1, None)
        return None

    def state(self, epoch: int, num_done: int | None) -> Any:
        return {
            "epoch": epoch,
            "num_done": num_done or 0,
            "position": self.position.state_dict(num_done),
            "rng": collect_rng_states(),
        }


def check(
    make: Callable[[], Any],
    stop: tuple[int, int],
    limit: int | None = None,
    lookahead: int = 0,
    keeps_limit: bool = False,
) -> None:
    seed(11)
    unbroken = Run(make, limit, lookahead, keeps_limit=keeps_limit)
    unbroken.go()
    seed(11)
    stopped = Run(make, limit, lookahead, keeps_limit=keeps_limit)
    state = stopped.go(stop=stop)
    seed(99)
    resumed = Run(make, limit, lookahead, keeps_limit=keeps_limit)
    if state is not None:
        resumed.go(state)
    assert stopped.seen + resumed.seen == unbroken.seen


in_process = st.builds(
    Config,
    sampler=st.sampled_from(RESUMABLE),
    sources=st.sampled_from(["", "t", "p", "n", "o", "g", "l", "tpnogl"]),
    batch_size=st.integers(1, 5),
    collates=st.booleans(),
)
in_workers = st.builds(
    Config,
    sampler=st.sampled_from(RESUMABLE),
    sources=st.sampled_from(["", "tpn", "ogl", "tpnogl"]),
    batch_size=st.integers(2, 5),
    num_workers=st.integers(1, 3),
    persistent=st.booleans(),
    prefetch=st.integers(1, 3),
    collates=st.booleans(),
    inits=st.booleans(),
)
stops = st.tuples(st.integers(0, EPOCHS - 1), st.integers(1, 30))


@examples(150)
@given(config=in_process, stop=stops, limit=st.none() | st.integers(1, 9), lookahead=st.integers(0, 2))
def test_loader_without_workers_goes_on_exactly(config, stop, limit, lookahead):
    check(config.make, stop, limit, lookahead)


@examples(20)
@given(config=in_workers, stop=stops, limit=st.none() | st.integers(1, 9), lookahead=st.integers(0, 2))
def test_loader_with_workers_goes_on_exactly(config, stop, limit, lookahead):
    check(config.make, stop, limit, lookahead)


class Ended(RuntimeError):
    """What torch raises in the main process, wherever it is, when a worker was ended by a signal."""


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["index", "iterable"])
def test_an_epoch_whose_workers_end_when_they_get_work_is_begun_again(kind, persistent, lookahead, monkeypatch):
    index = Config(num_workers=2, sources="tpo", sampler="shuffle_generator", persistent=persistent).make
    iterable = stream_loader(StatefulStream, [5], 2, batch_size=1, persistent=persistent)
    make = index if kind == "index" else iterable
    seed(11)
    unbroken = Run(make, 6, lookahead)
    unbroken.go()
    put_index = _MultiProcessingDataLoaderIter._try_put_index
    num_left = 0

    def put(iterator):
        nonlocal num_left
        num_left -= 1
        if num_left < 0:
            raise Ended
        put_index(iterator)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_try_put_index", put)
    seed(11)
    state, seen = None, []
    # Starting takes four of them, so that each epoch fails to begin, also where another was gone through before.
    for num_left in (0, 6, 0, 2, 9, 1, 12, 3, 4, 20, 1, 100):
        run = Run(make, 6, lookahead)
        try:
            run.go(state)
        except Ended:
            state = run.state(*run.place)
            seed(99)
        seen += run.seen
    assert num_left > 0
    assert seen == unbroken.seen


@pytest.mark.parametrize("persistent", [False, True])
def test_spawned_workers_go_on_exactly(persistent):
    forked = Config(sources="tpnol", num_workers=1, persistent=persistent, sampler="shuffle")
    spawned = replace(forked, context="spawn")
    seed(11)
    unbroken = Run(forked.make, limit=3, epochs=2)
    unbroken.go()
    seed(11)
    stopped = Run(spawned.make, limit=3, epochs=2)
    state = stopped.go(stop=(1, 2))
    resumed = Run(spawned.make, limit=3, epochs=2)
    resumed.go(state)
    assert stopped.seen + resumed.seen == unbroken.seen


@examples(40)
@given(config=in_process, sampler=st.sampled_from(sorted(SAMPLERS)), epochs=st.integers(1, 2))
def test_following_changes_no_number_without_workers(config, sampler, epochs):
    config = replace(config, sampler=sampler)
    assert followed(config, epochs) == plain(config, epochs)


@examples(5)
@given(config=in_workers, sampler=st.sampled_from(sorted(SAMPLERS)))
def test_following_changes_no_number_in_workers(config, sampler):
    config = replace(config, sampler=sampler)
    assert followed(config, 2) == plain(config, 2)


def followed(config: Config, epochs: int) -> list[Any]:
    loader, position = config.make(), Position()
    seed(3)
    result = [list(position.iterate(loader)) for _ in range(epochs)]
    return [*result, torch.rand(1).item(), random.random(), numpy.random.rand()]


def plain(config: Config, epochs: int) -> list[Any]:
    loader = config.make()
    seed(3)
    result = [list(loader) for _ in range(epochs)]
    return [*result, torch.rand(1).item(), random.random(), numpy.random.rand()]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_following_changes_no_turn_of_workers(num_workers):
    def make() -> DataLoader[Any]:
        return DataLoader(
            StatefulStream([5, 3, 4], noise=False), batch_size=2, num_workers=num_workers, collate_fn=list
        )

    position = Position()
    assert [list(position.iterate(make())), list(position.iterate(make()))] == [list(make())] * 2


@pytest.mark.parametrize("sampler", ["sequential", "shuffle", "subset", "in_place", "buckets"])
def test_seen_samples_are_not_loaded_again(sampler):
    config = Config(sampler=sampler, sources="t")
    seed(1)
    stopped = Run(config.make)
    state = stopped.go(stop=(0, 4))
    resumed = Run(config.make)
    iterator = None
    resumed.position.load_state_dict(state["position"])
    iterator = resumed.position.iterate(resumed.loader)
    next(iterator)
    assert len(resumed.loader.dataset.loaded) <= 5
    assert len(stopped.loader.dataset.loaded) > 4


def test_random_states_of_the_process_stay_as_they_were():
    for config in (Config(sampler="shuffle"), Config(sampler="buckets"), Config(num_workers=1)):
        seed(1)
        state = Run(config.make).go(stop=(1, 3))
        seed(2)
        before = [torch.rand(1).item(), random.random(), numpy.random.rand()]
        seed(2)
        position = Position()
        position.load_state_dict(state["position"])
        position.iterate(config.make())
        assert [torch.rand(1).item(), random.random(), numpy.random.rand()] == before


def test_saving_twice_without_going_on_gives_the_same_state():
    state = Run(Config().make).go(stop=(1, 3))["position"]
    position = Position()
    position.load_state_dict(state)
    assert position.state_dict() == state


def test_new_position_has_no_state():
    assert Position().state_dict() == {}
    position = Position()
    position.load_state_dict({})
    assert len(list(position.iterate(Config().make()))) == 8


# ---------------------------------------------------------------- iterable data sets


def stream_loader(kind: type[Stream], sizes: list[int], num_workers: int, **kwargs: Any) -> Callable[[], DataLoader]:
    persistent = kwargs.pop("persistent", False)
    stream_kwargs = {key: kwargs.pop(key) for key in ("noise", "resets") if key in kwargs}

    def make() -> DataLoader:
        return DataLoader(
            kind(sizes, **stream_kwargs),
            num_workers=num_workers,
            collate_fn=list,
            persistent_workers=persistent and num_workers > 0,
            **kwargs,
        )

    return make


@examples(150)
@given(
    size=st.integers(0, 20),
    batch_size=st.integers(1, 4),
    drop_last=st.booleans(),
    resets=st.booleans(),
    stop=stops,
    limit=st.none() | st.integers(1, 5),
    lookahead=st.integers(0, 2),
    kind=st.sampled_from([StatefulStream, ContinuingStream, CountingStream]),
)
def test_data_set_with_state_goes_on_exactly(size, batch_size, drop_last, resets, stop, limit, lookahead, kind):
    make = stream_loader(kind, [size], 0, batch_size=batch_size, drop_last=drop_last, resets=resets)
    check(make, stop, limit, lookahead)


@examples(20)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=3),
    num_workers=st.integers(1, 3),
    persistent=st.booleans(),
    batch_size=st.integers(1, 3),
    resets=st.booleans(),
    stop=stops,
    lookahead=st.integers(0, 2),
    kind=st.sampled_from([StatefulStream, ContinuingStream, CountingStream]),
)
def test_data_set_with_state_in_workers_goes_on_exactly(
    sizes, num_workers, persistent, batch_size, resets, stop, lookahead, kind
):
    make = stream_loader(kind, sizes, num_workers, batch_size=batch_size, persistent=persistent, resets=resets)
    check(make, stop, None, lookahead)


def test_workers_of_an_epoch_of_which_nothing_was_taken_begin_in_their_turns():
    make = stream_loader(StatefulStream, [3, 3, 3], 3, batch_size=1)
    position, later = Position(), Position()
    batches = position.iterate(make(), lookahead=1)
    saved = position.state_dict()
    later.load_state_dict(saved)
    whole = list(batches)
    assert list(later.iterate(make(), lookahead=1)) == whole
    assert len({str(batch) for batch in whole[:3]}) == 3


@pytest.mark.parametrize("kind", [StatefulStream, EagerStream])
def test_a_worker_that_has_ended_gives_no_more_in_its_epoch(kind):
    check(stream_loader(kind, [6, 1], 2, batch_size=2), (1, 3), None)


@pytest.mark.parametrize("kind", [StatefulStream, ContinuingStream, CountingStream])
@pytest.mark.parametrize(("limit", "batch_size"), [(None, 1), (3, 1), (None, 2)])
def test_a_worker_that_lives_on_and_has_given_nothing_in_its_epoch_begins_it(kind, limit, batch_size):
    check(stream_loader(kind, [5], 2, batch_size=batch_size, persistent=True), (1, 1), limit)


@examples(25)
@given(
    size=st.integers(0, 7),
    num_workers=st.integers(1, 2),
    batch_size=st.integers(1, 3),
    prefetch=st.integers(1, 3),
    drop_last=st.booleans(),
    resets=st.booleans(),
    limit=st.none() | st.integers(1, 6),
    stop=st.tuples(st.integers(0, EPOCHS - 1), st.integers(1, 7)),
    lookahead=st.integers(0, 2),
    kind=st.sampled_from([StatefulStream, EagerStream, ContinuingStream, CountingStream]),
)
@example(5, 1, 2, 2, True, False, None, (1, 1), 1, StatefulStream)  # ended with a batch that is dropped
@example(2, 2, 1, 1, False, True, 4, (1, 3), 0, ContinuingStream)  # left at the last items, one end is seen
@example(1, 2, 1, 1, False, False, 2, (2, 1), 1, ContinuingStream)  # ended once more, with nothing given since
@example(4, 2, 1, 2, False, False, 3, (1, 2), 0, EagerStream)  # iterated once for the epoch that goes on
def test_workers_that_live_on_go_on_exactly_after_a_limit(
    size, num_workers, batch_size, prefetch, drop_last, resets, limit, stop, lookahead, kind
):
    # Workers with as many samples each: otherwise it depends on time how far one runs ahead when another has ended.
    make = stream_loader(
        kind, [size], num_workers, batch_size=batch_size, persistent=True, drop_last=drop_last, resets=resets,
        prefetch_factor=prefetch,
    )  # fmt: skip
    check(make, stop, limit, lookahead, keeps_limit=True)


@pytest.mark.parametrize("kind", [StatefulStream, EagerStream, ContinuingStream, CountingStream])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("drop_last", [False, True])
def test_data_set_left_at_a_limit_goes_on_exactly(kind, lookahead, drop_last):
    for size, batch_size, limit in itertools.product(range(1, 5), (1, 2), (1, 2, 3)):
        make = stream_loader(kind, [size], 0, batch_size=batch_size, drop_last=drop_last)
        for stop in ((0, limit), (1, 1)):
            check(make, stop, limit, lookahead, keeps_limit=True)


@examples(100)
@given(
    size=st.integers(0, 7),
    batch_size=st.integers(1, 3),
    stop=stops,
    kind=st.sampled_from([StatefulStream, CountingStream]),
)
def test_an_end_that_was_seen_ahead_draws_its_numbers_once(size, batch_size, stop, kind):
    check(stream_loader(kind, [size], 0, batch_size=batch_size, drop_last=True), stop, None, lookahead=2)


@pytest.mark.parametrize("stop", [(0, 1), (0, 2)])
@pytest.mark.parametrize(("num_workers", "limit"), [(0, None), (0, 1), (1, None)])
@pytest.mark.parametrize("kind", [StatefulStream, ContinuingStream, CountingStream])
def test_data_set_with_state_begins_the_next_epoch_at_its_start(kind, num_workers, limit, stop):
    check(stream_loader(kind, [1], num_workers, batch_size=2, persistent=True), stop, limit)
    check(stream_loader(kind, [5], num_workers, batch_size=2, persistent=True), stop, limit)


def test_data_set_in_flight_begins_the_next_epoch_at_its_start():
    check(stream_loader(StatefulStream, [3], 0, batch_size=1), (0, 1), None, lookahead=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_iterable_without_state_is_read_again_with_a_warning(num_workers):
    make = stream_loader(Stream, [9, 5], num_workers, batch_size=2)
    with pytest.warns(UserWarning, match="first 3 batches are read again"):
        check(make, (1, 3))


@pytest.mark.parametrize("make", [lambda: [1, 2, 3, 4, 5], lambda: range(5), lambda: (1, 2, 3)])
def test_sequence_goes_on_without_a_warning(make):
    check(make, (1, 2))


def test_any_iterable_is_read_again():
    class Lines:
        def __iter__(self):
            return iter("abcdef")

    with pytest.warns(UserWarning, match="Lines cannot say where it is"):
        check(Lines, (1, 2))


def test_data_loader_that_changes_its_batches_is_read_again():
    class Doubled(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch
                yield batch

    with pytest.warns(UserWarning, match="Doubled cannot say where it is"):
        check(lambda: Doubled(range(10), batch_size=2, shuffle=True, collate_fn=list), (1, 3))


class StatefulLoader:
    def __init__(self) -> None:
        self.index = 0

    def __iter__(self):
        while self.index < 7:
            self.index += 1
            yield self.index
        self.index = 0

    def state_dict(self):
        return {"index": self.index}

    def load_state_dict(self, state):
        self.index = state["index"]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("stop", [(0, 1), (1, 3), (1, 4), (2, 6), (1, 7), (0, 8)])
def test_loader_with_state_goes_on_through_it(stop, lookahead, limit):
    check(StatefulLoader, stop, limit, lookahead)


class RestartingLoader(StatefulLoader):
    """Goes on from a loaded state once, and starts again otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = 0

    def __iter__(self):
        begin, self.begin = self.begin, 0
        for self.index in range(begin + 1, 8):
            yield self.index

    def load_state_dict(self, state):
        self.index = self.begin = state["index"]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("limit", [None, 4])
@pytest.mark.parametrize("stop", [(0, 1), (1, 4), (1, 7), (0, 8)])
def test_loader_that_goes_on_once_starts_the_next_epoch_anew(stop, lookahead, limit):
    check(RestartingLoader, stop, limit, lookahead)


class Drawing:
    """An iterable without state whose own generator goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.rng = random.Random(1)

    def __iter__(self):
        for _ in range(5):
            yield self.rng.random()


@pytest.mark.parametrize("stop", [(0, 2), (1, 5), (0, 6)])
@pytest.mark.filterwarnings("ignore:Drawing cannot say where it is")
def test_generator_of_an_iterable_goes_on_in_the_next_epoch(stop):
    check(Drawing, stop)
    check(Drawing, stop, limit=3)


@pytest.mark.parametrize(
    ("stop", "limit", "num_workers"),
    [
        ((0, 2), None, 0), ((1, 3), None, 0), ((0, 9), None, 0), ((0, 9), 4, 0), ((1, 4), 4, 0),
        ((1, 3), None, 2), ((0, 9), 4, 2),
    ],
)  # fmt: skip
def test_torchdata_loader_goes_on_through_its_state(stop, limit, num_workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader")
    torch_data = list(range(12))

    def make() -> Any:
        return stateful.StatefulDataLoader(torch_data, batch_size=2, shuffle=True, num_workers=num_workers)

    seen = []
    for state in (None, stop):
        seed(4)
        run = Run(make, limit)
        seen.append([run, run.go(stop=state)])
    resumed = Run(make, limit)
    resumed.go(seen[1][1])
    whole = [batch.tolist() for _, _, batch in seen[0][0].seen]
    assert [batch.tolist() for _, _, batch in seen[1][0].seen + resumed.seen] == whole


# ---------------------------------------------------------------- joint loaders


@examples(80)
@given(
    first=in_process,
    second=in_process,
    mode=st.sampled_from(["min_size", "max_size_cycle", "max_size"]),
    stop=stops,
    limit=st.none() | st.integers(1, 9),
    lookahead=st.integers(0, 1),
)
def test_joint_loaders_go_on_exactly(first, second, mode, stop, limit, lookahead):
    check(lambda: Joint([first.make(), range(4), second.make()], mode, list), stop, limit, lookahead)


@examples(4)
@given(mode=st.sampled_from(["min_size", "max_size_cycle", "max_size"]), stop=stops, persistent=st.booleans())
def test_joint_loaders_with_workers_go_on_exactly(mode, stop, persistent):
    first = Config(sources="tpnogl", num_workers=2, persistent=persistent)
    second = Config(sources="t", sampler="in_place", batch_size=5)
    check(lambda: Joint([first.make(), second.make()], mode, list), stop)


@pytest.mark.parametrize("stop", [(0, 2), (0, 3), (0, 5), (0, 6)])
def test_exhausted_joint_loader_gives_again_in_the_next_epoch(stop):
    check(lambda: Joint([range(5), range(2)], "max_size", list), stop)


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
@pytest.mark.parametrize("sizes", [(6, 4), (4, 6), (4, 8), (6, 6), (2, 4), (1, 4)])
def test_last_joint_batch_is_given_again_when_the_end_was_seen(mode, sizes):
    def make() -> Joint:
        return Joint(
            [DataLoader(range(size), batch_size=2, shuffle=True, collate_fn=list) for size in sizes], mode, list
        )

    seed(7)
    position = Position()
    batches = list(position.iterate(make(), lookahead=1))
    state = saved_and_loaded(position.state_dict(len(batches) - 1))
    later = Position()
    later.load_state_dict(state)
    assert list(later.iterate(make(), lookahead=1)) == batches[-1:]


# ---------------------------------------------------------------- what cannot be exact


def go_on_with(before: Config, after: Config, stop: tuple[int, int]) -> list[int]:
    """Return the samples of the epoch in which ``before`` is stopped and ``after`` goes on."""
    seed(5)
    stopped = Run(before.make)
    state = stopped.go(stop=stop)
    position = Position()
    position.load_state_dict(state["position"])
    rest = list(position.iterate(after.make()))
    batches = [batch for epoch, _, batch in stopped.seen if epoch == stop[0]] + rest
    return [index for batch in batches for index, *_ in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_sample_is_seen_once_with_another_batch_size(num_workers):
    before, after = (Config(batch_size=size, num_workers=num_workers) for size in (3, 4))
    with pytest.warns(UserWarning, match="batch_size was 3"):
        samples = go_on_with(before, after, (0, 5))
    assert sorted(samples) == list(range(23))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("sampler", ["subset", "weighted", "eager_python", "in_place", "plain_list"])
def test_the_order_of_any_sampler_goes_on_with_another_batch_size(sampler, num_workers):
    before, after = (Config(sampler=sampler, batch_size=size, num_workers=num_workers) for size in (3, 4))
    seed(5)
    unbroken = Run(before.make)
    unbroken.go()
    with pytest.warns(UserWarning, match="batch_size was 3.*every sample is still seen once"):
        samples = go_on_with(before, after, (1, 4))
    assert samples == [index for epoch, _, batch in unbroken.seen if epoch == 1 for index, *_ in batch]


def test_samples_may_be_left_out_with_other_batches_of_an_own_batch_sampler():
    class Groups(BatchSampler):
        pass

    def loader(size: int) -> DataLoader:
        return DataLoader(range(23), batch_sampler=Groups(SequentialSampler(range(23)), size, False))

    position, later = Position(), Position()
    batches = position.iterate(loader(3))
    next(batches)
    later.load_state_dict(position.state_dict())
    with pytest.warns(UserWarning, match="batch_size was 3.*some samples may be left out"):
        assert next(later.iterate(loader(2))).tolist() == [4, 5]


@pytest.mark.parametrize(("num_workers", "in_order"), [(2, False), (2, True), (1, False)])
def test_batches_that_come_in_the_order_of_time_are_told_of(num_workers, in_order):
    def loader() -> DataLoader:
        return DataLoader(range(8), batch_size=2, num_workers=num_workers, in_order=in_order)

    position, later = Position(), Position()
    batches = position.iterate(loader())
    next(batches)
    later.load_state_dict(position.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(later.iterate(loader()))) == len(list(batches)) == 3
    told = [str(warning.message) for warning in caught if "in_order" in str(warning.message)]
    assert len(told) == (num_workers > 1 and not in_order)


def test_order_goes_on_with_another_number_of_workers():
    config = Config(num_workers=2)
    whole = [index for batch in plain(Config(num_workers=2), 1)[0] for index, *_ in batch]
    with pytest.warns(UserWarning, match="num_workers was 2"):
        samples = go_on_with(config, Config(num_workers=1), (0, 3))
    assert sorted(samples) == sorted(whole)


def test_another_data_set_is_noticed():
    state = Run(Config().make).go(stop=(0, 3))["position"]
    position = Position()
    position.load_state_dict(state)
    with pytest.warns(UserWarning, match="had 23 samples"):
        position.iterate(DataLoader(range(40), batch_size=3))


def test_other_order_of_a_sampler_is_noticed():
    first = Config(sampler="plain_list").make()
    position = Position()
    iterator = position.iterate(first)
    next(iterator)
    state = position.state_dict()
    later = Position()
    later.load_state_dict(state)
    with pytest.warns(UserWarning, match="list gives other indices"):
        later.iterate(DataLoader(first.dataset, sampler=[1, 2, 3, 4] * 6, batch_size=3, collate_fn=list))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("sampler", ["lazy_globals", "blind"])
def test_sampler_whose_order_cannot_be_drawn_again_is_told_of(sampler, num_workers):
    config = Config(sampler=sampler, num_workers=num_workers)
    seed(5)
    stopped = Run(config.make)
    state = stopped.go(stop=(1, 3))
    resumed = Run(config.make)
    with pytest.warns(UserWarning, match="gives other indices than before the restart.*`state_dict`"):
        resumed.go(state)
    # It goes on after as many batches, and draws its next epochs.
    assert [place[:2] for place in stopped.seen + resumed.seen] == [(epoch, i) for epoch in range(3) for i in range(8)]


def test_state_too_large_is_reported():
    class Large(StatefulStream):
        def state_dict(self):
            return {"made": self.made, "ballast": bytes(100_000)}

    make = stream_loader(Large, [9], 1, batch_size=2)
    state = Run(make).go(stop=(0, 2))["position"]
    position = Position()
    position.load_state_dict(state)
    with pytest.warns(UserWarning, match="too large"):
        position.iterate(make())
