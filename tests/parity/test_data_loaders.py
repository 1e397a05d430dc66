"""What happens to the user's loaders: epochs, samplers, workers, iterables without length, limits, reloading, transfer."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from tests.parity import both, trace


class Stream(IterableDataset):
    def __init__(self, size: int, has_len: bool = False) -> None:
        self.size = size
        if has_len:
            self.__class__ = SizedStream

    def __iter__(self):
        return iter(torch.arange(self.size, dtype=torch.float32))


class SizedStream(Stream):
    def __len__(self):
        return self.size


class Plain:
    """Can be iterated, and nothing else."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self):
        return (torch.full((2, 4), float(i)) for i in range(self.size))


def make_module(seen: trace.Trace, **hooks: Any) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            seen.note("train", self.current_epoch, batch_idx, batch, self.trainer.is_last_batch)
            return self.layer(torch.ones(2, 4)).sum()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            seen.note("val", batch_idx, dataloader_idx, batch)

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            seen.note("test", batch_idx, dataloader_idx, batch)

        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            seen.note("predict", batch_idx, dataloader_idx, batch)
            return batch

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for name, hook in hooks.items():
        setattr(Model, name, hook)
    return Model()


LOADERS: dict[str, Any] = {
    "loader": lambda: trace.batches(3),
    "shuffled": lambda: trace.batches(3, shuffle=True),
    "drop_last": lambda: DataLoader(torch.arange(5.0), batch_size=2, drop_last=True),
    "not_batched": lambda: DataLoader(torch.arange(3.0), batch_size=None),
    "stream": lambda: DataLoader(Stream(5), batch_size=2),
    "sized_stream": lambda: DataLoader(Stream(5, has_len=True), batch_size=2),
    "short_stream": lambda: DataLoader(Stream(1), batch_size=2),
    "empty_stream": lambda: DataLoader(Stream(0), batch_size=2),
    "plain": lambda: Plain(3),
    "empty_plain": lambda: Plain(0),
    "list_of_numbers": lambda: [1, 2, 3],
    "empty_loader": lambda: DataLoader([], batch_size=2),
    "with_workers": lambda: DataLoader(torch.arange(4.0), batch_size=2, num_workers=1),
}
LIMITS = [1.0, 2, 1, 0.5, 0, 100]


UNSIZED = {"stream": 3, "short_stream": 1, "plain": 3}


def training_code(seen: trace.Trace, loader: str, limit: float) -> None:
    trainer = seen.trainer(max_epochs=2, limit_train_batches=limit, limit_val_batches=limit, num_sanity_val_steps=1)
    seen.attempt(trainer.fit, make_module(seen), LOADERS[loader](), LOADERS[loader]())
    seen.note(trainer.global_step, trainer.current_epoch)


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize(
    ("loader", "limit"),
    [
        (name, limit)
        for name in LOADERS
        for limit in LIMITS
        if name != "with_workers" and limit <= UNSIZED.get(name, limit)
    ],
)
def test_training_data_within_limits(tmp_path, loader, limit):
    trace.same(lambda seen: training_code(seen, loader, limit), tmp_path)


@pytest.mark.parametrize("loader", UNSIZED)
def test_a_limit_beyond_the_end_of_a_stream_changes_nothing(tmp_path, loader):
    """Lightning takes the limit for the length, so that no batch is the last one and no validation follows."""
    limited = trace.run(lambda seen: training_code(seen, loader, 100), both.levin(), tmp_path)
    whole = trace.run(lambda seen: training_code(seen, loader, 1.0), both.levin(), tmp_path)
    assert limited.events == whole.events


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("limit", [1.0, 2, 0.5])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("method", ["validate", "predict"])
def test_evaluation_data_within_limits(tmp_path, method, loader, limit):
    if loader == "with_workers" and limit != 1.0:
        loader = "loader"

    def code(seen: trace.Trace) -> None:
        trainer = seen.trainer(limit_val_batches=limit, limit_predict_batches=limit)
        seen.attempt(getattr(trainer, method), make_module(seen), [LOADERS[loader](), LOADERS["loader"]()])
        seen.note(trainer.num_val_batches if method == "validate" else trainer.num_predict_batches)

    trace.same(code, tmp_path)


class EpochSampler(Sampler):
    def __init__(self, note: Any, name: str, size: int = 4) -> None:
        self.note, self.name, self.size = note, name, size

    def __iter__(self):
        return iter(range(self.size))

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.note(self.name, epoch)


@pytest.mark.parametrize("form", ["sampler", "batch_sampler", "both"])
def test_samplers_are_told_the_epoch(tmp_path, form):
    def loader(seen: trace.Trace, name: str) -> Any:
        data, sampler = torch.ones(4, 4), EpochSampler(seen.note, name)
        if form == "sampler":
            return DataLoader(data, sampler=sampler, batch_size=2)
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))

    def code(seen: trace.Trace) -> None:
        trainer = seen.trainer(max_epochs=3)
        trainer.fit(make_module(seen), [loader(seen, "t0"), loader(seen, "t1")], loader(seen, "v"))
        for method in ("validate", "test", "predict"):
            getattr(seen.trainer(), method)(make_module(seen), loader(seen, method))

    theirs, ours = trace.on_both(code, tmp_path)

    def of(run: trace.Trace, name: str) -> list[int]:
        return [event[1] for event in run.events if event[0] == name]

    for name in ("t0", "t1", "v", "validate", "test", "predict"):
        # Lightning may tell a sampler the same epoch more than once.
        assert sorted(set(of(ours, name))) == sorted(set(of(theirs, name))), name


class OwnBatchSampler(BatchSampler):
    def __init__(self, sampler, batch_size, drop_last, extra=1):
        super().__init__(sampler, batch_size, drop_last)
        self.extra = extra


class OtherBatchSampler:
    def __init__(self, groups):
        self.groups = groups

    def __iter__(self):
        return iter(self.groups)

    def __len__(self):
        return len(self.groups)


class OwnLoader(DataLoader):
    def __init__(self, size, *args, **kwargs):
        self.size = size
        super().__init__(torch.arange(float(size)), *args, **kwargs)


class ForgetfulLoader(DataLoader):
    def __init__(self, size, batch_size):
        super().__init__(torch.arange(float(size)), batch_size=batch_size)


PREDICT_LOADERS: dict[str, Any] = {
    "plain": lambda: DataLoader(torch.arange(5.0), batch_size=2),
    "drop_last": lambda: DataLoader(torch.arange(5.0), batch_size=2, drop_last=True),
    "shuffled": lambda: DataLoader(
        torch.arange(5.0), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "not_batched": lambda: DataLoader(torch.arange(3.0), batch_size=None),
    "sampler": lambda: DataLoader(torch.arange(5.0), batch_size=2, sampler=SequentialSampler(range(4))),
    "batch_sampler": lambda: DataLoader(
        torch.arange(5.0), batch_sampler=BatchSampler(SequentialSampler(range(5)), 2, True)
    ),
    "own_batch_sampler": lambda: DataLoader(
        torch.arange(5.0), batch_sampler=OwnBatchSampler(SequentialSampler(range(5)), 2, True, extra=5)
    ),
    "other_batch_sampler": lambda: DataLoader(torch.arange(5.0), batch_sampler=OtherBatchSampler([[0, 1], [2]])),
    "own_loader": lambda: OwnLoader(5, batch_size=2),
    "forgetful_loader": lambda: ForgetfulLoader(5, 2),
    "stream": lambda: DataLoader(Stream(5), batch_size=2),
    "list": lambda: [1, 2],
}


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("source", ["given", "hook"])
@pytest.mark.parametrize("loader", PREDICT_LOADERS)
def test_predict_sees_every_sample_and_knows_its_index(tmp_path, loader, source):
    def code(seen: trace.Trace) -> None:
        callbacks = __import__(f"{seen.framework.module.__name__}.callbacks", fromlist=["x"])

        class Writer(callbacks.BasePredictionWriter):
            def write_on_batch_end(
                self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx
            ):
                seen.note("indices", prediction, batch_indices, batch_idx, dataloader_idx)

            def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
                seen.note("all", predictions, batch_indices)

        trainer = seen.trainer(callbacks=[Writer("batch_and_epoch")])
        if source == "given":
            model = make_module(seen)
            seen.attempt(trainer.predict, model, PREDICT_LOADERS[loader]())
        else:
            model = make_module(seen, predict_dataloader=lambda self: PREDICT_LOADERS[loader]())
            seen.attempt(trainer.predict, model)

    trace.same(code, tmp_path)


class Numbers(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        import random

        import numpy

        return torch.tensor(
            [float(torch.randint(1000, ())), float(numpy.random.randint(1000)), float(random.randint(0, 1000)), index]
        )


def test_seeded_workers_draw_different_numbers_and_the_same_again(tmp_path):
    def code(seen: trace.Trace) -> None:
        for _ in range(2):
            drawn: list[Any] = []

            def step(self, batch, batch_idx, drawn=drawn):
                drawn.extend(map(tuple, batch[:, :3].tolist()))
                return self.layer(torch.ones(2, 4)).sum()

            seen.framework.module.seed_everything(7, workers=True)
            loader = DataLoader(Numbers(), batch_size=1, num_workers=2)
            seen.trainer(max_epochs=1).fit(make_module(seen, training_step=step), loader)
            seen.note(len(set(drawn)), loader.worker_init_fn is not None)
            seen.events.append(drawn)
        seen.framework.module.seed_everything(7, workers=False)
        loader = DataLoader(Numbers(), batch_size=2)
        seen.trainer(max_epochs=1).fit(make_module(seen), loader)
        seen.note(loader.worker_init_fn is not None)

    theirs, ours = trace.on_both(code, tmp_path)
    for run in (theirs, ours):
        assert run.events[0] == run.events[2] == (6, True)
        assert run.events[1] == run.events[3]
    # Without workers the numbers are those of the process, the same in both.
    assert ours.events[4:] == theirs.events[4:]


def test_a_worker_init_fn_of_the_user_stays(tmp_path):
    def code(seen: trace.Trace) -> None:
        seen.framework.module.seed_everything(7, workers=True)
        loader = DataLoader(torch.ones(2, 4), worker_init_fn=print)
        seen.trainer(max_epochs=1).fit(make_module(seen), loader)
        seen.note(loader.worker_init_fn is print)

    trace.same(code, tmp_path)


@pytest.mark.parametrize("sanity", [0, 2])
# Not (2, 2) and (3, 2) with a sanity check, whose loaders Lightning asks for again at once.
@pytest.mark.parametrize(("every", "val_every"), [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (1, 2)])
def test_loaders_are_asked_for_again_every_n_epochs(tmp_path, every, val_every, sanity):
    def code(seen: trace.Trace) -> None:
        def train(self):
            seen.note("train_dataloader", self.current_epoch)
            return trace.batches(1 + self.current_epoch)

        def val(self):
            seen.note("val_dataloader", self.current_epoch)
            return trace.batches(1)

        model = make_module(seen, train_dataloader=train, val_dataloader=val)
        trainer = seen.trainer(
            max_epochs=4, reload_dataloaders_every_n_epochs=every, check_val_every_n_epoch=val_every,
            num_sanity_val_steps=sanity,
        )  # fmt: skip
        seen.attempt(trainer.fit, model)
        seen.note(trainer.global_step)

    trace.same(code, tmp_path)


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    label: str


class Movable:
    def __init__(self, note: Any, returns: bool) -> None:
        self.note, self.returns = note, returns

    def to(self, *args, **kwargs):
        self.note("to", args, kwargs)
        return self if self.returns else None


Pair = namedtuple("Pair", "a b")


def batch_of(seen: trace.Trace, kind: str) -> Any:
    x = torch.ones(2, 4)
    return {
        "tensor": x, "list": [x, "text", 3], "tuple": (x, None), "dict": {"a": x, "b": [x]}, "namedtuple": Pair(x, 1),
        "dataclass": Sample(x, "name"), "ordered": OrderedDict(a=x), "defaultdict": defaultdict(list, a=x),
        "to": Movable(seen.note, True), "to_none": Movable(seen.note, False), "nested_to": {"a": [Movable(seen.note, True)]},
        "object": object(), "string": "text", "number": 3.5, "set": {1}, "nested": [{"a": (x, Sample(x, "n"))}],
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["tensor", "list", "tuple", "dict", "namedtuple", "dataclass", "ordered", "defaultdict", "to", "to_none", "nested_to", "object",
     "string", "number", "set", "nested"],
)  # fmt: skip
def test_the_default_transfer_moves_what_can_be_moved(tmp_path, kind):
    def code(seen: trace.Trace) -> None:
        def step(self, batch, batch_idx):
            seen.note("batch", type(batch).__name__, batch)
            if dataclasses.is_dataclass(batch):
                seen.note(batch.x, batch.label)
            self.log("x", 1.0, batch_size=1)

        batch = batch_of(seen, kind)
        loader = DataLoader(range(1), batch_size=None, collate_fn=lambda _: batch)
        seen.attempt(seen.trainer().validate, make_module(seen, validation_step=step), loader, verbose=False)

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("TypeError")
@pytest.mark.parametrize("wrong", ["returns_none", "raises", "wrong_signature"])
@pytest.mark.parametrize("hook", trace.TRANSFER)
def test_transfer_hooks_gone_wrong(tmp_path, hook, wrong):
    def fail(self, *args):
        raise ValueError("meant")

    function = {"returns_none": lambda self, *args: None, "raises": fail, "wrong_signature": lambda self, batch: batch}[
        wrong
    ]

    def code(seen: trace.Trace) -> None:
        seen.attempt(seen.trainer().validate, make_module(seen, **{hook: function}), trace.batches(1))

    trace.same(code, tmp_path)


SAMPLER_WARNINGS: dict[str, tuple[Any, list[str]]] = {
    "eval_shuffle": (lambda s, t: t.validate(make_module(s), trace.batches(1, shuffle=True)), ["shuffling"]),
    "overfit_shuffle": (
        lambda s, t: s.trainer(max_epochs=1, overfit_batches=1).fit(make_module(s), trace.batches(2, shuffle=True)),
        ["overfit", "shuffling", "train"],
    ),
    "overfit_shuffle_val": (
        lambda s, t: s.trainer(max_epochs=1, overfit_batches=1).fit(
            make_module(s), trace.batches(2), trace.batches(2, shuffle=True)
        ),
        ["overfit", "shuffling", "val"],
    ),
    "zero_length": (lambda s, t: t.validate(make_module(s), DataLoader([])), ["length"]),
    "no_val_loader": (lambda s, t: s.trainer(max_epochs=1).fit(make_module(s), trace.batches(1)), ["val_dataloader"]),
    "log_interval": (
        lambda s, t: s.trainer(max_epochs=1, logger=both.recording_logger(s.framework, both.Lines())).fit(
            make_module(s), trace.batches(1)
        ),
        ["number of training batches", "log_every_n_steps"],
    ),
    "predict_none": (
        lambda s, t: t.predict(make_module(s, predict_step=lambda self, batch: None), trace.batches(1)),
        ["predict", "none"],
    ),
}


@pytest.mark.parametrize("case", SAMPLER_WARNINGS)
def test_a_questionable_loader_is_warned_about(tmp_path, case):
    function, words = SAMPLER_WARNINGS[case]
    theirs, ours = trace.on_both(lambda seen: function(seen, seen.trainer()), tmp_path)
    assert trace.warned(theirs, *words), [str(w.message) for w in theirs.warnings]
    assert trace.warned(ours, *words), [str(w.message) for w in ours.warnings]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("overfit", [0, 1, 2, 0.5, 1.0])
def test_overfitting_takes_the_same_batches_in_order(tmp_path, overfit, shuffle):
    def code(seen: trace.Trace) -> None:
        trainer = seen.trainer(max_epochs=2, overfit_batches=overfit)
        seen.attempt(trainer.fit, make_module(seen), trace.batches(4, shuffle=shuffle), trace.batches(2))

    trace.same(code, tmp_path)


def test_the_random_order_of_the_user_is_kept(tmp_path):
    def code(seen: trace.Trace) -> None:
        generator = torch.Generator().manual_seed(3)
        sampler = RandomSampler(range(6), generator=generator, replacement=True, num_samples=4)
        seen.trainer(max_epochs=2).fit(make_module(seen), DataLoader(torch.arange(6.0), batch_size=2, sampler=sampler))

    trace.same(code, tmp_path)


def with_cpus(monkeypatch, num_cpus: int) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: num_cpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(num_cpus)), raising=False)
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: num_cpus)


@pytest.mark.parametrize("loader", ["loader", "stream", "plain"])
@pytest.mark.parametrize(("num_cpus", "num_workers"), [(2, 0), (3, 0), (16, 0), (16, 1), (16, 2)])
def test_few_workers_are_hinted_at_where_there_are_more_processors(
    tmp_path, monkeypatch, num_cpus, num_workers, loader
):
    with_cpus(monkeypatch, num_cpus)

    def code(seen: trace.Trace) -> None:
        data: Any = Plain(1) if loader == "plain" else Stream(2) if loader == "stream" else torch.ones(2, 4)
        loaders = data if loader == "plain" else DataLoader(data, num_workers=num_workers)
        seen.trainer(limit_test_batches=1).test(make_module(seen), loaders)

    theirs, ours = trace.on_both(code, tmp_path)
    expected = num_cpus > 2 and num_workers < 2 and loader != "plain"
    for run in (theirs, ours):
        assert trace.warned(run, "test_dataloader", "num_workers", f"={num_cpus - 1}") == expected, run.framework.name


def test_pinned_persistent_workers_that_are_made_again_are_warned_about(tmp_path):
    def code(seen: trace.Trace) -> None:
        def loader(self):
            return DataLoader(torch.ones(2, 4), num_workers=1, persistent_workers=True, pin_memory=True)

        trainer = seen.trainer(max_epochs=1, reload_dataloaders_every_n_epochs=1)
        trainer.fit(make_module(seen, train_dataloader=loader))

    theirs, ours = trace.on_both(code, tmp_path)
    for run in (theirs, ours):
        assert trace.warned(run, "pin_memory", "persistent_workers", "reload_dataloaders_every_n_epochs")
