"""Searches for a learning rate and a batch size, on Lightning and on levin."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch

from tests.parity import both

SLOW = pytest.mark.slow

QUIET = dict(
    accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False
)


def make(framework: Any, **options: Any) -> Any:
    class Model(framework.LightningModule):
        def __init__(self, lr=0.1, batch_size=2):
            super().__init__()
            self.save_hyperparameters()
            if "batch_size" in options.get("attributes", ("batch_size",)):
                self.batch_size = batch_size
            for name in options.get("attributes", ("lr",)):
                setattr(self, name, lr)
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).pow(2).mean()

        validation_step = test_step = predict_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            torch.manual_seed(1)
            return torch.utils.data.DataLoader(torch.randn(640, 4), batch_size=self.hparams.batch_size)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    return Model()


def tried(framework: Any, folder: Any, act: Any, trainer: dict | None = None, **options: Any) -> Any:
    name = "lightning.pytorch" if framework.name == "lightning" else "levin"
    tuner = importlib.import_module(f"{name}.tuner")
    callbacks = importlib.import_module(f"{name}.callbacks")
    model = make(framework, **options)
    weights = model.layer.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {**QUIET, "max_epochs": 1, "default_root_dir": folder, **(trainer or {})}
        run = framework.Trainer(**{k: v(callbacks) if k == "callbacks" else v for k, v in settings.items()})
        try:
            answer = act(tuner.Tuner(run), model, run)
        except Exception as error:
            # Levin's MisconfigurationException is a ValueError, Lightning's is not.
            return type(error).__name__.replace("MisconfigurationException", "ValueError")
    return (
        answer,
        {key: float(value) for key, value in model.hparams.items()},
        bool((weights == model.layer.weight).all()),
        run.global_step,
    )


def search(**arguments: Any) -> Any:
    def act(tuner, model, trainer):
        found = tuner.lr_find(model, **arguments)
        if found is None:
            return None
        values = [getattr(model, name) for name in ("lr", "learning_rate", "rate") if hasattr(model, name)]
        shown = (found.mode, found.lr_min, found.lr_max, found.num_training, found.suggestion(2, 2))
        return (
            found.results["lr"],
            [float(f"{loss:.4g}") for loss in found.results["loss"]],
            found.suggestion(),
            values,
            shown,
        )

    return act


@pytest.mark.parametrize(
    "arguments",
    [
        {}, dict(num_training=30), dict(min_lr=1e-5, max_lr=10, num_training=40), dict(mode="linear", num_training=25),
        dict(early_stop_threshold=None), dict(num_training=5), dict(max_lr=100), dict(update_attr=False),
        dict(mode="nonsense"), dict(method="validate"), dict(attr_name="missing"), dict(early_stop_threshold=1.2),
        dict(early_stop_threshold=1.2, min_lr=10.0, max_lr=100.0, num_training=10),
    ],
)  # fmt: skip
def test_the_same_rates_losses_and_suggestion(tmp_path, arguments):
    theirs = tried(both.lightning(), tmp_path, search(**arguments))
    assert tried(both.levin(), tmp_path, search(**arguments)) == theirs


@pytest.mark.parametrize("attributes", [("lr",), ("learning_rate",), ("lr", "learning_rate"), ("rate",), ()])
@pytest.mark.parametrize("attr_name", ["", "rate"])
def test_where_the_rate_is_written_to(tmp_path, attributes, attr_name):
    act = search(num_training=30, attr_name=attr_name)
    theirs = tried(both.lightning(), tmp_path, act, attributes=(*attributes, "batch_size"))
    assert tried(both.levin(), tmp_path, act, attributes=(*attributes, "batch_size")) == theirs


@pytest.mark.parametrize(
    "settings",
    [
        dict(fast_dev_run=True),
        dict(gradient_clip_val=0.1),
        dict(limit_train_batches=0.5),
    ],
)
def test_under_other_settings_of_the_trainer(tmp_path, settings):
    theirs = tried(both.lightning(), tmp_path, search(num_training=20), settings)
    assert tried(both.levin(), tmp_path, search(num_training=20), settings) == theirs


def test_an_accumulation_window_is_one_step_of_the_search(tmp_path):
    settings = dict(accumulate_grad_batches=3)
    (theirs, *_), (ours, *_) = (
        tried(f, tmp_path, search(num_training=20), settings) for f in (both.lightning(), both.levin())
    )
    assert ours[0] == theirs[0] and ours[2] == theirs[2]
    # Lightning hands out the loss divided by the window, levin as it was returned.
    assert ours[1] == pytest.approx([3 * loss for loss in theirs[1]], rel=1e-3)


def test_hooks_know_in_a_search_whether_a_window_is_open(tmp_path):
    found = []
    for framework in (both.lightning(), both.levin()):
        asked: list[Any] = []

        def ask(tuner: Any, model: Any, trainer: Any, asked: Any = asked) -> None:
            def hear(*args: Any) -> None:
                loop = trainer.fit_loop
                asked.append((loop._should_accumulate(), loop.trainer is loop.epoch_loop.trainer is trainer))

            model.on_train_batch_end = hear
            tuner.lr_find(model, num_training=4)

        tried(framework, tmp_path, ask, dict(accumulate_grad_batches=2))
        found.append(asked)
    assert found[0] == found[1] and set(found[1]) == {(True, True), (False, True)}


@pytest.mark.parametrize(
    "method, arguments",
    [
        pytest.param("fit", {}, marks=SLOW), ("fit", dict(mode="binsearch")), ("fit", dict(max_trials=3)),
        pytest.param("fit", dict(init_val=50), marks=SLOW),
        ("fit", dict(batch_arg_name="missing")), ("fit", dict(mode="other")),
        pytest.param("fit", dict(steps_per_trial=1), marks=SLOW), pytest.param("validate", {}, marks=SLOW), ("test", dict(mode="binsearch", margin=0.2)), ("predict", dict(max_trials=4)), ("nonsense", {}),
    ],
)  # fmt: skip
def test_the_same_batch_size(tmp_path, method, arguments):
    def act(tuner, model, trainer):
        return tuner.scale_batch_size(model, method=method, **arguments), model.batch_size

    theirs = tried(both.lightning(), tmp_path, act)
    assert tried(both.levin(), tmp_path, act) == theirs


def test_loaders_that_are_passed_are_refused(tmp_path):
    def act(tuner, model, trainer):
        return tuner.scale_batch_size(model, model.train_dataloader())

    assert tried(both.levin(), tmp_path, act) == tried(both.lightning(), tmp_path, act) == "ValueError"


@pytest.mark.parametrize("finders", ["LearningRateFinder", "BatchSizeFinder", "LearningRateFinder BatchSizeFinder"])
def test_a_search_as_a_callback(tmp_path, finders):
    def act(tuner, model, trainer):
        trainer.fit(model)
        group = trainer.optimizers[0].param_groups[0]
        return (
            group["lr"],
            model.hparams.batch_size,
            trainer.num_training_batches,
            trainer.max_epochs,
            trainer.current_epoch,
        )

    def callbacks(room):
        made = {
            "LearningRateFinder": lambda: room.LearningRateFinder(num_training_steps=30),
            "BatchSizeFinder": lambda: room.BatchSizeFinder(max_trials=3),
        }
        return [made[name]() for name in finders.split()]

    theirs = tried(both.lightning(), tmp_path, act, dict(callbacks=callbacks))
    assert tried(both.levin(), tmp_path, act, dict(callbacks=callbacks)) == theirs


def test_a_finder_and_a_tuner_at_once_are_refused(tmp_path):
    for name, method in (("LearningRateFinder", "lr_find"), ("BatchSizeFinder", "scale_batch_size")):
        act = lambda tuner, model, trainer: getattr(tuner, method)(model)  # noqa: E731, B023
        settings = dict(callbacks=lambda room: [getattr(room, name)()])  # noqa: B023
        theirs = tried(both.lightning(), tmp_path, act, settings)
        assert tried(both.levin(), tmp_path, act, settings) == theirs == "ValueError"
