"""Steps that take the iterator itself, argument ``dataloader_iter``."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from tests.parity import both

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def module_of(lib, takes=1):
    class Model(lib.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)
            # All numbers of a run are then exact: means that are summed in double precision and in single are the same.
            torch.nn.init.constant_(self.layer.weight, 0.25)
            torch.nn.init.zeros_(self.layer.bias)
            self.seen = []

        def take(self, iterator, what):
            batch, batch_idx, dataloader_idx = next(iterator)
            self.seen.append((what, batch.tolist(), batch_idx, dataloader_idx))
            return self.layer(batch).sum()

        def training_step(self, dataloader_iter):
            losses = [self.take(dataloader_iter, "train") for _ in range(takes)]
            self.log("loss", losses[-1], on_epoch=True, batch_size=2)
            return sum(losses)

        def validation_step(self, dataloader_iter):
            self.log("val", self.take(dataloader_iter, "val"), batch_size=2)

        def test_step(self, dataloader_iter):
            self.log("test", self.take(dataloader_iter, "test"), batch_size=2)

        def predict_step(self, dataloader_iter):
            return self.take(dataloader_iter, "predict")

        def on_after_batch_transfer(self, batch, dataloader_idx):
            raise AssertionError("transfer hooks are not run")

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.125)

    return Model()


def outcome(lib, takes, limit):
    torch.manual_seed(1)
    model = module_of(lib, takes)
    data = DataLoader(torch.arange(32.0).view(8, 4), batch_size=2)
    trainer = lib.Trainer(max_epochs=2, limit_train_batches=limit, **QUIET)
    trainer.fit(model, data, data)
    fit = {name: float(value) for name, value in trainer.callback_metrics.items()}
    results = trainer.validate(model, data, verbose=False), trainer.test(model, data, verbose=False)
    predictions = [float(value) for value in trainer.predict(model, data)]
    return model.seen, fit, results, predictions, trainer.global_step


@pytest.mark.parametrize(("takes", "limit"), [(1, 1.0), (1, 3), (2, 1.0)])
def test_a_run_is_that_of_lightning(takes, limit):
    assert outcome(both.levin(), takes, limit) == outcome(both.lightning(), takes, limit)


def test_an_iterator_that_ends_inside_of_a_step_ends_the_epoch():
    model = module_of(both.levin(), takes=3)
    trainer = both.levin().Trainer(max_epochs=1, **QUIET)
    trainer.fit(model, DataLoader(torch.zeros(8, 4), batch_size=2))
    assert trainer.global_step == 1
    assert [index for _, _, index, _ in model.seen] == [0, 1, 2, 3]


def ended(lib, stop, num_loaders):
    """Return what a fit with validations and the other methods give, whose steps end after one batch of their own accord."""
    base = module_of(lib, takes=2)

    class Model(type(base)):
        def step(self, iterator, what):
            if stop == "raises" and self.seen and self.seen[-1][0] == what:
                raise StopIteration
            values = [self.take(iterator, what) for _ in range(2 if stop == "runs out" else 1)]
            if what != "predict":
                self.log(what, values[-1], batch_size=2)
            return values[-1]

        def validation_step(self, dataloader_iter):
            return self.step(dataloader_iter, "val")

        def test_step(self, dataloader_iter):
            return self.step(dataloader_iter, "test")

        def predict_step(self, dataloader_iter):
            return self.step(dataloader_iter, "predict")

        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            if stop == "hook":
                raise StopIteration

        on_test_batch_end = on_validation_batch_end

    data = torch.arange(24.0).view(6, 4)
    loaders = [DataLoader(data, batch_size=2) for _ in range(num_loaders)]
    model = Model()
    # An odd number of batches, and a validation in the middle of the epoch.
    trainer = lib.Trainer(max_epochs=1, val_check_interval=1, limit_train_batches=2, **QUIET)
    trainer.fit(model, DataLoader(data.repeat(2, 1), batch_size=2), loaders)
    results = [trainer.test(model, loaders, verbose=False), trainer.validate(model, loaders, verbose=False)]
    # With several loaders Lightning has put down the last values to the first one.
    tested = [sorted(value.items()) for result in results for value in result] if num_loaders == 1 else None
    predicted = trainer.predict(model, loaders)
    return tested, predicted, trainer.global_step, model.seen


# A step that takes batches of two loaders belongs to neither.
@pytest.mark.parametrize(
    ("stop", "num_loaders"), [("runs out", 1), ("raises", 1), ("raises", 2), ("hook", 1), ("hook", 2)]
)
def test_steps_and_hooks_that_stop_the_iteration_end_that_evaluation_alone(stop, num_loaders):
    theirs, ours = (ended(lib, stop, num_loaders) for lib in (both.lightning(), both.levin()))
    assert ours == theirs
    assert {what for what, *_ in ours[3]} == {"train", "val", "test", "predict"}


def test_hooks_of_batches_get_the_batch():
    import levin

    seen = []

    class Watch(levin.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(("start", batch.tolist(), batch_idx))

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(("end", batch.tolist(), batch_idx))

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(("val", batch.tolist(), batch_idx))

    model = module_of(levin)
    model.on_train_batch_end = lambda outputs, batch, batch_idx: seen.append(("module", batch.tolist(), batch_idx))
    rows = [[float(row)] * 4 for row in range(2)]
    loader = DataLoader(torch.tensor(rows))
    levin.Trainer(max_epochs=2, callbacks=[Watch()], **QUIET).fit(model, loader, loader)
    of_epoch = [(hook, [rows[index]], index) for index in (0, 1) for hook in ("start", "end", "module")]
    of_validation = [("val", [rows[index]], index) for index in (0, 1)]
    assert seen == (of_epoch + of_validation) * 2
