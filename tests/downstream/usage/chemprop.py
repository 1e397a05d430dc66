"""chemprop as its documentation says: training, prediction and checkpoints in Python and by its command line."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from chemprop import data, featurizers, models, nn
from lightning import pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

SMILES = ["C" * n for n in range(1, 9)] + ["CCO", "CCN", "CC(=O)O", "c1ccccc1", "CCOC", "CCCl", "CC#N", "C1CCCCC1"]
TARGETS = np.array([[float(len(smiles))] for smiles in SMILES])


def loaders():
    points = [data.MoleculeDatapoint.from_smi(smiles, y) for smiles, y in zip(SMILES, TARGETS)]
    featurizer = featurizers.SimpleMoleculeMolGraphFeaturizer()
    train = data.MoleculeDataset(points[:12], featurizer)
    scaler = train.normalize_targets()
    val = data.MoleculeDataset(points[12:], featurizer)
    val.normalize_targets(scaler)
    test = data.MoleculeDataset(points[12:], featurizer)
    build = data.build_dataloader
    return build(train, batch_size=4), build(val, shuffle=False, batch_size=4), build(test, shuffle=False), scaler


def model(scaler, **kwargs):
    transform = nn.UnscaleTransform.from_standard_scaler(scaler)
    return models.MPNN(
        nn.BondMessagePassing(d_h=16), nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=16, hidden_dim=16, output_transform=transform),
        True, [nn.metrics.RMSE(), nn.metrics.MAE()], **kwargs,
    )  # fmt: skip


def trainer(tmp_path, **kwargs):
    settings = dict(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(tmp_path),
    )  # fmt: skip
    return pl.Trainer(**{**settings, **kwargs})


def test_train_test_and_predict(tmp_path):
    pl.seed_everything(0)
    train, val, test, scaler = loaders()
    mpnn = model(scaler)
    fitter = trainer(tmp_path, enable_checkpointing=False)
    fitter.fit(mpnn, train, val)
    (results,) = fitter.test(dataloaders=test, model=mpnn)
    assert {"test/rmse", "test/mae"} <= set(results)
    predictions = torch.cat(fitter.predict(mpnn, test))
    assert predictions.shape == (4, 1) and bool(torch.isfinite(predictions).all())


@pytest.fixture
def trained(tmp_path):
    pl.seed_everything(0)
    train, val, test, scaler = loaders()
    mpnn = model(scaler)
    checkpoint = ModelCheckpoint(
        tmp_path / "ckpt", "best-{epoch}-{val_loss:.2f}", "val_loss", mode="min", save_last=True
    )
    fitter = trainer(tmp_path, callbacks=[checkpoint, EarlyStopping("val_loss", patience=2)])
    fitter.fit(mpnn, train, val)
    return fitter, mpnn, test, checkpoint


def test_the_best_checkpoint_predicts_the_same(trained, tmp_path):
    fitter, mpnn, test, checkpoint = trained
    assert checkpoint.best_model_path.endswith(".ckpt")
    loaded = models.MPNN.load_from_checkpoint(checkpoint.last_model_path)
    theirs = torch.cat(trainer(tmp_path, enable_checkpointing=False).predict(loaded, test))
    ours = torch.cat(fitter.predict(mpnn, test))
    assert torch.equal(theirs, ours)


def test_the_checkpoint_holds_the_blocks_as_hyper_parameters(trained):
    checkpoint = torch.load(trained[3].last_model_path, weights_only=False)
    assert {"message_passing", "agg", "predictor"} <= set(checkpoint["hyper_parameters"])
    assert checkpoint["hyper_parameters"]["message_passing"]["cls"] is nn.BondMessagePassing


def test_a_model_file_loads(trained, tmp_path):
    from chemprop.models.utils import load_model, save_model

    _, mpnn, _, _ = trained
    save_model(tmp_path / "model.pt", mpnn)
    loaded = load_model(tmp_path / "model.pt", multicomponent=False)
    assert all(torch.equal(a, b) for a, b in zip(mpnn.state_dict().values(), loaded.state_dict().values()))


def test_predict_from_the_trainers_best_path(trained):
    fitter, _, test, _ = trained
    import lightning
    from packaging.version import Version

    extra = {"weights_only": False} if Version(lightning.__version__) >= Version("2.6") else {}
    assert torch.cat(fitter.predict(dataloaders=test, ckpt_path="best", **extra)).shape == (4, 1)


def test_message_passing_can_be_frozen(tmp_path):
    train, val, _, scaler = loaders()
    mpnn = model(scaler)
    mpnn.message_passing.apply(lambda module: module.requires_grad_(False))
    before = [parameter.clone() for parameter in mpnn.message_passing.parameters()]
    trainer(tmp_path, enable_checkpointing=False).fit(mpnn, train, val)
    assert all(torch.equal(a, b) for a, b in zip(before, mpnn.message_passing.parameters()))


def test_hyper_parameters_are_attributes(trained):
    assert trained[1].hparams.warmup_epochs == 2 and trained[1].hparams["metrics"] is not None


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "molecules.csv"
    pd.DataFrame({"smiles": SMILES, "y": TARGETS[:, 0]}).to_csv(path, index=False)
    return path


def command(*words):
    return subprocess.run(
        [sys.executable, "-c", "from chemprop.cli.main import main; main()", *map(str, words)],
        capture_output=True,
        text=True,
    )


def test_command_line_trains_and_predicts(table, tmp_path):
    done = command(
        "train", "--data-path", table, "--task-type", "regression", "--output-dir", tmp_path / "out", "--epochs", 3,
        "--num-workers", 0, "--message-hidden-dim", 16, "--ffn-hidden-dim", 16, "--accelerator", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    best = tmp_path / "out" / "model_0" / "best.pt"
    assert best.exists() and (tmp_path / "out" / "model_0" / "checkpoints").is_dir()
    done = command("predict", "--test-path", table, "--model-paths", best, "--preds-path", tmp_path / "p.csv", "--accelerator", "cpu")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(pd.read_csv(tmp_path / "p.csv")) == len(SMILES)


def test_command_line_makes_fingerprints(table, tmp_path):
    train = command(
        "train", "--data-path", table, "--task-type", "regression", "--output-dir", tmp_path / "out", "--epochs", 3,
        "--num-workers", 0, "--message-hidden-dim", 16, "--accelerator", "cpu", "--ensemble-size", 2,
    )  # fmt: skip
    assert train.returncode == 0, train.stderr[-2000:]
    done = command("fingerprint", "--test-path", table, "--model-paths", tmp_path / "out" / "model_1" / "best.pt", "--output", tmp_path / "f.csv", "--ffn-block-index", 0)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
