"""Collections with an empty iterable: their length is what they give, and an empty list is one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader as Theirs
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.data.combined import CombinedLoader
from tests.parity import both, trace

SOURCES: dict[str, Any] = {
    "loader": lambda: [DataLoader([]), [1, 2, 3]],
    "list": lambda: [[], [1, 2, 3]],
    "last": lambda: [[1, 2, 3], []],
    "tuple in a dict": lambda: {"a": (), "b": [1, 2, 3]},
    "dict in a list": lambda: [{}, [1, 2]],
    "nested": lambda: {"a": [[], [1, 2]], "b": [3, 4]},
    "all": lambda: [[], []],
}
MODES = ["min_size", "max_size", "max_size_cycle", "sequential"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_an_empty_iterable_is_one_that_gives_nothing(source, mode):
    ours, theirs = CombinedLoader(SOURCES[source](), mode), Theirs(SOURCES[source](), mode)
    given = list(ours)
    assert given == list(theirs)
    iter(ours), iter(theirs)
    assert len(ours) == len(given)
    # Lightning's cycle has the length of the longest, and gives nothing.
    assert len(ours) == (len(theirs) if mode != "max_size_cycle" or given else 0)
    assert len(ours.flattened) == len(theirs.flattened)


@pytest.mark.parametrize("nothing", [[], (), {}])
def test_a_collection_of_no_loaders_is_no_data(nothing):
    loader = CombinedLoader(nothing, "min_size")
    assert loader.flattened == []
    loader.flattened = []
    assert loader.iterables == nothing
    assert list(loader) == []


@pytest.mark.filterwarnings("ignore:.*returned 0 length:UserWarning", "ignore:.*hold no batches:UserWarning")
@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_training_on_what_gives_nothing_ends_at_once(mode):
    class Model(LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError

        def configure_optimizers(self):
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)

    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2
    )
    trainer.fit(Model(), CombinedLoader([[], [1, 2, 3]], mode))
    assert (trainer.num_training_batches, trainer.global_step) == (0, 0)


VALIDATION: dict[str, Any] = {
    "empty": lambda combined: DataLoader([]),
    "drop_last": lambda combined: DataLoader(torch.ones(2, 4), batch_size=3, drop_last=True),
    "several": lambda combined: [DataLoader([]), DataLoader([])],
    "one of several": lambda combined: [DataLoader([]), trace.batches(2)],
    "joint": lambda combined: combined([DataLoader([]), trace.batches(2)], "min_size"),
}


@pytest.mark.filterwarnings("ignore:.*hold no batches:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 1}, {"num_sanity_val_steps": 0, "max_epochs": 1}])
@pytest.mark.parametrize("kind", VALIDATION)
def test_hooks_of_a_validation_without_batches(tmp_path, kind, settings):
    def code(seen: trace.Trace) -> None:
        module = both.recording_module(seen.framework, [], log=False)[0]
        module.training_step = lambda batch, batch_idx: module.layer(batch).pow(2).mean()
        module.validation_step = module.test_step = lambda batch, batch_idx, dataloader_idx=0: None
        hooks = [name for name in both.HOOKS_OF_CALLBACK if "checkpoint" not in name]
        trainer = seen.trainer(**{"max_epochs": 2, "callbacks": [seen.callback(hooks)], **settings})
        data = VALIDATION[kind](CombinedLoader if seen.is_levin else Theirs)
        trainer.fit(module, trace.batches(2), data)
        for method in (trainer.validate, trainer.test):
            seen.note(method(module, data, verbose=False))
        seen.note(trainer.num_val_batches, trainer.global_step)

    trace.same(code, tmp_path)


@pytest.mark.filterwarnings("ignore:.*hold no batches:UserWarning", "ignore:.*returned 0 length:UserWarning")
def test_an_interval_of_validation_is_no_error_where_there_is_nothing_to_train_on(tmp_path):
    def code(seen: trace.Trace) -> None:
        trainer = seen.trainer(max_epochs=1, val_check_interval=3)
        trainer.fit(both.recording_module(seen.framework, [])[0], DataLoader([]), trace.batches(2))
        seen.note(trainer.global_step, trainer.current_epoch)

    trace.same(code, tmp_path)
