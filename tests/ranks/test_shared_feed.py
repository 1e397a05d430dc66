"""The batches that each of several ranks sees, the ranks being threads of this process."""

from __future__ import annotations

import itertools
import threading
from contextlib import contextmanager

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler

from levin.data.combined import Joint
from levin.data.samplers import DistributedSamplerWrapper, IndexBatchSampler
from levin.ranks.shared_feed import Peers, SharedFeed, _is_length_sure, _is_said_of_all_ranks

INF = float("inf")


class Stream:
    """Batches of unknown number; counts how many it has given."""

    def __init__(self, batches) -> None:
        self.batches, self.num_given = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.num_given += 1
            yield batch


class Known(Stream):
    """With a length, which may be wrong."""

    def __init__(self, batches, length=None) -> None:
        super().__init__(batches)
        self.length = len(batches) if length is None else length

    def __len__(self) -> int:
        return self.length


class Table:
    """Where the ranks meet.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size, self.said = size, [None] * size
        self.exchanges, self.num_talks = [0] * size, [7] * size  # something was said before the epoch
        self._barrier = threading.Barrier(size, timeout=10)

    def peers(self, rank: int) -> Peers:
        def meet(said):
            self.said[rank] = said
            self._barrier.wait()
            found = list(self.said)
            self._barrier.wait()
            return found

        def exchange(numbers):
            self.exchanges[rank] += 1
            return [list(map(float, row)) for row in meet(numbers)]

        return Peers(rank, self.size, exchange, lambda obj, src: meet(obj)[src], lambda: self.num_talks[rank])

    def run(self, work) -> list:
        """Return what ``work(rank)`` returned, or raised, for each rank."""
        found = [None] * self.size

        def target(rank):
            try:
                found[rank] = work(rank)
            except Exception as error:
                found[rank] = error
                if not isinstance(error, ValueError):
                    self._barrier.abort()

        threads = [threading.Thread(target=target, args=[rank]) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def steps(rows, rule="longest", talks=False, limits=None, at=lambda feed: None, starts=None, **settings):
    """Return for each rank ``(batch, index, loader, words)`` of each step, the table, and the feeds.

    Args:
        rows: The loaders of each rank.
        rule: As for the feed.
        talks: Whether steps talk to the other ranks.
        limits: Batches of each loader at most.
        at: Called with the feed in each step.
        starts: For each rank the index of its first batch, and the iterator that goes on there.
    """
    table, feeds = Table(len(rows)), [None] * len(rows)

    def work(rank):
        inside = []

        @contextmanager
        def uneven(is_filler, num_active):
            inside.append(f"{'filler' if is_filler else 'own'} of {num_active}")
            yield
            inside.clear()

        sources = rows[rank]
        lengths = [len(source) if hasattr(source, "__len__") else INF for source in sources]
        feeds[rank] = feed = SharedFeed(
            sources, limits or [INF] * len(sources), lengths, torch.device("cpu"), peers=table.peers(rank), rule=rule,
            uneven=uneven, transfer=lambda batch, device, loader: f"{batch}@{loader}", **settings,
        )  # fmt: skip
        found = []
        for batch, index, loader in feed.iterate(*starts[rank]) if starts else feed:
            words = [*inside, *(["last"] if feed.is_last else [])]
            assert feed.is_filler == any("filler" in word for word in inside)
            assert feed.is_shared != bool(inside)
            found.append((batch, index, loader, ", ".join(words)))
            table.num_talks[rank] += talks
            at(feed)
        assert not feed.is_filler and not inside
        return found

    return table.run(work), table, feeds


def named(rank: int, num: int) -> list[str]:
    return [f"{'abc'[rank]}{number}" for number in range(num)]


def expected(counts, rule, talks):
    """Return what :func:`steps` does for one loader, of which each rank has so many batches."""
    num_steps = min(counts) if rule == "shortest" else max(counts)
    has_fillers = rule is not None or talks
    lent = next((f"{'abc'[rank]}0@0" for rank, count in enumerate(counts) if count), None)
    found = []
    for rank, own in enumerate(counts):
        batches = [f"{batch}@0" for batch in named(rank, own)]
        found.append([])
        for index in range(num_steps):
            num = sum(index < count for count in counts)
            is_last = index == num_steps - 1 or (rule is None and index == own - 1)
            words = ([f"own of {num}"] if num < len(counts) else []) + ["last"] * is_last
            if index < own:
                found[-1].append((batches[index], index, 0, ", ".join(words)))
            elif has_fillers or (own == 0 and index == 0):
                # One that never had a batch finds out with a lent one whether steps talk.
                batch = batches[-1] if batches else lent
                found[-1].append((batch, index, 0, ", ".join([f"filler of {num}", *words[1:]])))
    return found


@pytest.mark.parametrize("kind", [list, Known, Stream])
@pytest.mark.parametrize(
    ("rule", "talks"), [("longest", False), ("longest", True), ("shortest", False), (None, False), (None, True)]
)
@pytest.mark.filterwarnings("ignore:The ranks have")
def test_ranks_see_their_own_batches_and_fillers_up_to_the_same_step(kind, rule, talks):
    for counts in [*itertools.product((0, 1, 2, 3, 5), repeat=2), (13, 2), (3, 17), (9, 9), (2, 0, 4), (1, 4, 3)]:
        rows = [[kind(named(rank, num))] for rank, num in enumerate(counts)]
        found, table, feeds = steps(rows, rule, talks)
        assert found == expected(counts, rule, talks), counts
        # Lists say how long they are; of others the ranks ask how many batches are there, ever more at once.
        widths = (1, 2, 4, 8, 8)
        end = min(counts) if rule == "shortest" else max(counts)
        num_windows = sum(end > start for start in itertools.accumulate(widths, initial=0))
        num_windows = 0 if kind is list or not (kind is Stream or any(counts)) else max(1, num_windows)
        assert len(set(table.exchanges)) == 1
        if rule != "shortest":
            assert table.exchanges[0] == 1 + num_windows, counts
        assert [feed.lengths for feed in feeds] == [[INF if kind is Stream else num] for num in counts]


def test_batches_of_unknown_number_are_fetched_ahead_by_a_window_that_grows_to_eight():
    source, given = Stream(named(0, 40)), []
    steps(
        [[source], [Stream(named(1, 40))]],
        at=lambda feed: given.append(source.num_given) if feed.peers.rank == 0 else None,
    )
    assert given == [2, *[4] * 2, *[8] * 4, *[16] * 8, *[24] * 8, *[32] * 8, *[40] * 9]


@pytest.mark.parametrize("kind", [list, Known, Stream])
def test_loaders_come_one_after_the_other_and_the_last_that_any_rank_has_ends_the_epoch(kind):
    rows = [[kind(named(rank, num)) for num in counts] for rank, counts in enumerate([(2, 0, 1, 0), (1, 0, 2, 0)])]
    found, *_ = steps(rows, None)
    # That of streams is not known before the one behind it is asked.
    last = [] if kind is Stream else ["last"]
    assert found == [
        [("a0@0", 0, 0, ""), ("a1@0", 1, 0, "own of 1"), ("a0@2", 0, 2, "".join(last))],
        [("b0@0", 0, 0, ""), ("b0@2", 0, 2, ""), ("b1@2", 1, 2, ", ".join(["own of 1", *last]))],
    ]


@pytest.mark.parametrize("kind", [list, Known, Stream])
@pytest.mark.filterwarnings("error")
def test_limits_cut_what_there_is_and_make_ranks_even(kind):
    found, _, feeds = steps([[kind(named(0, 4))], [kind(named(1, 3))]], "error", limits=[2])
    assert found == [[(f"{name}{i}@0", i, 0, "last" * i) for i in range(2)] for name in "ab"]
    assert [feed.lengths for feed in feeds] == [[INF if kind is Stream else num] for num in (4, 3)]
    assert steps([[kind(named(0, 4))], [kind(named(1, 3))]], limits=[0])[0] == [[], []]


@pytest.mark.parametrize(
    ("kind", "rule", "numbers"),
    [(list, "error", "5, 3"), (Known, "error", "5, 3"), (Stream, "error", "3, 2"), (Stream, "shortest", "3, 2"), (list, "shortest", "5, 3")],
)  # fmt: skip
def test_different_numbers_are_told_where_that_is_asked_for(kind, rule, numbers):
    rows = [[kind(named(rank, num))] for rank, num in enumerate((5, 3))]
    if rule == "error":
        found, *_ = steps(rows, rule)
        assert {str(error) for error in found} == {
            f"All ranks must have the same number of training batches with uneven='error', received {numbers} (by rank; of those "
            "still to come, as far as they were fetched). Use uneven='longest' to train on all of them, or 'shortest' to leave out "
            "what others do not have."
        }
        return
    with pytest.warns(UserWarning) as caught:
        found, _, feeds = steps(rows, rule)
    assert {str(warning.message) for warning in caught} == {
        f"The ranks have {numbers} training batches still to come: with uneven='shortest' the epoch ends after "
        f"{numbers[-1]}, and the others are left out. Use uneven='longest' to train on all of them."
    }
    # Once on each rank, though there is another epoch.
    assert len(caught) == 2
    assert found == expected((5, 3), rule, False)


def test_a_length_that_says_too_much_is_told_and_not_believed_again():
    rows = [[Known(named(rank, 2), length)] for rank, length in enumerate((3, 2))]
    with pytest.warns(UserWarning, match="Known has a length of 3 and ended after 2 batches: the end") as caught:
        found, _, feeds = steps(rows)
    assert len(caught) == 1 and found == expected((2, 2), "longest", False)
    assert [feed.lengths for feed in feeds] == [[INF], [2]]
    # The shortest ends without having looked.
    with pytest.warns(UserWarning, match="The ranks have 3, 2 training batches") as caught:
        _, _, feeds = steps([[Known(named(rank, 5), length)] for rank, length in enumerate((3, 2))], "shortest")
    assert len(caught) == 2 and [feed.lengths for feed in feeds] == [[3], [2]]


def test_an_epoch_goes_on_where_it_was():
    class Position:
        def __init__(self, num_left):
            self.num_left, self.lookaheads = num_left, []

        def iterate(self, loader, lookahead=0):
            self.lookaheads.append(lookahead)
            return iter(list(loader)[1:])

    for kind, lookahead in ((list, 0), (Known, 9), (Stream, 9)):
        positions = [Position(None), Position(None)]
        rows = [[kind(named(0, 3))], [kind(named(1, 2))]]

        table = Table(2)

        def work(rank):
            @contextmanager
            def uneven(*_):
                yield

            lengths = [len(rows[rank][0]) if hasattr(rows[rank][0], "__len__") else INF]
            feed = SharedFeed(
                rows[rank], [INF], lengths, torch.device("cpu"), peers=table.peers(rank), rule="longest", uneven=uneven
            )
            feed.track([positions[rank]])
            return list(feed.iterate(1))

        result = table.run(work)
        assert result == [[("a1", 1, 0), ("a2", 2, 0)], [("b1", 1, 0), ("b1", 2, 0)]], kind
        assert [position.lookaheads for position in positions] == [[lookahead]] * 2
    # The iterator that is there already goes on, and a second loader begins at its beginning.
    rows = [[named(rank, 3), named(rank, 1)] for rank in range(2)]
    starts = [(2, iter(row[0][2:])) for row in rows]
    found, *_ = steps(rows, starts=starts)
    assert found == [[(f"{name}2@0", 2, 0, ""), (f"{name}0@1", 0, 1, "last")] for name in "ab"]


def test_batches_are_drawn_by_the_function_that_measures_the_wait():
    drawn = []

    def draw(iterator, default):
        item = next(iterator, default)
        drawn.append(item)
        return item

    assert steps([[named(0, 1)], [named(1, 1)]], draw=draw)[0] == expected((1, 1), "longest", False)
    assert sorted(map(str, drawn))[-2:] == ["a0", "b0"]


def test_steps_that_take_batches_themselves_share_nothing():
    table = Table(2)

    def work(rank):
        feed = SharedFeed(
            [named(rank, 1 + rank)], [INF], [1 + rank], torch.device("cpu"), peers=table.peers(rank), rule="longest",
            uneven=None, on_demand=True,
        )  # fmt: skip
        return [(next(batches), index, feed.is_shared) for batches, index, _ in feed]

    assert table.run(work) == [[(("a0", 0, 0), 0, False)], [(("b0", 0, 0), 0, False), (("b1", 1, 0), 1, False)]]
    assert table.exchanges == [0, 0]


class Own(Sampler):
    def __len__(self) -> int:
        return 2

    def __iter__(self):
        return iter(range(2))


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.count()


DATA = list(range(4))
FIRM = DataLoader(DATA)
OWN_BATCHES = type("OwnBatches", (Own,), {})()


def both(*loaders) -> Joint:
    return Joint(loaders, "max_size", tuple)


def test_lists_and_torchs_own_samplers_alone_are_believed():
    sure = [
        DATA, (1, 2), FIRM, DataLoader(DATA, shuffle=True), DataLoader(DATA, batch_size=None), both(FIRM, DATA),
        DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 1, False)),
        DataLoader(DATA, sampler=DistributedSamplerWrapper(SequentialSampler(DATA), num_replicas=1, rank=0)),
        DataLoader(DATA, batch_sampler=IndexBatchSampler(FIRM.batch_sampler)),
    ]  # fmt: skip
    assert [source for source in sure if not _is_length_sure(source)] == []
    unsure = [
        Known(DATA), DataLoader(DATA, sampler=Own()), DataLoader(DATA, batch_sampler=OWN_BATCHES), DataLoader(Endless()),
        DataLoader(DATA, sampler=DistributedSamplerWrapper(Own(), num_replicas=1, rank=0)),
        DataLoader(DATA, batch_sampler=IndexBatchSampler(OWN_BATCHES)), both(FIRM, Known(DATA)),
    ]  # fmt: skip
    assert [source for source in unsure if _is_length_sure(source)] == []


def test_what_an_iterable_data_set_says_of_itself_may_be_said_of_all_ranks():
    assert _is_said_of_all_ranks(DataLoader(Endless())) and not _is_said_of_all_ranks(FIRM)
    assert not _is_said_of_all_ranks(DATA)
    assert _is_said_of_all_ranks(both(DataLoader(Endless()), FIRM)) and not _is_said_of_all_ranks(both(FIRM, DATA))
    # Nobody knows whether its length is that of one rank.
    loader = DataLoader(type("Sized", (Endless,), {"__len__": lambda self: 4})())
    table = Table(2)
    feeds = [
        SharedFeed([loader], [INF], [4], torch.device("cpu"), peers=table.peers(rank), rule="longest", uneven=None)
        for rank in range(2)
    ]
    batches = table.run(lambda rank: list(itertools.islice(feeds[rank].iterate(0), 6)))
    assert [[int(batch) for batch, *_ in own] for own in batches] == [[0, 1, 2, 3]] * 2
    assert table.exchanges == [4, 4]
