"""Finetuning Scheduler as its documentation says: layers are thawed phase by phase, each from the best of the one before."""

import pytest
import torch
from finetuning_scheduler import FinetuningScheduler, FTSCheckpoint, FTSEarlyStopping
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

LAYERS = ["l1", "l2", "l3"]


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.l1, self.l2, self.l3 = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def loss(self, batch):
        x = torch.tanh(self.l2(torch.tanh(self.l1(batch[0]))))
        return torch.nn.functional.cross_entropy(self.l3(x), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.05)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)


class Phases(Callback):
    def __init__(self):
        self.learning = []

    def on_train_epoch_start(self, trainer, pl_module):
        names = {name.split(".")[0] for name, p in pl_module.named_parameters() if p.requires_grad}
        groups = [(len(group["params"]), round(group["lr"], 5)) for group in trainer.optimizers[0].param_groups]
        self.learning.append((sorted(names), groups))


def fitted(tmp_path, *callbacks, **settings):
    seed_everything(0)
    phases, quiet = Phases(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        **quiet, accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[*callbacks, phases], **settings
    )
    module = Net()
    trainer.fit(module, data(), data())
    return trainer, module, phases.learning


def stopping():
    return FTSEarlyStopping(monitor="val_loss", patience=1, min_delta=0.02)


def best(tmp_path):
    return FTSCheckpoint(dirpath=tmp_path / "best", monitor="val_loss", save_top_k=2)


@pytest.mark.parametrize(
    "schedule",
    [None, {0: {"params": ["l3.*"]}, 1: {"params": ["l2.*"]}, 2: {"params": ["l1.*"]}}],
    ids=["own", "given"],
)
def test_layers_are_thawed_when_a_phase_learns_no_more(tmp_path, schedule):
    scheduler = FinetuningScheduler(ft_schedule=schedule)
    trainer, _, learning = fitted(tmp_path, scheduler, best(tmp_path), stopping(), max_epochs=8)
    assert [names for names, _ in learning] == [LAYERS[2:], LAYERS[2:], LAYERS[1:], LAYERS, LAYERS]
    assert learning[3][1] == [(2, 0.03645), (2, 1e-05), (2, 1e-05)]
    assert (trainer.current_epoch, trainer.global_step, scheduler.curr_depth) == (5, 40, 2)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(0.61853, abs=1e-4)


def test_layers_are_thawed_at_given_epochs(tmp_path):
    schedule = {
        0: {"params": ["l3.*"], "max_transition_epoch": 1},
        1: {"params": ["l2.*"], "max_transition_epoch": 3, "lr": 1e-3},
        2: {"params": ["l1.*"], "max_transition_epoch": 6},
    }
    scheduler = FinetuningScheduler(ft_schedule=schedule, epoch_transitions_only=True, restore_best=False)
    _, _, learning = fitted(tmp_path, scheduler, best(tmp_path), max_epochs=5)
    assert [names for names, _ in learning][:5] == [LAYERS[2:], LAYERS[1:], LAYERS[1:], LAYERS, LAYERS]
    assert learning[1][1][1] == (2, 1e-3)


def test_each_phase_begins_with_the_best_weights_of_the_one_before(tmp_path):
    loaded = []

    class Best(FinetuningScheduler):
        def restore_best_ckpt(self):
            super().restore_best_ckpt()
            path = self.trainer.checkpoint_callback.best_model_path
            saved = torch.load(path, weights_only=False)["state_dict"]
            loaded.append(all(torch.equal(value, saved[name]) for name, value in self.pl_module.state_dict().items()))

    fitted(tmp_path, Best(), best(tmp_path), stopping(), max_epochs=8)
    assert loaded == [True, True]


def test_what_it_needs_besides_is_added(tmp_path):
    trainer, _, _ = fitted(tmp_path, FinetuningScheduler(), max_epochs=1)
    assert isinstance(trainer.early_stopping_callback, FTSEarlyStopping)
    assert isinstance(trainer.checkpoint_callback, FTSCheckpoint)
    assert trainer.callbacks[-1] is trainer.checkpoint_callback


def test_a_schedule_is_written_for_the_user_to_change(tmp_path):
    with pytest.raises(SystemExit):
        fitted(tmp_path, FinetuningScheduler(gen_ft_sched_only=True), max_epochs=1)
    (written,) = tmp_path.rglob("Net_ft_schedule.yaml")
    assert "l3.weight" in written.read_text()
