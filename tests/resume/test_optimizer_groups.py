"""Parameters that an optimizer gets in the middle of a run: scheduled like the others, and there again after a resume."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from levin import Callback, LightningModule, Trainer
from levin.callbacks import BaseFinetuning

DATA = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(3))

KINDS = {
    "onecycle": lambda o: schedulers.OneCycleLR(o, 0.1, total_steps=40),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.01, 0.1),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 30),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 10),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "sequence": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.CosineAnnealingLR(o, 30)], [5]
    ),
    "chain": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o), schedulers.LambdaLR(o, lambda step: 1.1)]
    ),
}


class Model(LightningModule):
    named = False
    schedule = staticmethod(KINDS["exponential"])

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).pow(2).mean()

    def configure_optimizers(self):
        parameters = self.head.named_parameters() if self.named else self.head.parameters()
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


class AddsGroup(Callback):
    epoch = 1

    def on_fit_start(self, trainer, pl_module):
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            self.grow(trainer.optimizers[0], pl_module.backbone.requires_grad_(True))

    def grow(self, optimizer, layer):
        named = "param_names" in optimizer.param_groups[0]
        optimizer.add_param_group(
            {"params": layer.named_parameters("backbone") if named else layer.parameters(), "lr": 0.01}
        )


class AddsTwice(AddsGroup):
    def grow(self, optimizer, layer):
        for parameter in (layer.bias, layer.weight):
            optimizer.add_param_group({"params": [parameter], "lr": 0.02})


class GrowsInPlace(AddsGroup):
    def grow(self, optimizer, layer):
        optimizer.param_groups[0]["params"].extend(layer.parameters())


class PutsInFront(AddsGroup):
    def grow(self, optimizer, layer):
        optimizer.param_groups[0]["params"][:0] = [layer.bias, layer.weight]


class WithinEpoch(AddsGroup):
    epoch = -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            self.grow(trainer.optimizers[0], pl_module.backbone.requires_grad_(True))


class FinetuningInPlace(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.make_trainable(pl_module.backbone)
            optimizer.param_groups[0]["params"].extend(pl_module.backbone.parameters())


class Finetuning(FinetuningInPlace):
    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, initial_denom_lr=4.0)


class Saves(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 9:
            trainer.save_checkpoint(self.path)


def fit(tmp_path, model, callback, **options):
    ckpt_path = options.pop("ckpt_path", None)
    trainer = Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=callback, **options,
    )  # fmt: skip
    trainer.fit(model, DataLoader(DATA, batch_size=None), ckpt_path=ckpt_path)
    return trainer


def rates(trainer):
    return [group["lr"] for group in trainer.optimizers[0].param_groups]


def resumed_and_unbroken(tmp_path, make_model, callback):
    whole = fit(tmp_path, make_model(), [callback(), Saves(tmp_path / "a.ckpt")], max_epochs=4)
    return fit(tmp_path, make_model(), callback(), max_epochs=4, ckpt_path=tmp_path / "a.ckpt"), whole


@pytest.mark.parametrize(
    ("callback", "named"),
    [
        (AddsGroup, False), (AddsGroup, True), (AddsTwice, False), (GrowsInPlace, False), (PutsInFront, False),
        (WithinEpoch, False), (FinetuningInPlace, False),
    ],
)  # fmt: skip
def test_what_an_optimizer_was_given_is_there_after_a_resume(tmp_path, callback, named):
    class Named(Model):
        pass

    Named.named = named
    second, whole = resumed_and_unbroken(tmp_path, Named, callback)
    assert rates(second) == rates(whole)
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(second.lightning_module.state_dict()[name], value), name
    assert not torch.equal(whole.lightning_module.backbone.weight, Model().backbone.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_group_follows_the_schedule_of_the_first(tmp_path, kind):
    class Scheduled(Model):
        schedule = staticmethod(KINDS[kind])

    second, whole = resumed_and_unbroken(tmp_path, Scheduled, Finetuning)
    first, new = rates(whole)
    assert new == pytest.approx(first / 4)
    first_group, new_group = whole.optimizers[0].param_groups
    for key in ("initial_lr", "max_lr", "min_lr"):
        if key in first_group:
            assert new_group[key] == pytest.approx(first_group[key] / 4)
    for key in ("momentum", "base_momentum", "max_momentum"):
        assert new_group.get(key) == first_group.get(key)
    assert rates(second) == rates(whole)
    assert first == pytest.approx(rates(fit(tmp_path, Scheduled(), [], max_epochs=4))[0])


@pytest.mark.parametrize("rates_of_own", [(0.1,), [], None])
def test_what_a_scheduler_of_ones_own_keeps_otherwise_is_left_to_it(tmp_path, rates_of_own):
    class Own(schedulers.LRScheduler):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            self.base_lrs = rates_of_own

        def get_lr(self):
            return [0.03 for _ in self.optimizer.param_groups]

    class Scheduled(Model):
        schedule = staticmethod(Own)

    trainer = fit(tmp_path, Scheduled(), Finetuning(), max_epochs=3)
    assert rates(trainer) == [0.03, 0.03]
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == rates_of_own


def test_a_plateau_lowers_new_groups_too(tmp_path):
    class Watching(Model):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.head.parameters(), lr=0.08)
            plateau = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=[0.005])
            return [optimizer], [{"scheduler": plateau, "monitor": "worse"}]

        def on_train_epoch_end(self):
            self.log("worse", float(self.current_epoch))

        def lr_scheduler_step(self, scheduler, metric):
            super().lr_scheduler_step(scheduler, metric)

    assert rates(fit(tmp_path, Watching(), Finetuning(), max_epochs=4)) == [0.01, 0.005]


@pytest.mark.parametrize("now", [0, 1, 3])
def test_another_number_of_schedulers_is_said(tmp_path, now):
    class Two(Model):
        number = 2

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return [optimizer], [
                {"scheduler": schedulers.MultiplicativeLR(optimizer, lambda step: 0.5), "interval": "step"}
                for _ in range(self.number)
            ]

    class Other(Two):
        number = now

    first = fit(tmp_path, Two(), [], max_epochs=1)
    first.save_checkpoint(tmp_path / "a.ckpt")
    rest = r"\['MultiplicativeLR'\] begin anew" if now > 2 else f"the last {2 - now} are left out"
    with pytest.warns(
        UserWarning,
        match=rf"states of 2 learning-rate schedulers, and .* gives {now}: .*first {min(2, now)} go on .*{rest}",
    ):
        second = fit(tmp_path, Other(), [], max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    steps = [config.scheduler.last_epoch for config in second.lr_scheduler_configs]
    assert steps == [8, 8, 4][:now]
