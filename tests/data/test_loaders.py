"""Which sampler a rank draws from: injection, wrapping and rebuilding, in one process."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from levin.data import loaders as loaders_module
from levin.data.loaders import (
    capture_init_args,
    end_workers,
    has_len,
    hint_at_workers,
    length_of,
    prepare_dataloader,
    set_epoch,
    shuffles,
    stop_workers,
)
from levin.data.samplers import DistributedSamplerWrapper, UnrepeatedDistributedSampler
from levin.utilities.exceptions import MisconfigurationException

SPLIT = [{"num_replicas": 2, "rank": rank} for rank in range(2)]
DATA = torch.arange(5.0)


def drawn(loader) -> list[float]:
    return [value for batch in loader for value in torch.as_tensor(batch).flatten().tolist()]


def on_ranks(make, stage: str) -> list:
    return [prepare_dataloader(make(), stage=stage, sampler_kwargs=split) for split in SPLIT]


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_is_shuffled_and_split(shuffle):
    loaders = on_ranks(lambda: DataLoader(DATA, batch_size=2, shuffle=shuffle), "train")
    assert all(type(loader.sampler) is DistributedSampler and loader.sampler.shuffle for loader in loaders)
    first, second = map(drawn, loaders)
    assert len(first) == len(second) == 3  # one sample is repeated, so that ranks take the same number of steps
    assert set(first) | set(second) == set(DATA.tolist())
    for loader in loaders:
        loader.sampler.set_epoch(1)
    assert drawn(loaders[0]) != first


def test_evaluation_keeps_its_order_and_repeats_nothing():
    first, second = map(drawn, on_ranks(lambda: DataLoader(DATA, batch_size=2), "val"))
    assert (first, second) == ([0.0, 2.0, 4.0], [1.0, 3.0])


def test_predictions_repeat_nothing_and_drop_nothing():
    loaders = on_ranks(lambda: DataLoader(DATA, batch_size=2, drop_last=True), "predict")
    assert all(type(loader.batch_sampler._batch_sampler.sampler) is UnrepeatedDistributedSampler for loader in loaders)
    assert list(map(drawn, loaders)) == [[0.0, 2.0, 4.0], [1.0, 3.0]]
    assert loaders[0].batch_sampler.seen_batch_indices == [[0, 2], [4]]


class Backwards(Sampler):
    def __iter__(self):
        return iter([4, 3, 2, 1, 0])

    def __len__(self):
        return 5


class Endless(Sampler):
    def __iter__(self):
        return iter([0])


def test_a_sampler_of_the_user_is_wrapped_and_keeps_its_order():
    loaders = on_ranks(lambda: DataLoader(DATA, batch_size=2, sampler=Backwards()), "train")
    assert all(type(loader.sampler) is DistributedSamplerWrapper for loader in loaders)
    assert list(map(drawn, loaders)) == [[4.0, 2.0, 0.0], [3.0, 1.0, 4.0]]


class Grouped(BatchSampler):
    def __init__(self, sampler, batch_size, drop_last, groups=1):
        super().__init__(sampler, batch_size, drop_last)


@pytest.mark.parametrize("kind", [BatchSampler, Grouped])
@pytest.mark.parametrize("sampler", [[4, 0, 2, 2], SubsetRandomSampler([3, 1]), DistributedSampler(DATA, 2, 1)])
def test_the_sampler_of_a_batch_sampler_is_that_of_the_loader(kind, sampler):
    def make():
        with capture_init_args():
            return DataLoader(DATA, batch_sampler=kind(sampler, 2, False))

    torch.manual_seed(1)
    expected = drawn(make())
    torch.manual_seed(1)
    alone = prepare_dataloader(make(), stage="predict", sampler_kwargs=None)
    assert drawn(alone) == expected
    for stage in ("train", "val", "test", "predict"):
        shares = []
        for loader in on_ranks(make, stage):
            torch.manual_seed(1)
            shares.append(drawn(loader))
        if isinstance(sampler, DistributedSampler):  # it is split already
            assert shares == [expected, expected]
        else:
            assert shares == [expected[::2], expected[1::2]]


@pytest.mark.parametrize(
    ("sampler", "values"),
    [
        (lambda: RandomSampler(range(20), replacement=True, num_samples=6), range(20)),
        (lambda: RandomSampler(range(20), num_samples=6), range(20)),
        (lambda: RandomSampler(range(4), num_samples=6), range(4)),
        (lambda: RandomSampler(range(6)), range(6)),
        (lambda: SequentialSampler(range(6)), range(6)),
    ],
)
@pytest.mark.parametrize("stage", ["train", "val"])
def test_samplers_of_torch_that_draw_less_or_more_than_the_dataset_keep_doing_so(sampler, values, stage):
    torch.manual_seed(3)
    whole = list(sampler())
    parts = []
    for rank in range(2):
        loader = DataLoader(range(20), sampler=sampler())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*has shuffling enabled")
            own = prepare_dataloader(loader, stage=stage, sampler_kwargs={"num_replicas": 2, "rank": rank})
        torch.manual_seed(3)
        parts.append(list(own.sampler))
    assert parts == [whole[0::2], whole[1::2]]
    assert len(whole) == 6 and set(whole) <= set(values)


def test_overfitting_on_several_ranks_reads_in_order_whatever_a_random_sampler_draws():
    loader = DataLoader(range(4), sampler=RandomSampler(range(4), num_samples=6))
    own = prepare_dataloader(loader, stage="train", sampler_kwargs=SPLIT[1], overfit=True)
    assert list(own.sampler) == [1, 3]


def test_a_sampler_without_a_length_cannot_be_split():
    with pytest.raises(TypeError, match=r"Endless must have a length.*use_distributed_sampler=False"):
        prepare_dataloader(DataLoader(DATA, sampler=Endless()), stage="train", sampler_kwargs=SPLIT[0])


def test_what_is_split_already_or_has_no_order_is_left_alone():
    own = DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=1))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    stream, plain = DataLoader(Stream()), [1, 2, 3]
    for loader in (own, stream, plain):
        assert prepare_dataloader(loader, stage="train", sampler_kwargs=SPLIT[0]) is loader


class Doubled(BatchSampler):
    """Each batch twice."""

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            yield batch


class Fixed:
    """A batch sampler that cannot be made from another sampler."""

    def __iter__(self):
        return iter([[0, 1], [2]])

    def __len__(self):
        return 2


def test_a_batch_sampler_of_the_user_is_made_again_of_its_class():
    def make() -> DataLoader:
        return DataLoader(DATA, batch_sampler=Doubled(SequentialSampler(DATA), 2, False))

    loaders = on_ranks(make, "val")
    assert all(type(loader.batch_sampler) is Doubled for loader in loaders)
    assert drawn(loaders[1]) == [1.0, 3.0, 1.0, 3.0]


class Trimmed(BatchSampler):
    """Leaves out what is short by itself."""

    def __init__(self, sampler, batch_size, drop_last):
        super().__init__(sampler, batch_size, False)
        self.is_trimmed = drop_last

    def __iter__(self):
        return (batch for batch in super().__iter__() if len(batch) == self.batch_size or not self.is_trimmed)


@pytest.mark.parametrize(("stage", "expected"), [("val", [0.0, 2.0]), ("predict", [0.0, 2.0, 4.0])])
def test_a_batch_sampler_is_made_again_with_the_drop_last_that_it_was_given(stage, expected):
    with capture_init_args():
        loader = DataLoader(DATA, batch_sampler=Trimmed(SequentialSampler(DATA), 2, drop_last=True))
    assert drawn(prepare_dataloader(loader, stage=stage, sampler_kwargs=SPLIT[0])) == expected


def test_a_batch_sampler_of_another_form_cannot_be_split_but_predicts_in_one_process():
    with pytest.raises(
        TypeError,
        match=r"Fixed must look like \(sampler, batch_size, drop_last\).* Trainer or to fabric.setup_dataloaders",
    ):
        prepare_dataloader(DataLoader(DATA, batch_sampler=Fixed()), stage="val", sampler_kwargs=SPLIT[0])
    alone = prepare_dataloader(DataLoader(DATA, batch_sampler=Fixed()), stage="predict", sampler_kwargs=None)
    assert drawn(alone) == [0.0, 1.0, 2.0]
    assert alone.batch_sampler.seen_batch_indices == [[0, 1], [2]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_list_of_batches_predicts_as_it_is(num_workers):
    loader = DataLoader(DATA, batch_sampler=[[3, 1], [2]], num_workers=num_workers)
    alone = prepare_dataloader(loader, stage="predict", sampler_kwargs=None)
    assert drawn(alone) == [3.0, 1.0, 2.0]
    assert alone.batch_sampler.seen_batch_indices == [[3, 1], [2]]
    with pytest.raises(TypeError, match=r"list must look like \(sampler, batch_size, drop_last\)"):
        prepare_dataloader(loader, stage="val", sampler_kwargs=SPLIT[0])


class Epochs(Sampler):
    """Notes the epochs that it is told."""

    def __init__(self, sampler=None):
        self.told: list[int] = []
        if sampler is not None:
            self.sampler = sampler

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        return iter([[0, 1], [2, 3]])

    def __len__(self):
        return 2


def test_each_sampler_is_told_the_epoch_once():
    plain, alone, inner = Epochs(), Epochs(), Epochs()
    outer = Epochs(inner)
    for loader in (
        DataLoader(DATA, sampler=plain), DataLoader(DATA, batch_sampler=alone), DataLoader(DATA, batch_sampler=outer),
        [1, 2],
    ):  # fmt: skip
        set_epoch(loader, 3)
    assert [sampler.told for sampler in (plain, alone, inner, outer)] == [[3]] * 4


def test_a_sampler_of_torch_that_was_given_a_way_to_be_told_is_told():
    told: list[int] = []
    loader = DataLoader(DATA, shuffle=True)
    loader.sampler.set_epoch = told.append
    set_epoch(loader, 3)
    assert told == [3]


def test_samplers_behind_those_of_levin_are_told_the_epoch():
    split, predicting = Epochs(), Epochs()
    set_epoch(prepare_dataloader(DataLoader(DATA, sampler=split), stage="train", sampler_kwargs=SPLIT[0]), 2)
    set_epoch(prepare_dataloader(DataLoader(DATA, batch_sampler=predicting), stage="predict", sampler_kwargs=None), 2)
    assert split.told == predicting.told == [2]


class Forgetful(DataLoader):
    def __init__(self, where, **kwargs):
        super().__init__(DATA, **kwargs)


def test_a_loader_that_forgot_its_arguments_is_an_error_with_the_way_out():
    with pytest.raises(MisconfigurationException, match=r"Forgetful.*'where'.*Set them in its __init__"):
        prepare_dataloader(Forgetful("here"), stage="train", sampler_kwargs=SPLIT[0])


def test_processors_that_could_load_are_pointed_out(monkeypatch):
    told = r"^The `val_dataloader` loads with num_workers=1, .* Consider `DataLoader\(..., num_workers=2\)`.$"
    monkeypatch.setattr(loaders_module, "count_processors", lambda: 3)
    with pytest.warns(UserWarning, match=told):
        hint_at_workers(DataLoader(DATA, num_workers=1), "val")
    hint_at_workers(DataLoader(DATA, num_workers=2), "val")
    hint_at_workers([1], "val")
    monkeypatch.setattr(loaders_module, "count_processors", lambda: 2)  # one of them computes
    hint_at_workers(DataLoader(DATA), "val")


def test_shuffling_is_pointed_out_where_it_is_not_meant():
    def make() -> DataLoader:
        return DataLoader(DATA, shuffle=True)

    assert shuffles(make()) is True and shuffles(DataLoader(DATA)) is False and shuffles([1]) is False
    for stage in ("val", "test", "predict"):
        with pytest.warns(UserWarning, match=f"^Your `{stage}_dataloader`'s sampler has shuffling enabled"):
            prepared = prepare_dataloader(make(), stage=stage, sampler_kwargs=None)
        assert sorted(drawn(prepared)) == DATA.tolist()
    with pytest.warns(UserWarning, match="^You requested to overfit but enabled shuffling in `train_dataloader`"):
        prepared = prepare_dataloader(make(), stage="train", sampler_kwargs=None, overfit=True)
    assert type(prepared.sampler) is SequentialSampler and drawn(prepared) == DATA.tolist()
    loader = DataLoader(DATA)
    assert prepare_dataloader(loader, stage="train", sampler_kwargs=None, overfit=True) is loader
    assert prepare_dataloader(loader, stage="train", sampler_kwargs=None) is loader


@pytest.mark.parametrize(
    ("arguments", "shuffle"),
    [
        ({"stage": "train"}, True), ({"stage": "train", "overfit": True}, False),
        ({"stage": "train", "shuffle": False}, False), ({"stage": "val"}, False), ({"stage": "val", "shuffle": True}, True),
    ],
)  # fmt: skip
def test_whether_a_split_sampler_shuffles_and_by_which_seed(arguments, shuffle, monkeypatch):
    for seed in (None, "", "7"):
        monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
        if seed is not None:
            monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        sampler = prepare_dataloader(DataLoader(DATA), sampler_kwargs=SPLIT[1], **arguments).sampler
        assert (sampler.shuffle, sampler.seed, sampler.rank, sampler.num_replicas) == (shuffle, int(seed or 0), 1, 2)


@pytest.mark.parametrize(
    ("seeds", "rank", "split"), [("1", 1, SPLIT[1]), ("1", 0, None), ("0", None, None), ("", None, None)]
)
def test_workers_are_seeded_where_that_is_asked_for(seeds, rank, split, monkeypatch):
    monkeypatch.setenv("PL_SEED_WORKERS", seeds)
    init = prepare_dataloader(DataLoader(DATA), stage="train", sampler_kwargs=split).worker_init_fn
    assert init is None if rank is None else init.keywords == {"rank": rank}
    own = DataLoader(DATA, worker_init_fn=print)
    assert prepare_dataloader(own, stage="train", sampler_kwargs=SPLIT[0]).worker_init_fn is print


def test_lengths():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    assert length_of([1, 2]) == 2 and length_of(iter([1])) == length_of(DataLoader(Stream())) == math.inf
    assert has_len([1]) is True and has_len(iter([1])) is False
    with pytest.warns(UserWarning, match="^`list` returned 0 length"):
        assert length_of([]) == 0


def test_classes_are_as_they_were_when_the_last_of_several_leaves():
    before = [DataLoader.__init__, BatchSampler.__init__, Forgetful.__init__]
    with capture_init_args():
        with capture_init_args():
            inner = Forgetful("a", batch_size=2)
        outer = Forgetful("b")
    assert [DataLoader.__init__, BatchSampler.__init__, Forgetful.__init__] == before
    assert "_levin_init_arguments" not in vars(Forgetful("c"))
    for loader, size in ((inner, 2), (outer, 1)):
        again = prepare_dataloader(loader, stage="train", sampler_kwargs=SPLIT[0])
        assert type(again) is Forgetful and again.batch_size == size and type(again.sampler) is DistributedSampler


def test_workers_end_when_they_are_told_to():
    plain, persistent = (DataLoader(DATA, num_workers=1, persistent_workers=lives) for lives in (False, True))
    for loader in (plain, persistent):
        iterator = iter(loader)
        next(iterator)
        (worker,) = iterator._workers
        stop_workers(iterator)
        assert worker.is_alive() is (loader is persistent)
    end_workers(persistent)
    assert not worker.is_alive() and persistent._iterator is None
    for nothing in (plain, DataLoader(DATA), [1]):
        end_workers(nothing)
        stop_workers(iter(DataLoader(DATA)))
        stop_workers(iter([1]))
