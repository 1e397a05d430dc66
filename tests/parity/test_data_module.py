"""LightningDataModule: with and without a Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.parity import trace


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(3.0))


def describe(loaders: Any) -> Any:
    if isinstance(loaders, dict):
        return {key: describe(loader) for key, loader in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return [describe(loader) for loader in loaders]
    return (
        type(loaders.sampler).__name__,
        loaders.batch_size,
        loaders.num_workers,
        len(loaders) if hasattr(loaders.dataset, "__len__") else None,
    )


def datasets(kind: str) -> Any:
    data = TensorDataset(torch.arange(6.0))
    return {
        "one": data,
        "stream": Stream(),
        "list": [data, data],
        "tuple": (data, Stream()),
        "dict": {"a": data, "b": data},
        "none": None,
    }[kind]


@pytest.mark.lightning_raises("MisconfigurationException")
@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
@pytest.mark.parametrize("kind", ["one", "stream", "list", "tuple", "dict", "none"])
def test_from_datasets(tmp_path, kind, stage):
    def code(seen: trace.Trace) -> None:
        made = seen.framework.DataModule.from_datasets(**{f"{stage}_dataset": datasets(kind)}, batch_size=2)
        for name in trace.LOADERS:
            seen.note(name)
            seen.attempt(lambda: describe(getattr(made, name)()))

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("TypeError")
@pytest.mark.parametrize("given", [{}, {"batch_size": 3}, {"other": 1}, {"unknown": 1}], ids=str)
def test_from_datasets_passes_arguments_to_the_constructor(tmp_path, given):
    def code(seen: trace.Trace) -> None:
        class Data(seen.framework.DataModule):
            def __init__(self, batch_size=1, other=0) -> None:
                super().__init__()
                seen.note("init", batch_size, other)

        seen.attempt(lambda: type(Data.from_datasets(train_dataset=datasets("one"), **given)).__name__)

    trace.same(code, tmp_path)


def test_str_lists_loaders_and_sizes(tmp_path):
    def code(seen: trace.Trace) -> None:
        class Data(seen.framework.DataModule):
            def train_dataloader(self):
                return DataLoader(datasets("one"))

            def val_dataloader(self):
                return [DataLoader(datasets("one")), DataLoader(Stream())]

        seen.events.append(str(Data()))
        seen.events.append(str(seen.framework.DataModule()))

    theirs, ours = trace.on_both(code, tmp_path)
    for run in (theirs, ours):
        assert "6" in run.events[0] and "Train" in run.events[0] and "None" in run.events[0]
        assert run.events[1].count("None") == 4


@pytest.mark.parametrize("fn", ["fit", "validate", "test", "predict"])
def test_each_call_sets_up_and_tears_down(tmp_path, fn):
    def code(seen: trace.Trace) -> None:
        class Data(seen.framework.DataModule):
            def loader(self, name):
                seen.note(name, self.trainer.current_epoch)
                return trace.batches(1)

        for name in trace.LOADERS:
            setattr(Data, name, lambda self, name=name: self.loader(name))
        seen.watch(Data, ["prepare_data", "setup", "teardown", "state_dict", "load_state_dict"], "D")
        data = Data()
        seen.note(data.trainer)
        trainer = seen.trainer(max_epochs=1)
        for _ in range(2):
            seen.attempt(getattr(trainer, fn), boring(seen), datamodule=data)
        seen.note(data.trainer is trainer, trainer.datamodule is data)

    trace.same(code, tmp_path)


def boring(seen: trace.Trace) -> Any:
    class Model(seen.framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).mean()

        def validation_step(self, batch, batch_idx):
            pass

        def test_step(self, batch, batch_idx):
            pass

        def predict_step(self, batch, batch_idx):
            return 1

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model()


def test_its_state_is_saved_and_given_back(tmp_path):
    def code(seen: trace.Trace) -> None:
        class Data(seen.framework.DataModule):
            def __init__(self, size=3) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.counter = 0

            def train_dataloader(self):
                self.counter += 1
                return trace.batches(1)

            def state_dict(self):
                return {"counter": self.counter}

            def load_state_dict(self, state):
                seen.note("load", state)
                self.counter = state["counter"]

        path = tmp_path / f"{seen.framework.name}.ckpt"
        trainer = seen.trainer(max_epochs=1)
        trainer.fit(boring(seen), datamodule=Data(5))
        trainer.save_checkpoint(path)
        keys = torch.load(path, weights_only=False)
        seen.note(
            sorted(key for key in keys if "datamodule" in key),
            keys["datamodule_hyper_parameters"],
            keys[Data.__qualname__],
        )
        data = Data()
        seen.trainer(max_epochs=2).fit(boring(seen), datamodule=data, ckpt_path=path)
        seen.note(data.counter)
        loaded = Data.load_from_checkpoint(path)
        seen.note(loaded.hparams, loaded.counter)

    trace.same(code, tmp_path)


@pytest.mark.lightning_raises("AttributeError", "MisconfigurationException", "TypeError")
@pytest.mark.parametrize("wrong", ["loaders_too", "class", "model", "missing_loader", "loader_none", "loader_number"])
def test_wrong_usage(tmp_path, wrong):
    def code(seen: trace.Trace) -> None:
        class Data(seen.framework.DataModule):
            pass

        if wrong == "loader_none":
            Data.train_dataloader = lambda self: None
        if wrong == "loader_number":
            Data.train_dataloader = lambda self: 3
        given: Any = Data if wrong == "class" else boring(seen) if wrong == "model" else Data()
        loaders = [trace.batches(1)] if wrong == "loaders_too" else []
        seen.attempt(seen.trainer(max_epochs=1).fit, boring(seen), *loaders, datamodule=given)

    theirs, ours = trace.on_both(code, tmp_path)
    assert theirs.events[0][0] == "raised"
    # Lightning fails by an AttributeError on the way, or by another kind of TypeError.
    expected = {"class": "TypeError", "model": "TypeError"}
    assert ours.events == ([("raised", expected[wrong])] if wrong in expected else theirs.events)


@pytest.mark.parametrize("per_node", [True, False])
@pytest.mark.parametrize("owner", ["module", "data"])
def test_prepare_data_runs_once(tmp_path, owner, per_node):
    def code(seen: trace.Trace) -> None:
        class Data(seen.framework.DataModule):
            def train_dataloader(self):
                return trace.batches(1)

        model, data = boring(seen), Data()
        target = model if owner == "module" else data
        target.prepare_data_per_node = per_node
        seen.watch(type(target), ["prepare_data"], owner)
        seen.attempt(seen.trainer(max_epochs=2).fit, model, datamodule=data)

    trace.same(code, tmp_path)
