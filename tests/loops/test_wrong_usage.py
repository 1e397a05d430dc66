"""What is wrong in a module is said with the value received, before or at the place where it matters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import levin
from levin import LightningModule, Trainer
from levin.callbacks import EarlyStopping, ModelCheckpoint
from levin.demos.boring_classes import BoringModel
from levin.loggers import CSVLogger
from levin.profilers import SimpleProfiler
from levin.utilities.exceptions import MisconfigurationException


def sgd(module: Any) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def scheduled(module: Any, **keys: Any) -> dict[str, Any]:
    optimizer = sgd(module)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1), **keys},
    }


WRONG: dict[str, tuple[str, Any, str]] = {
    "loss_is_a_number": ("training_step", lambda self, batch: 1.5, r"must return a tensor .* received float"),
    "loss_of_a_row": ("training_step", lambda self, batch: self.layer(batch), r"one element, received a tensor of shape \(2, 1\)\."),
    "loader_class": ("train_dataloader", lambda self: DataLoader, r"received the class DataLoader\. Pass an instance: DataLoader\("),
    "no_loss": ("training_step", lambda self, batch: {"a": 1}, r"under 'loss', received keys \['a'\]\. Return None"),
    "loss_is_none": ("training_step", lambda self, batch: {"loss": None}, r"tensor under 'loss', received None\. Return None"),
    "optimizer_idx": ("training_step", lambda self, batch, batch_idx, optimizer_idx: None, r"optimizer_idx.*manual optimization"),
    "no_arguments": ("training_step", lambda: None, r"at least the batch, received.*Write `def training_step"),
    "no_optimizer": ("configure_optimizers", lambda self: 3, r"must return an optimizer.*received 3"),
    "two_optimizers": ("configure_optimizers", lambda self: [sgd(self), sgd(self)], r"received 2\. Set `self.automatic_optimization"),
    "interval": ("configure_optimizers", lambda self: scheduled(self, interval="batch"), r"'epoch' or 'step', received 'batch'"),
    "frequency": ("configure_optimizers", lambda self: scheduled(self, frequency=0), r"int >= 1, received 0"),
    "closure": ("optimizer_step", lambda self, *args: None, r"did not run `optimizer_closure`.*Call `optimizer.step"),
    "callbacks": ("configure_callbacks", lambda self: 3, r"must return a callback or a list of callbacks, received 3"),
    "loader": ("train_dataloader", lambda self: None, r"must return a loader, received None\. Return \[\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_hook_is_told_with_what_it_gave(name):
    hook, function, message = WRONG[name]

    class Model(levin.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch):
            return self.layer(batch).mean()

        def train_dataloader(self):
            return DataLoader(torch.ones(4, 4), batch_size=2)

        def configure_optimizers(self):
            return sgd(self)

    setattr(Model, hook, staticmethod(function) if name == "no_arguments" else function)
    trainer = levin.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        trainer.fit(Model())


@pytest.mark.parametrize("nothing", [[], {}, None], ids=str)
def test_a_fit_without_any_loader_says_so(nothing, recwarn):
    class Model(BoringModel):
        validation_step = None

        def train_dataloader(self):
            return nothing

        def val_dataloader(self):
            return []

    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    if nothing is None:
        with pytest.raises(TypeError, match=r"`train_dataloader` must return a loader, received None"):
            trainer.fit(Model())
    else:
        trainer.fit(Model())
    told = [(each.category, str(each.message).split(".")[0]) for each in recwarn]
    # No mere hint, which could be switched off with the others.
    assert told[0] == (UserWarning, "You passed in a `val_dataloader` but have no `validation_step`")
    lacking = [(UserWarning, "`train_dataloader` gives no loader, so nothing is trained")]
    assert told[1:] == (lacking if nothing is not None else [])


def test_the_class_of_a_module_and_swapped_arguments_are_told_apart(tmp_path):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
    loader = DataLoader(torch.ones(4, 2), 2)
    with pytest.raises(
        TypeError, match=r"received <class .*Graphless'>. It is a class; pass an instance: Graphless\(\.\.\.\)"
    ):
        trainer.fit(Graphless, loader)
    for name in ("fit", "validate", "test", "predict"):
        with pytest.raises(TypeError, match=rf"received DataLoader. Swap them: trainer.{name}\(model, loaders\)"):
            getattr(trainer, name)(loader, Graphless())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trainer(logger=CSVLogger), r"logger must be an object, not its class.*Write CSVLogger\(\.\.\.\)"),
        (lambda: Trainer(logger=[CSVLogger]), r"logger must be an object, not its class"),
        (lambda: Trainer(profiler=SimpleProfiler), r"profiler must be an object, not its class.*Write SimpleProfiler\("),
        (lambda: EarlyStopping("val", patience="3"), "patience must be a number, received '3'"),
        (lambda: ModelCheckpoint(save_top_k="1"), "save_top_k must be a number, received '1'"),
        (lambda: ModelCheckpoint(every_n_epochs="1"), "every_n_epochs must be a number, received '1'"),
        (lambda: ModelCheckpoint(every_n_train_steps="1"), "every_n_train_steps must be a number, received '1'"),
        (lambda: ModelCheckpoint(monitor=["a", "b"]), r"name of one metric, or None, received \['a', 'b'\]"),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_told(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        make()


def test_an_argument_that_is_not_there_gets_the_nearest_one():
    with pytest.raises(TypeError, match="has no argument 'max_epoch', received max_epoch=3. Did you mean max_epochs?"):
        Trainer(max_epoch=3)
    with pytest.raises(TypeError, match="has no argument 'shape', received shape=3.$"):
        Trainer(shape=3)


class Graphless(LightningModule):
    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).sum().detach()
        if not self.automatic_optimization:
            self.manual_backward(loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_loss_without_a_graph_is_explained(manual, precision):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, precision=precision,
        enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=r"received one without a graph \(requires_grad=False, value"):
        trainer.fit(Graphless(manual), DataLoader(torch.ones(4, 2), 2))


class Rows(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= 4:
            raise IndexError
        return torch.ones(2)


def test_a_dataset_in_place_of_a_loader_is_pointed_out():
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, enable_progress_bar=False
    )
    module = Graphless()
    module.training_step = lambda batch, batch_idx: module.layer(batch).sum()
    with pytest.warns(
        UserWarning, match=r"`train_dataloader` gives a Dataset \(Rows\), not a loader: each of its samples"
    ):
        trainer.fit(module, Rows())
    assert trainer.global_step == 4


@pytest.mark.parametrize(
    ("argument", "wrong", "meant"),
    [
        ("strategy", "dpp", "ddp"), ("strategy", "fdsp", "fsdp"), ("strategy", "ddp-spawn", "ddp_spawn"),
        ("precision", "bf16_mixed", "bf16-mixed"), ("precision", "16mixed", "16-mixed"), ("accelerator", "cdua", "cuda"),
        ("accelerator", "gpus", "gpu"), ("profiler", "simpel", "simple"),
        ("profiler", "py-torch", "pytorch"), ("logger", "csv", "CSVLogger"), ("logger", "tensorboard", "TensorBoardLogger"),
    ],
)  # fmt: skip
def test_a_mistyped_name_gets_the_nearest(argument, wrong, meant):
    with pytest.raises(ValueError, match=rf"received '{wrong}'.*\bDid you mean {meant}\?"):
        Trainer(**{argument: wrong})


@pytest.mark.parametrize("argument", ["strategy", "precision", "accelerator", "profiler", "logger"])
def test_a_name_like_no_other_gets_no_guess(argument):
    with pytest.raises(ValueError, match="received 'qqqqqq'") as caught:
        Trainer(**{argument: "qqqqqq"})
    assert "Did you mean" not in str(caught.value)


class Watches(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)


class WatchesRate(Watches):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val-loss"}}


@pytest.mark.parametrize(
    ("module", "callback"),
    [
        (Watches, EarlyStopping("val/loss")),
        (Watches, EarlyStopping("valloss")),
        (Watches, ModelCheckpoint(monitor="validation_loss")),
        (WatchesRate, []),
    ],
    ids=["stop", "stop, joined", "file", "rate"],
)
def test_a_mistyped_metric_gets_the_nearest(tmp_path, module, callback):
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, max_epochs=1, limit_train_batches=2, limit_val_batches=2,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callback, num_sanity_val_steps=0,
        enable_checkpointing=isinstance(callback, ModelCheckpoint),
    )  # fmt: skip
    with pytest.raises((RuntimeError, ValueError), match=r"Did you mean val_loss\?"):
        trainer.fit(module())
