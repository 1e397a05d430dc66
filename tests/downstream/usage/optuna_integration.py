"""optuna-integration as its documentation says: a callback that prunes trials, in one process and in two."""

import warnings

import lightning.pytorch as pl
import optuna
import pytest
import torch
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader, TensorDataset

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.simplefilter("ignore")


class Model(pl.LightningModule):
    def __init__(self, lr=0.1, score=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.lr = lr
        self.score = score

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).pow(2).mean() if self.score is None else torch.tensor(float(self.score))
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 4)), batch_size=4)

    val_dataloader = train_dataloader


def trainer(trial, monitor="val_loss", **kwargs):
    callback = PyTorchLightningPruningCallback(trial, monitor=monitor)
    settings = dict(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    return pl.Trainer(callbacks=[callback], **{**settings, **kwargs}), callback


def test_a_good_trial_reports_every_epoch():
    def objective(trial):
        fitter, _ = trainer(trial)
        fitter.fit(Model())
        return fitter.callback_metrics["val_loss"].item()

    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.optimize(objective, n_trials=2)
    assert [sorted(trial.intermediate_values) for trial in study.trials] == [[0, 1, 2], [0, 1, 2]]


def test_a_bad_trial_is_pruned_with_the_callback_in_the_trainer():
    def objective(trial):
        fitter, _ = trainer(trial)
        fitter.fit(Model(score=trial.number))
        return fitter.callback_metrics["val_loss"].item()

    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=0))
    study.optimize(objective, n_trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "PRUNED"]


def test_a_metric_that_is_not_there_warns():
    study = optuna.create_study()
    fitter, _ = trainer(study.ask(), monitor="accuracy")
    with pytest.warns(UserWarning, match="accuracy"):
        fitter.fit(Model())


def test_the_pruning_exception_leaves_the_trainer_interrupted():
    study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.5))
    fitter, _ = trainer(study.ask())
    with pytest.raises(optuna.TrialPruned):
        fitter.fit(Model(score=1.0))
    assert fitter.state.status == "interrupted"


def test_two_processes_need_a_shared_storage():
    study = optuna.create_study()
    fitter, _ = trainer(study.ask(), strategy="ddp_spawn", devices=2)
    with pytest.raises(Exception, match="RDBStorage"):
        fitter.fit(Model())


def test_two_processes_prune_together(tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=storage, pruner=optuna.pruners.ThresholdPruner(upper=0.5))

    def objective(trial):
        fitter, callback = trainer(trial, strategy="ddp_spawn", devices=2)
        fitter.fit(Model(score=0.1 if trial.number == 0 else 2.0))
        callback.check_pruned()
        return fitter.callback_metrics["val_loss"].item()

    study.optimize(objective, n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert sorted(study.trials[0].intermediate_values) == [0, 1, 2]
