"""The words of trainer.explain, as they are read."""

from __future__ import annotations

import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader

from levin.callbacks import Callback, EarlyStopping
from levin.demos.boring_classes import BoringModel, RandomDataset
from levin.explain import explained_run, rules
from levin.loggers import CSVLogger
from levin.strategies import SingleDeviceStrategy
from tests.explain.test_explain import Data, Net, trainer_of


class Small(BoringModel):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"size": 1})

    def training_step(self, batch):
        loss = self.step(batch)
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.step(batch), on_step=True)

    def on_validation_model_zero_grad(self):
        super().on_validation_model_zero_grad()

    def on_before_optimizer_step(self, optimizer):
        """Overridden."""

    def on_save_checkpoint(self, checkpoint):
        """Overridden."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        plateau = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val", "interval": "step", "strict": False}
        return [optimizer], [{"scheduler": StepLR(optimizer, 1), "frequency": 2}, plateau]


class Manual(Net):
    def __init__(self):
        super().__init__(automatic=False)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def on_train_batch_end(self, outputs, batch, batch_idx):
        """Overridden."""


class Own(Net):
    schedulers = (("epoch", 1, False), ("epoch", 2, True))

    def optimizer_step(self, *args):
        super().optimizer_step(*args)

    def optimizer_zero_grad(self, *args):
        super().optimizer_zero_grad(*args)

    def backward(self, loss):
        loss.backward()

    def configure_gradient_clipping(self, *args):
        """Overridden."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step()


class Plain(Small):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def on_fit_end(self):
        """Overridden."""


class StatefulData(Data):
    def state_dict(self):
        return {"place": 1}


class Adds(Callback):
    def state_dict(self):
        return {"some": 1}

    def on_save_checkpoint(self, trainer, module, checkpoint):
        """Overridden."""


class Stepping(SingleDeviceStrategy):
    def optimizer_step(self, *args, **kwargs):
        return super().optimizer_step(*args, **kwargs)


def lines_of(text):
    """The lines without the places and what a callback was made with."""
    return re.sub(r"  +\S+:\d+$|\{'.*?\}", "", text, flags=re.MULTILINE).splitlines()


FITS = {
    Small: {
        "max_epochs": 3, "max_steps": 8, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5,
        "gradient_clip_algorithm": "value", "val_check_interval": 4, "reload_dataloaders_every_n_epochs": 2,
        "log_every_n_steps": 2,
    },
    Manual: {
        "max_epochs": -1, "val_check_interval": "00:01:00:00", "num_sanity_val_steps": 0, "precision": "64-true",
        "enable_checkpointing": False,
    },
    Own: {
        "max_epochs": 2, "limit_val_batches": 0, "precision": "bf16-mixed", "accumulate_grad_batches": 2,
        "enable_checkpointing": False, "reload_dataloaders_every_n_epochs": 1,
    },
}  # fmt: skip
WORDS = {
    Small: """
fit of Small
on 1 process, cpu, SingleDeviceStrategy, precision 32-true
callbacks: EarlyStopping, ModelCheckpoint
loggers: CSVLogger, every 2 steps

set-up
    ModelCheckpoint.setup(stage)
    Small.configure_optimizers()  -> SGD, StepLR, ReduceLROnPlateau
Data.val_dataloader()
sanity check: nothing of it is logged or counted
    Small.on_validation_model_eval()
    for batch in val_dataloaders:  # 2 batches, in torch.no_grad()
        batch.to('cpu')
        Small.validation_step(batch, batch_idx)
            # logs 'val' of the step and over the epoch
    EarlyStopping.on_validation_end()
    ModelCheckpoint.on_validation_end()
    each submodule back into its own train or eval mode
Data.train_dataloader()
ModelCheckpoint.on_train_start()
for epoch in range(3):  # ends early at max_steps=8 or trainer.should_stop
    Data.train_dataloader()  # every 2 epochs
    for batch in train_dataloader:  # 6 batches
        batch.to('cpu')
        optimizer.step(closure):  # SGD; after every 2nd batch. After the others the closure alone: gradients add up
            loss = Small.training_step(batch)
                # logs 'loss' of the step and over the epoch, on the progress bar
            loss /= batches of the window
            optimizer.zero_grad()  # on the first batch of each window
            loss.backward()
            Small.on_before_optimizer_step(optimizer)  # after every 2nd batch
            clip_grad_value_(parameters, 0.5)  # after every 2nd batch
            the update of the parameters  # after every 2nd batch
        StepLR.step()  # after the last batch of every 2nd epoch
        ModelCheckpoint.on_train_batch_end(outputs, batch, batch_idx)
        CSVLogger.log_metrics(values of the step)  # after every 4th batch of the run
        validation:  # after every 4th batch
            Small.on_validation_model_zero_grad()  # unless gradients are being added up
            Data.val_dataloader()  # 2 epochs after the last time
            Small.on_validation_model_eval()
            for batch in val_dataloaders:  # 2 batches, in torch.no_grad()
                batch.to('cpu')
                Small.validation_step(batch, batch_idx)
                    # logs 'val' of the step and over the epoch
            CSVLogger.log_metrics(values of the validation)
            EarlyStopping.on_validation_end()
            ModelCheckpoint.on_validation_end()
            each submodule back into its own train or eval mode
        ReduceLROnPlateau.step("val")  # after every 2nd batch
    EarlyStopping.on_train_epoch_end()
    ModelCheckpoint.on_train_epoch_end()
    CSVLogger.log_metrics(values of the epoch)
ModelCheckpoint.on_train_end()

a checkpoint holds:
    state_dict: 2 tensors, 0.00 MB
    optimizer_states: SGD
    lr_schedulers: StepLR, ReduceLROnPlateau
    callbacks: EarlyStopping, ModelCheckpoint
    hyper_parameters: size
    loops, epoch, global_step: the counters
    levin: random states of every rank, the place in the data, sums of self.log, an open accumulation window
    what Small.on_save_checkpoint adds
    written by ModelCheckpoint

not called, since nobody overrides them:
    on_fit_start, on_fit_end, on_sanity_check_start, on_sanity_check_end, on_train_epoch_start,
    on_train_batch_start, on_validation_start, on_validation_epoch_start, on_validation_epoch_end,
    on_validation_batch_start, on_validation_batch_end, on_before_zero_grad, on_before_backward,
    on_after_backward, on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer,
    optimizer_step, optimizer_zero_grad, configure_gradient_clipping, backward, lr_scheduler_step
""",
    Manual: """
fit of Manual
on 1 process, cpu, SingleDeviceStrategy, precision 64-true

set-up
    Manual.configure_optimizers()  -> SGD
Data.train_dataloader()
Data.val_dataloader()
for epoch in itertools.count():  # ends early at trainer.should_stop
    for batch in train_dataloader:  # 6 batches
        DoublePrecision.convert_input(batch)
        Manual.transfer_batch_to_device(batch, device, dataloader_idx)
        loss = Manual.training_step(batch, batch_idx)  # in the context of DoublePrecision (64-true)
            # logs 'loss' of the step and over the epoch
            where it calls self.manual_backward(loss):
                loss.backward()
            where it calls optimizer.step():
        Manual.on_train_batch_end(outputs, batch, batch_idx)
        validation:  # after the first batch that ends 1:00:00 after the one before
            Manual.on_validation_model_zero_grad()
            Manual.on_validation_model_eval()
            for batch in val_dataloaders:  # 2 batches, in torch.no_grad()
                DoublePrecision.convert_input(batch)
                Manual.transfer_batch_to_device(batch, device, dataloader_idx)
                Manual.validation_step(batch, batch_idx)
                    # logs 'val' over the epoch
            each submodule back into its own train or eval mode

a checkpoint holds:
    state_dict: 2 tensors, 0.00 MB
    optimizer_states: SGD
    lr_schedulers: none
    callbacks: none has a state
    loops, epoch, global_step: the counters
    levin: random states of every rank, the place in the data, sums of self.log, an open accumulation window
    written by nobody: no callback saves checkpoints

not called, since nobody overrides them:
    on_fit_start, on_fit_end, on_sanity_check_start, on_sanity_check_end, on_train_start,
    on_train_end, on_train_epoch_start, on_train_epoch_end, on_train_batch_start,
    on_validation_start, on_validation_end, on_validation_epoch_start, on_validation_epoch_end,
    on_validation_batch_start, on_validation_batch_end, on_before_zero_grad, on_before_backward,
    on_after_backward, on_before_optimizer_step, on_before_batch_transfer, on_after_batch_transfer,
    optimizer_step, optimizer_zero_grad, configure_gradient_clipping, backward, lr_scheduler_step
""",
    Own: """
fit of Own
on 1 process, cpu, SingleDeviceStrategy, precision bf16-mixed

set-up
    Own.configure_optimizers()  -> SGD, StepLR, ReduceLROnPlateau
Data.train_dataloader()
for epoch in range(2):  # ends early at trainer.should_stop
    Data.train_dataloader()  # after the first
    for batch in train_dataloader:  # 6 batches
        batch.to('cpu')
        Own.optimizer_step(epoch, batch_idx, optimizer, closure)  # after every 2nd batch
        optimizer.step(closure):  # SGD, through MixedPrecision; after every 2nd batch. After the others the closure alone: gradients add up
            loss = Own.training_step(batch, batch_idx)  # in the context of MixedPrecision (bf16-mixed)
                # logs 'loss' of the step and over the epoch
            loss /= batches of the window
            Own.optimizer_zero_grad(epoch, batch_idx, optimizer)  # on the first batch of each window
            Own.backward(loss)
            Own.configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)  # after every 2nd batch
            the update of the parameters  # after every 2nd batch
        Own.lr_scheduler_step(StepLR, None)  # after the last batch
    Own.lr_scheduler_step(ReduceLROnPlateau, "loss")  # every 2 epochs

a checkpoint holds:
    state_dict: 2 tensors, 0.00 MB
    optimizer_states: SGD
    lr_schedulers: StepLR, ReduceLROnPlateau
    callbacks: none has a state
    loops, epoch, global_step: the counters
    levin: random states of every rank, the place in the data, sums of self.log, an open accumulation window
    written by nobody: no callback saves checkpoints

not called, since nobody overrides them:
    on_fit_start, on_fit_end, on_train_start, on_train_end, on_train_epoch_start,
    on_train_epoch_end, on_train_batch_start, on_train_batch_end, on_before_zero_grad,
    on_before_backward, on_after_backward, on_before_optimizer_step, on_before_batch_transfer,
    transfer_batch_to_device, on_after_batch_transfer
""",
}


@pytest.mark.parametrize("model", FITS)
def test_a_fit_in_words(model, tmp_path):
    more = {"callbacks": [EarlyStopping("val")], "logger": CSVLogger(tmp_path)} if model is Small else {}
    text = trainer_of(tmp_path, **FITS[model], **more).explain(model(), datamodule=Data(6, 2))
    assert lines_of(text) == WORDS[model].strip().splitlines()


WITH_PLACES = """
fit of Plain  test_text.py:N
on 1 process, cpu, Stepping, precision 32-true
callbacks: Adds, ModelCheckpoint
loggers: CSVLogger, CSVLogger, every 50 steps
it begins with the checkpoint 'some.ckpt', which is not read here

set-up
    ModelCheckpoint.setup(stage)                                          levin/callbacks/model_checkpoint.py:N
    Plain.configure_optimizers()  -> SGD                                  test_text.py:N
StatefulData.val_dataloader()                                             test_explain.py:N
sanity check: nothing of it is logged or counted
    Plain.on_validation_model_eval()                                      levin/hooks.py:N
    for batch in val_dataloaders:  # 2 batches, in torch.no_grad()
        batch.to('cpu')
        Plain.validation_step(batch, batch_idx)                           test_text.py:N
            # logs 'val' of the step and over the epoch
    ModelCheckpoint.on_validation_end()                                   levin/callbacks/model_checkpoint.py:N
    each submodule back into its own train or eval mode
StatefulData.train_dataloader()                                           test_explain.py:N
ModelCheckpoint.on_train_start()                                          levin/callbacks/model_checkpoint.py:N
for epoch in range(1):  # ends early at trainer.should_stop
    for batch in train_dataloader:  # 600 batches
        batch.to('cpu')
        optimizer.step(closure):  # SGD, through Stepping.optimizer_step
            loss = Plain.training_step(batch)                             test_text.py:N
                # logs 'loss' of the step and over the epoch, on the progress bar
            optimizer.zero_grad()
            loss.backward()
            Plain.on_before_optimizer_step(optimizer)                     test_text.py:N
            clip_grad_norm_(parameters, 0.5)
            the update of the parameters
        ModelCheckpoint.on_train_batch_end(outputs, batch, batch_idx)     levin/callbacks/model_checkpoint.py:N
        CSVLogger.log_metrics(values of the step)  # after every 50th batch  levin/loggers/csv_logs.py:N
        CSVLogger.log_metrics(values of the step)  # after every 50th batch  levin/loggers/csv_logs.py:N
    ModelCheckpoint.on_train_epoch_end()                                  levin/callbacks/model_checkpoint.py:N
    CSVLogger.log_metrics(values of the epoch)                            levin/loggers/csv_logs.py:N
    CSVLogger.log_metrics(values of the epoch)                            levin/loggers/csv_logs.py:N
ModelCheckpoint.on_train_end()                                            levin/callbacks/model_checkpoint.py:N
Plain.on_fit_end()                                                        test_text.py:N

a checkpoint holds:
    state_dict: 2 tensors, 0.00 MB
    optimizer_states: SGD
    lr_schedulers: none
    callbacks: Adds, ModelCheckpoint
    hyper_parameters: size
    datamodule_hyper_parameters: num, other
    loops, epoch, global_step: the counters
    levin: random states of every rank, the place in the data, sums of self.log, an open accumulation window
    StatefulData: its state_dict  test_text.py:N
    what Adds.on_save_checkpoint adds  test_text.py:N
    what Plain.on_save_checkpoint adds  test_text.py:N
    written by ModelCheckpoint

not called, since nobody overrides them:
    on_fit_start, on_sanity_check_start, on_sanity_check_end, on_train_epoch_start,
    on_train_batch_start, on_validation_start, on_validation_epoch_start, on_validation_epoch_end,
    on_validation_batch_start, on_validation_batch_end, on_before_zero_grad, on_before_backward,
    on_after_backward, on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer,
    optimizer_step, optimizer_zero_grad, configure_gradient_clipping, backward, lr_scheduler_step
"""


def test_a_fit_with_the_places_of_what_it_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    data = StatefulData(600, 2)
    data.save_hyperparameters({"num": 1, "other": 2})
    trainer = trainer_of(
        tmp_path, max_epochs=1, callbacks=[Adds()], logger=[CSVLogger(tmp_path), CSVLogger(tmp_path)],
        strategy=Stepping(), gradient_clip_val=0.5, num_sanity_val_steps=-1, check_val_every_n_epoch=2,
    )  # fmt: skip
    text = trainer.explain(Plain(), data, ckpt_path="some.ckpt")
    text = re.sub(r"\{'.*?\}", "", re.sub(r":\d+$", ":N", text, flags=re.MULTILINE))
    assert text == WITH_PLACES.removeprefix("\n")


EVALUATIONS = {
    "test": """
test of Own
on 1 process, cpu, SingleDeviceStrategy, precision 32-true
loggers: CSVLogger

set-up
Own.on_test_model_eval()
for batch in test_dataloaders:  # 4 batches, in torch.inference_mode()
    batch.to('cpu')
    Own.on_test_batch_start(batch, batch_idx, dataloader_idx)
    Own.test_step(batch, batch_idx, dataloader_idx)
        # logs 'test' over the epoch
CSVLogger.log_metrics(values of the test)
each submodule back into its own train or eval mode

not called, since nobody overrides them:
    on_test_start, on_test_end, on_test_epoch_start, on_test_epoch_end, on_test_batch_end,
    on_before_batch_transfer, transfer_batch_to_device, on_after_batch_transfer
""",
    "validate": """
validate of Own
on 1 process, cpu, SingleDeviceStrategy, precision 32-true
loggers: CSVLogger
it begins with the checkpoint 'some.ckpt', which is not read here

set-up
Data.val_dataloader()
Own.on_validation_model_eval()
for batch in val_dataloaders:  # 3 batches, in torch.inference_mode()
    batch.to('cpu')
    Own.validation_step(batch, batch_idx)
        # logs 'val' over the epoch
CSVLogger.log_metrics(values of the validation)
each submodule back into its own train or eval mode

not called, since nobody overrides them:
    on_validation_start, on_validation_end, on_validation_epoch_start, on_validation_epoch_end,
    on_validation_batch_start, on_validation_batch_end, on_before_batch_transfer,
    transfer_batch_to_device, on_after_batch_transfer
""",
    "predict": """
predict of Own
on 1 process, cpu, SingleDeviceStrategy, precision 32-true
loggers: CSVLogger

set-up
Data.predict_dataloader()
Own.on_predict_model_eval()
for batch in predict_dataloaders:  # 3 batches, in torch.inference_mode()
    batch.to('cpu')
    Own.predict_step(batch, batch_idx)
each submodule back into its own train or eval mode

not called, since nobody overrides them:
    on_predict_start, on_predict_end, on_predict_epoch_start, on_predict_epoch_end,
    on_predict_batch_start, on_predict_batch_end, on_before_batch_transfer,
    transfer_batch_to_device, on_after_batch_transfer
""",
}


@pytest.mark.parametrize("fn", EVALUATIONS)
def test_an_evaluation_in_words(fn, tmp_path):
    class OwnOfTwo(Own):
        def on_test_batch_start(self, batch, batch_idx, dataloader_idx):
            """Overridden."""

    OwnOfTwo.__name__ = "Own"
    given = {
        "test": {"dataloaders": [DataLoader(RandomDataset(32, 5))] * 2},
        "validate": {"datamodule": Data(1, 3), "ckpt_path": "some.ckpt"},
        "predict": {"datamodule": Data(1, 3)},
    }
    trainer = trainer_of(tmp_path, limit_test_batches=2, logger=CSVLogger(tmp_path), enable_checkpointing=False)
    assert lines_of(trainer.explain(OwnOfTwo(), fn=fn, **given[fn])) == EVALUATIONS[fn].strip().splitlines()


def said(tmp_path, due, num_batches=10, **options):
    """What is said of a rule."""
    with mock.patch.object(explained_run, "explain", lambda run: rules.Rules(run).words(due)):
        trainer = trainer_of(tmp_path, enable_checkpointing=False, **{"max_epochs": 1} | options)
        return trainer.explain(Net(), datamodule=Data(num_batches, 1))


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (range(10), "after every batch"),
        ([], ""),
        ([9], "after the last batch"),
        ([4, 9], "after every 5th batch"),
        ([3, 7], "after every 4th batch"),
        ([3, 7, 9], "after every 4th batch and the last"),
        ([1], "after batch_idx 1"),
        ([0, 9], "after batch_idx 0, 9"),
        ([1, 3], "after batch_idx 1, 3"),
        (range(6), "after batch_idx 0, 1, 2, 3, 4, 5"),
        (range(1, 10), "after batch_idx 1, 2, 3, 4, 5, 6, ..."),
    ],
)
def test_batches_of_an_epoch_in_words(batches, words, tmp_path):
    assert said(tmp_path, lambda place: place.batch_idx in batches) == words


@pytest.mark.parametrize(
    ("every", "nth"),
    [(2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (21, "21st"), (111, "111th"), (122, "122nd")],
)  # fmt: skip
def test_a_number_in_words(every, nth, tmp_path):
    words = said(tmp_path, lambda place: place.batch_idx % every == every - 1, num_batches=2 * every + 1)
    assert words == f"after every {nth} batch"


@pytest.mark.parametrize(
    ("due", "options", "words"),
    [
        (lambda epoch, idx: epoch % 2, {"max_epochs": 4}, "after every batch of every 2nd epoch"),
        (lambda epoch, idx: epoch in (0, 3) and idx == 9, {"max_epochs": 4}, "after the last batch of epochs 0, 3"),
        (lambda epoch, idx: (10 * epoch + idx) % 4 == 3, {"max_epochs": 2}, "after every 4th batch of the run"),
        (lambda epoch, idx: epoch == idx, {"max_epochs": 3}, "after batches 0, 11, 22 of the run"),
        # The second epoch is cut short.
        (lambda epoch, idx: idx == 9, {"max_epochs": 2, "max_steps": 15}, "after the last batch of epochs 0"),
        (lambda epoch, idx: idx % 5 == 4, {"max_epochs": 2, "max_steps": 15}, "after every 5th batch"),
        (lambda epoch, idx: idx == 4, {"max_steps": 5}, "after every 5th batch"),
    ],
)  # fmt: skip
def test_epochs_in_words(due, options, words, tmp_path):
    assert said(tmp_path, lambda place: due(*place), **options) == words
