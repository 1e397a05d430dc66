"""GluonTS as its documentation says: estimators train, what they return predicts, is saved and goes on."""

import numpy as np
import pandas as pd
import pytest
import torch
from gluonts import torch as models
from gluonts.dataset.pandas import PandasDataset
from gluonts.evaluation import make_evaluation_predictions
from gluonts.model.predictor import Predictor
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

ESTIMATORS = {
    "DeepAREstimator": {"freq": "h"},
    "SimpleFeedForwardEstimator": {},
    "TemporalFusionTransformerEstimator": {"freq": "h"},
    "PatchTSTEstimator": {"patch_len": 8, "context_length": 48},
    "DLinearEstimator": {},
    "LagTSTEstimator": {"freq": "h"},
    "TiDEEstimator": {"freq": "h"},
    "WaveNetEstimator": {"freq": "h"},
}


def series():
    index = pd.period_range("2020-01-01", periods=400, freq="h")
    return PandasDataset(
        pd.DataFrame({"target": np.sin(np.arange(400) / 12).astype("float32")}, index=index), target="target"
    )


def estimator(name, tmp_path, **kwargs):
    seed_everything(0)
    settings = dict(
        max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False, default_root_dir=str(tmp_path)
    )
    return getattr(models, name)(
        prediction_length=24, num_batches_per_epoch=5, batch_size=8, trainer_kwargs={**settings, **kwargs}, **ESTIMATORS[name]
    )  # fmt: skip


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_trains_and_predicts(name, tmp_path):
    predictor = estimator(name, tmp_path).train(series(), series())
    (forecast,) = predictor.predict(series())
    assert forecast.quantile(0.5).shape == (24,) and np.isfinite(forecast.quantile(0.5)).all()
    files = list(tmp_path.rglob("*.ckpt"))
    assert len(files) == 1
    assert {"state_dict", "epoch", "global_step", "pytorch-lightning_version"} <= set(
        torch.load(files[0], weights_only=False)
    )


def test_a_saved_predictor_predicts_the_same(tmp_path):
    predictor = estimator("SimpleFeedForwardEstimator", tmp_path).train(series())
    predictor.serialize(tmp_path)
    found = []
    for each in (predictor, Predictor.deserialize(tmp_path, device=torch.device("cpu"))):
        torch.manual_seed(0)
        forecasts, _ = make_evaluation_predictions(series(), predictor=each)
        found.append(next(iter(forecasts)).quantile(0.5))
    assert np.array_equal(*found)


def test_the_best_checkpoint_is_what_predicts(tmp_path):
    seen = []

    class Losses(Callback):
        def on_validation_epoch_end(self, trainer, module):
            seen.append(float(trainer.callback_metrics["val_loss"]))

    made = estimator("DLinearEstimator", tmp_path, max_epochs=6, callbacks=[Losses()])
    output = made.train_model(series(), series())
    (keeper,) = (each for each in output.trainer.callbacks if isinstance(each, ModelCheckpoint))
    assert float(keeper.best_model_score) == min(seen[-6:])
    weights = torch.load(keeper.best_model_path, weights_only=False)["state_dict"]
    assert all(torch.equal(weights[name], value) for name, value in output.trained_net.state_dict().items())


def test_training_stops_early(tmp_path):
    stop = EarlyStopping("train_loss", patience=0, min_delta=1e6)
    output = estimator("SimpleFeedForwardEstimator", tmp_path, max_epochs=50, callbacks=[stop]).train_model(series())
    assert output.trainer.current_epoch == 2


def test_a_checkpoint_of_weights_does_not_go_on(tmp_path):
    made = estimator("SimpleFeedForwardEstimator", tmp_path)
    path = made.train_model(series()).trainer.checkpoint_callback.best_model_path
    with pytest.raises(KeyError, match="optimizer"):
        estimator("SimpleFeedForwardEstimator", tmp_path, max_epochs=5).train_model(series(), ckpt_path=path)


def test_training_goes_on_from_a_checkpoint(tmp_path):
    keeper = ModelCheckpoint(tmp_path / "whole")
    first = estimator("SimpleFeedForwardEstimator", tmp_path, callbacks=[keeper]).train_model(series())
    again = estimator("SimpleFeedForwardEstimator", tmp_path, max_epochs=5)
    output = again.train_model(series(), ckpt_path=keeper.best_model_path)
    assert (first.trainer.global_step, output.trainer.global_step) == (10, 25)
