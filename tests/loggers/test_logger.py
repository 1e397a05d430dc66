from __future__ import annotations

import copy
import importlib
import inspect
import pickle

import pytest
import torch

from levin import Fabric, Trainer, loggers
from levin.callbacks import LearningRateMonitor, ModelCheckpoint
from levin.compat.table import names_in
from levin.demos.boring_classes import BoringModel, RandomDataset
from levin.loggers import CSVLogger, DummyLogger, Logger, rank_zero_experiment
from levin.loggers.logger import DummyExperiment, FabricLogger
from levin.utilities.rank_zero import rank_zero_only


class Keeps:
    """The part of a logger that writes: a list."""

    name, version = "list", 3

    def __init__(self) -> None:
        self.lines: list = []

    def log_metrics(self, metrics, step=None):
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, params, *args, **kwargs):
        self.lines.append(params)


class ListLogger(Keeps, Logger):
    def save(self):
        self.lines.append("save")


class ForFabric(Keeps, FabricLogger):
    pass


class ForBoth(Logger, ForFabric):
    def after_save_checkpoint(self, checkpoint_callback):
        self.lines.append(type(checkpoint_callback).__name__)


@pytest.mark.parametrize("path", ["fabric.loggers", "fabric.loggers.logger"])
def test_a_logger_for_fabric_becomes_one_for_a_trainer_by_inheriting_from_both(path, tmp_path):
    home, name = names_in(path)["Logger"]
    assert getattr(importlib.import_module(home), name) is FabricLogger
    assert not hasattr(ForFabric(), "after_save_checkpoint")
    logger = ForBoth()
    Fabric(accelerator="cpu", devices=1, loggers=[ForFabric(), logger]).log("loss", 1.0, step=2)
    model, data = BoringModel(), torch.utils.data.DataLoader(RandomDataset(32, 4))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    callbacks = [LearningRateMonitor("step"), ModelCheckpoint(tmp_path)]
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=logger, callbacks=callbacks, **quiet)
    trainer.fit(model, data)
    assert logger.save_dir is None and isinstance(logger, FabricLogger)
    assert logger.lines == [(2, {"loss": 1.0}), (0, {"lr-SGD": 0.1}), "ModelCheckpoint"]


def test_the_package_names_what_it_has():
    assert dir(loggers) == sorted(loggers.__all__)
    with pytest.raises(AttributeError, match="NoLogger"):
        loggers.NoLogger


def test_a_logger_needs_four_members():
    with pytest.raises(TypeError, match="log_hyperparams"):
        Logger()
    logger = ListLogger()
    assert (logger.save_dir, logger.root_dir, logger.log_dir, logger.group_separator) == (None, None, None, "/")
    logger.log_graph(None)
    logger.after_save_checkpoint(None)
    logger.finalize("success")
    assert logger.lines == ["save"]


@pytest.mark.parametrize(
    ("name", "others"),
    [("CSVLogger", {}), ("TensorBoardLogger", {}), ("WandbLogger", {}), ("MLFlowLogger", {}), ("CometLogger", {}),
     ("LitLogger", {"save_logs": False})],
)  # fmt: skip
def test_arguments_and_defaults_are_those_of_lightning(name, others):
    theirs = pytest.importorskip("lightning.pytorch.loggers")

    def defaults(module):
        parameters = inspect.signature(getattr(module, name).__init__).parameters.values()
        return {each.name: (each.kind, each.default) for each in parameters}

    expected = defaults(theirs)
    assert defaults(loggers) == expected | {each: (expected[each][0], value) for each, value in others.items()}


def test_the_dummy_accepts_everything():
    logger = DummyLogger()
    assert (logger.name, logger.version, logger.save_dir, logger.log_dir) == ("", "", None, None)
    logger.log_metrics(1, 2, x=3)
    logger.log_hyperparams()
    logger.anything(1, a=2)
    logger.experiment.add_scalar("a", 1)
    logger.experiment["a"] = 1
    assert logger[0] is logger
    assert list(logger) == [logger]
    assert isinstance(logger.experiment["a"], DummyExperiment)
    assert list(logger.experiment) == []
    for clone in (copy.deepcopy(logger), pickle.loads(pickle.dumps(logger))):
        assert clone.name == ""


def test_other_ranks_get_a_dummy_experiment(monkeypatch, tmp_path):
    class Mine(DummyLogger):
        @property
        @rank_zero_experiment
        def experiment(self):
            """Mine."""
            return "real"

    assert Mine().experiment == "real"
    assert Mine.experiment.fget.__doc__ == "Mine."
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert isinstance(Mine().experiment, DummyExperiment)
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1})
    logger.log_hyperparams({"a": 1})
    logger.save()
    logger.finalize("success")
    assert list(tmp_path.iterdir()) == []
