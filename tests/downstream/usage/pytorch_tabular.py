"""PyTorch Tabular as its documentation says: tables are fitted, evaluated, saved and loaded."""

import numpy as np
import pandas as pd
import pytest
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig, FTTransformerConfig, GANDALFConfig


def table():
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"a": random.normal(size=600), "b": random.normal(size=600)})
    return frame.assign(c=random.integers(0, 3, 600).astype(str), y=(frame.a + frame.b > 0).astype(int))


def fitted(config, tmp_path, **kwargs):
    settings = dict(
        max_epochs=3, batch_size=64, accelerator="cpu", progress_bar="none", load_best=True, early_stopping=None,
        checkpoints_path=str(tmp_path / "checkpoints"), trainer_kwargs={"enable_model_summary": False},
    )  # fmt: skip
    model = TabularModel(
        data_config=DataConfig(target=["y"], continuous_cols=["a", "b"], categorical_cols=["c"]),
        model_config=config(task="classification", seed=1),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(**{**settings, **kwargs}),
        verbose=False,
    )
    trainer = model.fit(train=table()[:400], validation=table()[400:500])
    return model, trainer


@pytest.mark.parametrize("config", [CategoryEmbeddingModelConfig, FTTransformerConfig, GANDALFConfig])
def test_a_model_learns_and_is_evaluated(config, tmp_path):
    model, trainer = fitted(config, tmp_path, max_epochs=10)
    assert trainer.current_epoch == 10
    (found,) = model.evaluate(table()[500:], verbose=False)
    assert found["test_accuracy"] > 0.8


def test_a_saved_model_predicts_the_same(tmp_path):
    model, _ = fitted(CategoryEmbeddingModelConfig, tmp_path)
    model.save_model(str(tmp_path / "model"))
    again = TabularModel.load_model(str(tmp_path / "model"))
    assert again.predict(table()[500:]).equals(model.predict(table()[500:]))


def test_training_stops_early_and_the_best_is_loaded(tmp_path):
    model, trainer = fitted(
        CategoryEmbeddingModelConfig, tmp_path, max_epochs=60, early_stopping="valid_loss", early_stopping_patience=2,
        early_stopping_min_delta=0.05,
    )  # fmt: skip
    assert trainer.current_epoch < 60
    best = trainer.checkpoint_callback.best_model_score
    (found,) = model.evaluate(table()[400:500], verbose=False)
    assert found["test_loss"] == pytest.approx(float(best), rel=1e-3)


def test_cross_validation_trains_again_and_again(tmp_path):
    model, _ = fitted(CategoryEmbeddingModelConfig, tmp_path)
    scores = [
        fitted(CategoryEmbeddingModelConfig, tmp_path / str(n))[0].evaluate(table()[500:], verbose=False)
        for n in (1, 2)
    ]
    assert scores[0] == scores[1] == model.evaluate(table()[500:], verbose=False)
