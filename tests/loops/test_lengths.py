"""A loader whose length is not the number of its batches: the end of the data is the end of the epoch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from levin import Callback, LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.data.combined import CombinedLoader

TOO_LONG = "has a length of 5 and ended after 3 batches: the end of the data is the end of the epoch"


class Lying:
    """Says one number of batches and gives another, in each epoch those that are next in the lists."""

    def __init__(self, says: list[int], gives: list[int]) -> None:
        self.says, self.gives, self.epoch = says, gives, -1

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.epoch += 1
        number = self.gives[self.epoch % len(self.gives)]
        return iter([torch.full((2, 1), float(i)) for i in range(number)])

    def __len__(self) -> int:
        return self.says[(self.epoch + 1) % len(self.says)]


class Honest(Lying):
    def __init__(self, number: int) -> None:
        super().__init__([number], [number])


class Recording(LightningModule):
    def __init__(self, manual: bool = False, overrides: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(1, 1)
        self.automatic_optimization = not manual
        self.events: list[Any] = []
        if overrides:
            self.optimizer_step = self.own_optimizer_step

    def own_optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)

    def training_step(self, batch, batch_idx):
        self.events.append(("train", self.current_epoch, batch_idx))
        loss = self.layer(batch + 1).pow(2).mean()
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch).mean())

    def on_validation_start(self):
        self.events.append(("validation", self.current_epoch, self.global_step))

    def on_train_epoch_end(self):
        self.events.append(("epoch", self.current_epoch, self.global_step, self.trainer.is_last_batch))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def fit(loader: Any, module: Recording, **kwargs: Any) -> tuple[Trainer, list[str]]:
    trainer = Trainer(
        **{
            "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 3,
            "enable_model_summary": False, "num_sanity_val_steps": 0, **kwargs,
        }
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, Honest(2))
    return trainer, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("overrides", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_a_length_that_is_too_long_changes_nothing_of_an_epoch(accumulate, overrides):
    expected, found = Recording(overrides=overrides), Recording(overrides=overrides)
    expected_trainer, _ = fit(Honest(3), expected, accumulate_grad_batches=accumulate)
    trainer, texts = fit(Lying([5], [3]), found, accumulate_grad_batches=accumulate)
    assert found.events == expected.events
    assert [text for text in texts if "length of" in text] == [text for text in texts if TOO_LONG in text]
    assert sum(TOO_LONG in text for text in texts) == 1
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert trainer.optimizers[0].param_groups[0]["lr"] == expected_trainer.optimizers[0].param_groups[0]["lr"] == 0.0125
    assert trainer.callback_metrics["val"] == pytest.approx(expected_trainer.callback_metrics["val"].item())


def test_schedulers_of_a_window_that_the_end_of_the_data_closes_are_stepped_once_each():
    class Scheduled(Recording):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            self.stepped = []
            configs = []
            for scheduler in (torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), plateau):

                def step(*args, original=scheduler.step, name=type(scheduler).__name__, **kwargs):
                    self.stepped.append((self.trainer.current_epoch, self.global_step, name))
                    original(*args, **kwargs)

                scheduler.step = step
                configs.append({"scheduler": scheduler, "interval": "step", "monitor": "loss"})
            return [optimizer], configs

    expected, found = Scheduled(), Scheduled()
    fit(Honest(3), expected, accumulate_grad_batches=2)
    fit(Lying([5], [3]), found, accumulate_grad_batches=2)
    assert found.stepped == expected.stepped
    assert len(found.stepped) == 3 * 2 * 2


@pytest.mark.parametrize("sanity", [0, 1])
def test_validation_data_whose_length_changes_is_seen_whole_in_each_epoch(sanity):
    class Growing:
        """Gives more in each epoch: one batch, two, three."""

        num = 0

        def __len__(self) -> int:
            return self.num + 1

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.num += 1
            return iter([torch.ones(2, 1)] * self.num)

    class Counting(Recording):
        def on_validation_start(self):
            self.counted.append(0)

        def validation_step(self, batch, batch_idx):
            self.counted[-1] += 1

    module = Counting()
    module.counted = []
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=3,
        enable_model_summary=False, num_sanity_val_steps=sanity,
    )  # fmt: skip
    trainer.fit(module, Honest(2), Growing())
    assert module.counted == ([1, 2, 3, 4] if sanity else [1, 2, 3])


def test_a_length_that_is_too_long_with_manual_optimization():
    expected, found = Recording(manual=True), Recording(manual=True)
    fit(Honest(3), expected)
    fit(Lying([5], [3]), found)
    assert found.events == expected.events


@pytest.mark.parametrize("every", [1, 2])
def test_a_too_long_epoch_is_validated_once(every):
    module = Recording()
    fit(Lying([4], [2]), module, val_check_interval=0.5, check_val_every_n_epoch=every)
    validated = [event[1] for event in module.events if event[0] == "validation"]
    assert validated == ([0, 1, 2] if every == 1 else [1])


def test_checkpoints_of_a_too_long_epoch_are_written_and_gone_on_from(tmp_path):
    module = Recording()
    callback = ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val", filename="{epoch}")
    fit(Lying([5], [3]), module, callbacks=[callback], enable_checkpointing=True, accumulate_grad_batches=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
    for epoch in range(2):
        again = Recording()
        loader = Lying([5], [3])
        trainer = Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=3,
            enable_model_summary=False, accumulate_grad_batches=2,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(again, loader, Honest(2), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        for ours, theirs in zip(again.parameters(), module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_joint_loaders_end_with_their_data(mode):
    expected, found = Recording(), Recording()

    def step(self, batch, batch_idx):
        return Recording.training_step(self, batch["a"] if batch["a"] is not None else batch["b"], batch_idx)

    for module, loader in ((expected, Honest(3)), (found, Lying([5], [3]))):
        module.training_step = step.__get__(module)
        fit(CombinedLoader({"a": loader, "b": Honest(3)}, mode), module, accumulate_grad_batches=2)
    assert found.events == expected.events


def test_lengths_that_change_from_epoch_to_epoch_are_followed():
    module, numbers = Recording(), [3, 1, 4]

    class Totals(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            module.events.append(("total", trainer.num_training_batches))

    trainer, texts = fit(Lying(numbers, numbers), module, accumulate_grad_batches=2, callbacks=[Totals()])
    assert [event[1] for event in module.events if event[0] == "train"] == [0] * 3 + [1] + [2] * 4
    assert [event[1] for event in module.events if event[0] == "validation"] == [0, 1, 2]
    assert [event[3] for event in module.events if event[0] == "epoch"] == [True] * 3
    assert [event[1] for event in module.events if event[0] == "total"] == numbers
    assert trainer.global_step == 2 + 1 + 2
    assert not any("length of" in text for text in texts)


def test_a_length_says_how_long_an_epoch_of_a_longer_stream_is():
    module = Recording()
    trainer, texts = fit(Lying([2], [100]), module)
    assert [event for event in module.events if event[0] == "train"] == [
        ("train", e, i) for e in range(3) for i in range(2)
    ]
    assert [event[3] for event in module.events if event[0] == "epoch"] == [True] * 3
    assert not any("length of" in text for text in texts)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_an_evaluation_ends_with_its_data(stage):
    class Counting(Recording):
        def validation_step(self, batch, batch_idx):
            self.events.append(batch_idx)

        def test_step(self, batch, batch_idx):
            self.events.append(batch_idx)

        def predict_step(self, batch, batch_idx):
            self.events.append(batch_idx)
            return batch

        def on_validation_start(self):
            pass

    module, loader = Counting(), Lying([5], [3])
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=2,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        if stage == "fit":
            trainer.fit(module, Honest(1), loader)
        else:
            getattr(trainer, stage)(module, loader)
    assert [event for event in module.events if isinstance(event, int)] == [0, 1, 2] * (2 if stage == "fit" else 1)
    assert sum(TOO_LONG in str(warning.message) for warning in caught) == 1


def test_loaders_of_one_batch_that_say_too_much_are_named():
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Recording()
    module.training_step = lambda batch, batch_idx: module.layer(batch["a"]).mean()
    with pytest.warns(UserWarning, match=f"CombinedLoader of Lying, Honest {TOO_LONG}"):
        trainer.fit(module, {"a": Lying([5], [3]), "b": Honest(2)}, Honest(1))
