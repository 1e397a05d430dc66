"""darts as its documentation says: torch models that are trained, stopped early, saved, loaded and go on."""

import numpy as np
import torch
from darts import TimeSeries
from darts.models import BlockRNNModel, NBEATSModel, NLinearModel, TFTModel
from darts.utils.likelihood_models.torch import QuantileRegression
from pytorch_lightning.callbacks import Callback, EarlyStopping

SERIES = TimeSeries.from_values(np.sin(np.arange(60) / 5).astype(np.float32))
COVARIATES = TimeSeries.from_values(np.arange(80, dtype=np.float32) / 80)


def settings(tmp_path, **kwargs):
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, **kwargs.pop("trainer", {})}
    return dict(
        input_chunk_length=8, output_chunk_length=4, n_epochs=2, batch_size=16, random_state=0, work_dir=str(tmp_path),
        pl_trainer_kwargs=trainer, **kwargs,
    )  # fmt: skip


def test_nbeats_trains_and_predicts(tmp_path):
    model = NBEATSModel(num_stacks=1, num_blocks=1, num_layers=1, layer_widths=8, **settings(tmp_path))
    model.fit(SERIES)
    assert model.epochs_trained == 2
    assert len(model.predict(6)) == 6


def test_validation_and_early_stopping(tmp_path):
    stopper = EarlyStopping(monitor="val_loss", patience=1, min_delta=100.0, mode="min")
    kwargs = settings(tmp_path, trainer={"callbacks": [stopper]})
    model = NLinearModel(**{**kwargs, "n_epochs": 10})
    model.fit(SERIES, val_series=SERIES)
    assert model.epochs_trained < 10


def test_a_callback_sees_the_losses(tmp_path):
    class Losses(Callback):
        def __init__(self):
            self.losses = []

        def on_train_epoch_end(self, trainer, pl_module):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    losses = Losses()
    NLinearModel(**settings(tmp_path, trainer={"callbacks": [losses]})).fit(SERIES)
    assert len(losses.losses) == 2 and all(np.isfinite(losses.losses))


def test_checkpoints_of_the_best_and_the_last_epoch(tmp_path):
    model = NLinearModel(model_name="mine", save_checkpoints=True, force_reset=True, **settings(tmp_path))
    model.fit(SERIES, val_series=SERIES)
    for best in (True, False):
        loaded = NLinearModel.load_from_checkpoint("mine", work_dir=str(tmp_path), best=best)
        assert len(loaded.predict(3, series=SERIES)) == 3
    last = NLinearModel.load_from_checkpoint("mine", work_dir=str(tmp_path), best=False)
    np.testing.assert_array_equal(last.predict(3, series=SERIES).values(), model.predict(3, series=SERIES).values())


def test_weights_of_a_checkpoint_load_into_a_new_model(tmp_path):
    model = NLinearModel(model_name="mine", save_checkpoints=True, force_reset=True, **settings(tmp_path))
    model.fit(SERIES, val_series=SERIES)
    other = NLinearModel(model_name="other", **settings(tmp_path))
    other.load_weights_from_checkpoint("mine", work_dir=str(tmp_path), best=False)
    np.testing.assert_array_equal(other.predict(3, series=SERIES).values(), model.predict(3, series=SERIES).values())


def test_a_saved_model_loads_and_predicts_the_same(tmp_path):
    model = BlockRNNModel(hidden_dim=4, **settings(tmp_path))
    model.fit(SERIES)
    model.save(str(tmp_path / "model.pt"))
    loaded = BlockRNNModel.load(str(tmp_path / "model.pt"))
    np.testing.assert_array_equal(loaded.predict(4, series=SERIES).values(), model.predict(4, series=SERIES).values())


def test_training_goes_on(tmp_path):
    model = NLinearModel(**settings(tmp_path))
    model.fit(SERIES)
    model.fit(SERIES, epochs=3)
    assert model.epochs_trained in (3, 5)


def test_quantiles_with_covariates(tmp_path):
    model = TFTModel(
        hidden_size=4, lstm_layers=1, num_attention_heads=1, likelihood=QuantileRegression([0.1, 0.5, 0.9]),
        add_relative_index=True, **settings(tmp_path),
    )  # fmt: skip
    model.fit(SERIES, future_covariates=COVARIATES)
    assert model.predict(4, num_samples=5, future_covariates=COVARIATES).n_samples == 5


def test_tensorboard_logs(tmp_path):
    model = NLinearModel(model_name="logged", log_tensorboard=True, force_reset=True, **settings(tmp_path))
    model.fit(SERIES)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_the_learning_rate_finder(tmp_path):
    model = NLinearModel(**settings(tmp_path))
    assert model.lr_find(SERIES, num_training=5, epochs=1) is not None


def test_a_fixed_seed_gives_the_same_model(tmp_path):
    first, second = (NLinearModel(**settings(tmp_path)) for _ in range(2))
    first.fit(SERIES)
    second.fit(SERIES)
    for a, b in zip(first.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
