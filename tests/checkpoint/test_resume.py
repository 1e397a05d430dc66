"""A run that was stopped and resumed is the unbroken run, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from levin import Callback, LightningModule, Trainer
from levin.loggers import CSVLogger


class Noisy(Dataset):
    """Augments at random when a sample is loaded."""

    def __init__(self, length: int = 14) -> None:
        self.data = torch.randn(length, 4, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.data[index] + 0.1 * torch.randn(4)


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).pow(2).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.net(batch).mean())

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Watch(Callback):
    """Saves at one moment and records what is logged after it."""

    def __init__(self, path=None, moment=None, at=(0, 0)) -> None:
        self.path, self.moment, self.at = path, moment, at
        self.seen: list = []

    def _maybe(self, trainer, moment) -> None:
        if self.path and moment == self.moment and (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.at:
            trainer.save_checkpoint(self.path)
            self.seen.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append((trainer.current_epoch, batch_idx, outputs["loss"].item()))
        self._maybe(trainer, "on_train_batch_end")

    def on_validation_end(self, trainer, pl_module) -> None:
        if not trainer.sanity_checking:
            self.seen.append(("val", trainer.callback_metrics["val"].item()))
        self._maybe(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.seen.append(("epoch", trainer.callback_metrics["loss_epoch"].item()))
        self._maybe(trainer, "on_train_epoch_end")


def run(watch, flags, shuffle, ckpt_path=None, kind=Model):
    torch.manual_seed(11)
    model = kind()
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[watch], **{"logger": False, **flags},
    )  # fmt: skip
    train = DataLoader(Noisy(), batch_size=2, shuffle=shuffle)
    val = DataLoader(Noisy(4), batch_size=2)
    trainer.fit(model, train, val, ckpt_path=ckpt_path)
    return model, trainer


def saved_in_the_middle(tmp_path, at=(1, 3)):
    path = str(tmp_path / "stop.ckpt")
    return path, *run(Watch(path, "on_train_batch_end", at), {}, False)


def test_a_value_may_be_logged_in_another_way_after_a_resume(tmp_path, caplog):
    class Other(Model):
        def log(self, name, value, **how):
            super().log(name, value, **how, prog_bar=True)

        def on_train_epoch_end(self):
            shown.append([name for name in self.trainer.progress_bar_metrics if name.startswith("loss")])

    shown = []
    path, _, first = saved_in_the_middle(tmp_path)
    _, trainer = run(Watch(), {}, False, ckpt_path=path, kind=Other)
    assert torch.equal(trainer.callback_metrics["loss_epoch"], first.callback_metrics["loss_epoch"])
    assert f"Restored all states from the checkpoint at {path}" in caplog.messages
    # The epoch that was begun ends as it began.
    assert shown == [[], ["loss_step", "loss_epoch"]]
    assert trainer.progress_bar_metrics["loss_epoch"] == first.callback_metrics["loss_epoch"].item()


def test_a_name_logged_in_two_ways_after_a_resume_is_refused(tmp_path):
    class Twice(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.current_epoch == 2:
                self.log("loss", loss, prog_bar=True)
            return loss

    path, _, _ = saved_in_the_middle(tmp_path)
    with pytest.raises(ValueError, match="was called twice in training_step with different arguments"):
        run(Watch(), {}, False, ckpt_path=path, kind=Twice)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_shorter_epoch_that_ends_with_the_resume_is_no_warning_of_torch_about_the_schedule(tmp_path, accumulate):
    class PerEpoch(Model):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    path = tmp_path / "batch_3.ckpt"
    flags = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    flags.update(enable_checkpointing=False, accumulate_grad_batches=accumulate, max_epochs=1)
    watch = Watch(path, "on_train_batch_end", (0, 3))
    Trainer(**flags, callbacks=[watch]).fit(PerEpoch(), DataLoader(Noisy(), 2), DataLoader(Noisy(2)))
    resumed = Trainer(**flags, limit_train_batches=4)
    # The optimizer has made its steps of this epoch in the run before.
    resumed.fit(PerEpoch(), DataLoader(Noisy(), 2), DataLoader(Noisy(2)), ckpt_path=path)
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_what_is_logged_when_training_starts_counts_once(tmp_path):
    class Starting(Model):
        def on_train_start(self):
            self.log("start", 1.0 + self.global_step)

    logged = []

    class Values(CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((metrics.get("start"), step))

    path = str(tmp_path / "stop.ckpt")
    flags = {"logger": Values(tmp_path), "log_every_n_steps": 1}
    run(Watch(path, "on_train_batch_end", (1, 3)), flags, False, kind=Starting)
    whole, _ = list(logged), logged.clear()
    assert [value for value, _ in whole if value is not None] == [1.0]
    run(Watch(), flags, False, ckpt_path=path, kind=Starting)
    assert logged == whole[-len(logged) :]


def test_the_part_of_another_version_of_levin_is_left_out_and_said(tmp_path):
    path, _, first = saved_in_the_middle(tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["levin"]["version"] = 99
    torch.save(saved, path)
    with (
        pytest.warns(
            UserWarning, match="has version 99 of what levin keeps for an exact resume, and .* reads version 2:"
        ),
        pytest.warns(UserWarning, match="without the position in the data: the loader starts again, from batch 4 on"),
    ):
        _, trainer = run(Watch(), {}, False, ckpt_path=path)
    assert (trainer.current_epoch, trainer.global_step) == (3, first.global_step)


FLAGS = [
    {},
    {"accumulate_grad_batches": 2},
    {"val_check_interval": 3},
    {"accumulate_grad_batches": 3, "val_check_interval": 2},
]
MOMENTS = [
    ("on_train_epoch_end", (0, 6)),
    ("on_train_epoch_end", (1, 6)),
    ("on_train_batch_end", (0, 2)),
    ("on_train_batch_end", (1, 3)),
    ("on_train_batch_end", (1, 6)),
]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("flags", "moment", "at"),
    [
        *((flags, moment, at) for flags in FLAGS for moment, at in MOMENTS),
        *((flags, "on_validation_end", (1, 5 if "val_check_interval" in flags else 6)) for flags in FLAGS),
    ],
)
def test_resumed_run_equals_the_unbroken_one(tmp_path, flags, shuffle, moment, at):
    path = str(tmp_path / "stop.ckpt")
    unbroken = Watch(path, moment, at)
    expected, first = run(unbroken, flags, shuffle)
    assert (tmp_path / "stop.ckpt").exists()
    resumed = Watch()
    torch.manual_seed(99)
    model, trainer = run(resumed, flags, shuffle, ckpt_path=path)
    assert resumed.seen == unbroken.seen
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert trainer.global_step == first.global_step
    assert trainer.current_epoch == first.current_epoch
    a, b = trainer.optimizers[0].state_dict(), first.optimizers[0].state_dict()
    for key, state in a["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["state"][key][name])
    assert a["param_groups"] == b["param_groups"]


@pytest.mark.parametrize("is_absent", [True, False])
def test_states_of_callbacks_that_are_not_there_are_pointed_out(tmp_path, is_absent):
    class Counts(Callback):
        def state_dict(self):
            return {"count": 3}

    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
    data = DataLoader(Noisy(4), 2)
    trainer = Trainer(callbacks=[Counts()], **settings)
    trainer.fit(Model(), data, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer = Trainer(callbacks=[] if is_absent else [Counts()], **{**settings, "max_epochs": 2})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Model(), data, data, ckpt_path=tmp_path / "a.ckpt")
    told = [
        str(each.message)
        for each in caught
        if "states of callbacks that the Trainer does not have" in str(each.message)
    ]
    assert len(told) == is_absent and all(Counts.__qualname__ in text for text in told)
