"""An error in any hook, then fit again with the same Trainer: the second fit does all that is left, and no more."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from levin import Callback, LightningModule
from levin.hooks import ModelHooks
from tests.parity import both

EPOCHS, BATCHES = 3, 2
NOT_IN_FIT = ("test", "predict", "exception", "checkpoint")


def hooks_of(kind: type) -> list[str]:
    names = [name for name in dir(kind) if name.startswith("on_") or name in ("setup", "teardown")]
    return [name for name in names if not any(word in name for word in NOT_IN_FIT)]


PLACES = [("callback", name) for name in hooks_of(Callback)] + [
    ("module", name)
    for name in [*hooks_of(ModelHooks), "training_step", "validation_step", "lr_scheduler_step", "optimizer_step"]
]


def fit_twice(framework, tmp_path, owner, name, when):
    """Fail in the call number ``when`` of one hook. Returns the counters after the failure and at the end."""
    calls = []

    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum()

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch).sum())

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    class Watcher(framework.Callback):
        """Holds the hook that fails."""

    base = Model if owner == "module" else framework.Callback
    plain = getattr(base, name)

    def failing(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == when:
            raise ValueError("meant")
        return plain(self, *args, **kwargs)

    setattr(Model if owner == "module" else Watcher, name, failing)
    trainer = both.quiet(framework, tmp_path, max_epochs=EPOCHS, callbacks=[Watcher()], num_sanity_val_steps=1)
    module, places = Model(), []
    for _ in range(2):
        try:
            trainer.fit(module, DataLoader(torch.ones(2 * BATCHES, 2), 2), DataLoader(torch.ones(2, 2), 2))
        except ValueError as error:
            assert str(error) == "meant"
        places.append((trainer.current_epoch, trainer.global_step, trainer.fit_loop.epoch_progress.current.processed))
    return places


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize(("owner", "name"), PLACES, ids=str)
def test_the_second_fit_does_what_is_left(tmp_path, owner, name, when):
    (_, steps, epochs), end = fit_twice(both.levin(), tmp_path, owner, name, when)
    assert end == (EPOCHS, steps + BATCHES * (EPOCHS - epochs), EPOCHS)


@pytest.mark.parametrize(("owner", "name"), [("callback", "on_train_epoch_end"), ("module", "on_train_batch_end")])
def test_lightning_does_so_as_well(tmp_path, owner, name):
    assert fit_twice(both.levin(), tmp_path, owner, name, 2) == fit_twice(both.lightning(), tmp_path, owner, name, 2)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        raise AssertionError("was taken away")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_an_epoch_that_failed_after_a_resume_is_trained_anew(tmp_path):
    class Failing(Model):
        places: list = []

        def training_step(self, batch, batch_idx):
            self.places.append((self.trainer.current_epoch, batch_idx))
            if len(self.places) == 2:
                raise ValueError("meant")
            return super().training_step(batch, batch_idx)

    data, none = DataLoader(torch.ones(6, 2), 2), DataLoader(torch.ones(2, 2), 2)
    trainer = both.quiet(both.levin(), tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(Model(), data, none)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module, trainer = Failing(), both.quiet(both.levin(), tmp_path, max_epochs=2, limit_val_batches=0)
    with pytest.raises(ValueError, match="meant"):
        trainer.fit(module, data, none, ckpt_path=tmp_path / "a.ckpt")
    trainer.fit(module, data, none)
    assert module.places == [(1, 0), (1, 1), (1, 0), (1, 1), (1, 2)]


HOOKS = [*hooks_of(ModelHooks), "configure_callbacks", "configure_model", "prepare_data", "on_save_checkpoint"]


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_is_none_is_no_hook(tmp_path, name):
    module, callback = Model(), Callback()
    module.validation_step = lambda batch, batch_idx: module.log("val", module.layer(batch).sum())
    setattr(module, name, None)
    setattr(callback, name, None)
    trainer = both.quiet(both.levin(), tmp_path, max_epochs=1, callbacks=[callback])
    trainer.fit(module, DataLoader(torch.ones(4, 2), 2), DataLoader(torch.ones(2, 2), 2))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert trainer.global_step == 2 and "val" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
def test_a_step_that_is_none_is_not_defined(tmp_path):
    module, trainer = Model(), both.quiet(both.levin(), tmp_path, max_epochs=1)
    module.validation_step = None
    trainer.fit(module, DataLoader(torch.ones(4, 2), 2), DataLoader(torch.ones(2, 2), 2))
    assert not trainer.enable_validation and trainer.global_step == 2
    for name in ("training_step", "configure_optimizers"):
        module = Model()
        setattr(module, name, None)
        with pytest.raises(ValueError, match=f"requires `{name}`, which Model does not define"):
            trainer.fit(module, DataLoader(torch.ones(4, 2), 2))
    module.training_step = None
    with pytest.raises(ValueError, match="requires `validation_step`"):
        module.validation_step = None
        trainer.validate(module, DataLoader(torch.ones(2, 2), 2))
    with pytest.raises(ValueError, match="requires `predict_step`"):
        module.predict_step = None
        trainer.predict(module, DataLoader(torch.ones(2, 2), 2))
