"""The loggers of services, on stand-ins for their packages that write down each call."""

from __future__ import annotations

import importlib
import pickle
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from levin import Trainer
from levin.callbacks import ModelCheckpoint
from levin.demos.boring_classes import BoringModel

RECORDER = """
calls = []

class Recorder:
    def __init__(self, name, **attributes):
        self._name = name
        self.__dict__.update(attributes)

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            calls.append((f"{self._name}.{name}", args, kwargs))
            return Recorder(name)

        return call
"""
PACKAGES = {
    "wandb/__init__.py": RECORDER
    + """
run = None

def init(**kwargs):
    calls.append(("init", (), kwargs))
    return Recorder("run", id=kwargs.get("id") or "made", config=Recorder("config"))

class Artifact(Recorder):
    def __init__(self, **kwargs):
        super().__init__("artifact", kwargs=kwargs)
        calls.append(("Artifact", (), kwargs))

class Image:
    def __init__(self, item, **kwargs):
        self.item, self.kwargs = item, kwargs

class Table(Image):
    def __init__(self, **kwargs):
        self.kwargs = kwargs
""",
    "comet_ml/__init__.py": RECORDER
    + """
class ExperimentConfig:
    def __init__(self, offline_directory=None, **kwargs):
        self.offline_directory, self.kwargs = offline_directory, kwargs

def start(**kwargs):
    calls.append(("start", (), kwargs))
    return Recorder("experiment", get_key=lambda: "key", project_name=kwargs["project"])
""",
    "litlogger/__init__.py": RECORDER
    + """
class Experiment(Recorder):
    def __init__(self, **kwargs):
        super().__init__("experiment", url="http://there", id="e", teamspace=Recorder("teamspace", id="t"))
        calls.append(("Experiment", (), kwargs))

class File: ...
class Model: ...
""",
    "litlogger/api/__init__.py": "",
    "litlogger/api/metrics_api.py": """
from litlogger import Recorder

def MetricsApi():
    return Recorder("metrics")
""",
    "litlogger/types.py": """
from collections import namedtuple

MetricValue = namedtuple("MetricValue", "value step")
Metrics = namedtuple("Metrics", "name values")
""",
    "mlflow/__init__.py": RECORDER,
    "mlflow/entities.py": """
class Metric:
    def __init__(self, key, value, timestamp, step):
        self.values, self.timestamp = (key, value, step), timestamp

class Param:
    def __init__(self, key, value):
        self.values = key, value
""",
    "mlflow/utils/__init__.py": "",
    "mlflow/utils/mlflow_tags.py": 'MLFLOW_RUN_NAME = "mlflow.runName"',
    "mlflow/tracking/context/__init__.py": "",
    "mlflow/tracking/context/registry.py": "def resolve_tags(tags): return {**tags, 'resolved': True}",
    "mlflow/tracking/__init__.py": """
import mlflow
from mlflow import Recorder, calls

class Info(Recorder): ...

class MlflowClient(Recorder):
    def __init__(self, uri):
        super().__init__("client", uri=uri, status="RUNNING")

    def get_experiment_by_name(self, name):
        return Recorder("found", experiment_id=7, lifecycle_stage="active") if name == "there" else None

    def create_experiment(self, name, artifact_location=None):
        calls.append(("create_experiment", (name,), {"artifact_location": artifact_location}))
        return 8

    def create_run(self, experiment_id, tags):
        calls.append(("create_run", (experiment_id,), {"tags": tags}))
        return self.get_run("run")

    def get_run(self, run_id):
        return Recorder("run", info=Recorder("info", experiment_id="9", run_id=run_id, status=self.status))

    def log_artifacts(self, run_id, directory, folder):
        import pathlib
        files = {path.name: path.read_text() for path in pathlib.Path(directory).iterdir()}
        calls.append(("log_artifacts", (run_id, folder), files))
""",
}

PACKAGE_NAMES = {name.partition("/")[0] for name in PACKAGES}


@pytest.fixture
def calls_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns what was called of a package."""
    for name in PACKAGES:
        path = tmp_path / "packages" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(PACKAGES[name]))
    for name in list(sys.modules):
        if name.partition(".")[0] in PACKAGE_NAMES:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield lambda package: importlib.import_module(package).calls
    for name in list(sys.modules):
        if name.partition(".")[0] in PACKAGE_NAMES:
            del sys.modules[name]


def fit(logger: Any, folder: Path, **checkpoint: Any) -> ModelCheckpoint:
    """A run that saves after each of two epochs."""
    callback = ModelCheckpoint(folder / "saved", filename="{epoch}", **checkpoint)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2, limit_train_batches=1, limit_val_batches=0, logger=logger,
        callbacks=[callback], enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(BoringModel())
    return callback


def named(calls: list, name: str) -> list:
    return [(args, kwargs) for called, args, kwargs in calls if called == name]


def test_wandb(calls_of, tmp_path):
    from levin.loggers.wandb import WandbLogger

    logger = WandbLogger(
        name="n", save_dir=tmp_path / "w", version="v", project="p", prefix="x", anonymous=True, group="g"
    )
    assert (logger.name, logger.version, logger.save_dir) == ("p", "v", str(tmp_path / "w"))
    logger.log_metrics({"loss": torch.tensor(0.5), "n": 1}, step=3)
    calls = calls_of("wandb")
    assert named(calls, "init") == [((), {"name": "n", "project": "p", "dir": str(tmp_path / "w"), "id": "v",
                                          "resume": "allow", "anonymous": "allow", "group": "g"})]  # fmt: skip
    assert named(calls, "run.define_metric") == [
        (("trainer/global_step",), {}), (("*",), {"step_metric": "trainer/global_step", "step_sync": True}),
    ]  # fmt: skip
    assert named(calls, "run.log") == [(({"x-loss": 0.5, "x-n": 1, "trainer/global_step": 3},), {})]
    logger.log_hyperparams({"a": {"b": 1}, "c": print})
    ((params,), options) = named(calls, "config.update")[0]
    assert params["a"] == {"b": 1} and options == {"allow_val_change": True}
    logger.watch(torch.nn.Linear(1, 1), log="all")
    assert named(calls, "run.watch")[0][1] == {"log": "all", "log_freq": 100, "log_graph": True}
    logger.log_image("i", ["a.png", "b.png"], caption=["1", "2"])
    ((logged,), _) = named(calls, "run.log")[1]
    assert [(image.item, image.kwargs) for image in logged["x-i"]] == [
        ("a.png", {"caption": "1"}),
        ("b.png", {"caption": "2"}),
    ]
    with pytest.raises(TypeError, match="images must be a list"):
        logger.log_image("i", "a.png")
    with pytest.raises(ValueError, match="one value for each of 1 images, received 2"):
        logger.log_image("i", ["a.png"], caption=["1", "2"])
    assert pickle.loads(pickle.dumps(logger)).version == "v"


def test_another_process_attaches_to_the_run_of_wandb(calls_of, tmp_path, monkeypatch):
    from levin.loggers.wandb import WandbLogger

    logger = WandbLogger(save_dir=tmp_path)
    logger.experiment._attach_id = "port"
    there = pickle.loads(pickle.dumps(logger))
    wandb = importlib.import_module("wandb")
    monkeypatch.setattr(wandb, "_attach", lambda run: wandb.Recorder("attached", id=run), raising=False)
    there.log_metrics({"loss": 1.0}, step=2)
    assert named(calls_of("wandb"), "attached.log") == [(({"loss": 1.0, "trainer/global_step": 2},), {})]
    assert len(named(calls_of("wandb"), "init")) == 1
    # A wandb that cannot do so starts the run again.
    monkeypatch.delattr(wandb, "_attach")
    pickle.loads(pickle.dumps(logger)).log_metrics({"loss": 1.0}, step=2)
    assert len(named(calls_of("wandb"), "init")) == 2


@pytest.mark.parametrize("options", [{}, {"store_step": False}], ids=str)
def test_lightning_gets_values_with_their_steps_unless_it_is_told_otherwise(calls_of, tmp_path, options):
    from levin.loggers.litlogger import LitLogger

    logger = LitLogger(tmp_path, name="n", teamspace="org/space", metadata={"a": 1}, **options)
    logger.log_metrics({"loss": torch.tensor(0.5), "n": 1}, step=3)
    logger.log_metrics({"loss": 0.25}, step=4)
    logger.finalize("success")
    calls = calls_of("litlogger")
    stores = options.get("store_step", True)
    assert named(calls, "Experiment") == [
        ((), {"name": "n", "log_dir": str(tmp_path / "n"), "teamspace": "org/space", "metadata": {"a": "1"},
              "store_step": stores, "verbose": False}),
    ]  # fmt: skip
    sent = [
        (series.name, tuple(point))
        for (space, run, all_series), _ in named(calls, "metrics.append_experiment_metrics")
        for series in all_series
        for point in series.values
        if (space, run) == ("t", "e")
    ]
    steps = (3, 4) if stores else (None, None)
    assert sorted(sent, key=str) == sorted(
        [("loss", (0.5, steps[0])), ("n", (1.0, steps[0])), ("loss", (0.25, steps[1]))], key=str
    )


def test_a_process_of_wandb_that_is_gone_ends_no_run_and_is_told_once(calls_of, tmp_path):
    from levin.loggers.wandb import WandbLogger

    class Gone:
        id = "r"
        config = property(lambda self: self)

        def log(self, *args, **kwargs):
            raise ConnectionResetError("Connection lost")

        update = log_artifact = log

    logger = WandbLogger(save_dir=tmp_path, log_model="all")
    logger._experiment = Gone()
    with pytest.warns(UserWarning, match="The process of wandb is gone") as told:
        fit(logger, tmp_path)
        logger.log_hyperparams({"a": 1})
    assert len([warning for warning in told if "is gone" in str(warning.message)]) == 1


def test_wandb_offline(calls_of, tmp_path):
    from levin.loggers.wandb import WandbLogger

    WandbLogger(save_dir=tmp_path, offline=True).log_metrics({"a": 1})
    ((_, options),) = named(calls_of("wandb"), "init")
    assert options["mode"] == "offline" and options["project"] == "lightning_logs" and options.get("anonymous") is None
    with pytest.raises(ValueError, match="log_model"):
        WandbLogger(offline=True, log_model=True)


@pytest.mark.parametrize(
    ("log_model", "top_k", "epochs"), [(False, 1, []), ("all", -1, [0, 1]), (True, -1, [0, 1]), (True, 1, [1])]
)
def test_checkpoints_go_to_wandb(calls_of, tmp_path, log_model, top_k, epochs):
    from levin.loggers.wandb import WandbLogger

    fit(WandbLogger(save_dir=tmp_path, version="v", log_model=log_model), tmp_path, save_top_k=top_k)
    calls = calls_of("wandb")
    assert [Path(args[0]).name for args, _ in named(calls, "artifact.add_file")] == [f"epoch={n}.ckpt" for n in epochs]
    assert all(kwargs["name"] == "model-v" for _, kwargs in named(calls, "Artifact"))
    assert all("latest" in kwargs["aliases"] for _, kwargs in named(calls, "run.log_artifact"))


def test_comet(calls_of, tmp_path):
    from levin.loggers.comet import CometLogger

    logger = CometLogger(
        api_key="k", workspace="w", project="p", online=False, prefix="x", offline_directory="off", tags=["t"]
    )
    calls = calls_of("comet_ml")
    ((_, options),) = named(calls, "start")
    config = options.pop("experiment_config")
    assert options == {
        "api_key": "k",
        "workspace": "w",
        "project": "p",
        "experiment_key": None,
        "mode": None,
        "online": False,
    }
    assert config.kwargs == {"disabled": False, "tags": ["t"]}
    assert (logger.name, logger.version, logger.save_dir) == ("p", "key", "off")
    logger.log_metrics({"loss": torch.tensor(0.5), "epoch": 2}, step=3)
    assert named(calls, "experiment.log_metrics") == [(({"loss": 0.5},), {"prefix": "x", "step": 3, "epoch": 2})]
    logger.log_hyperparams({"a": 1})
    assert named(calls, "experiment.log_parameters") == [(({"a": 1},), {})]
    model = torch.nn.Linear(1, 1)
    logger.log_graph(model)
    assert named(calls, "experiment.set_model_graph") == [((model,), {})]
    logger.finalize("success")
    assert len(named(calls, "experiment.flush")) == 1
    with pytest.warns(DeprecationWarning, match="project_name"):
        assert CometLogger(project_name="old", online=False).name == "old"


def test_mlflow(calls_of, tmp_path):
    from levin.loggers.mlflow import MLFlowLogger

    logger = MLFlowLogger("new", run_name="n", tags={"t": 1}, save_dir=str(tmp_path), prefix="x", synchronous=True)
    assert (logger.name, logger.version, logger.save_dir) == ("8", "run", str(tmp_path))
    calls = calls_of("mlflow")
    assert named(calls, "create_experiment") == [(("new",), {"artifact_location": None})]
    assert named(calls, "create_run") == [(("8",), {"tags": {"t": 1, "mlflow.runName": "n", "resolved": True}})]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logger.log_metrics({"loss": torch.tensor(0.5), "text": "a", "odd!": 2}, step=3)
    texts = sorted(str(warning.message) for warning in warned)
    assert [text[:20] for text in texts] == ["Discarding metric wi", "MLflow allows only l"]
    assert texts[1].endswith("'x-odd!' becomes 'x-odd'.")
    ((_, options),) = named(calls, "client.log_batch")
    assert options.pop("run_id") == "run" and options["synchronous"] is True
    assert [entry.values for entry in options["metrics"]] == [("x-loss", 0.5, 3), ("x-odd", 2, 3)]
    assert all(0 <= 1000 * time.time() - entry.timestamp < 60_000 for entry in options["metrics"])
    logger.log_hyperparams({f"p{number}": "y" * 300 for number in range(101)})
    batches = [kwargs["params"] for _, kwargs in named(calls, "client.log_batch")[1:]]
    assert [len(batch) for batch in batches] == [100, 1]
    assert batches[0][0].values == ("p0", "y" * 250)
    logger.finalize("success")
    assert named(calls, "client.set_terminated") == [(("run", "FINISHED"), {})]
    assert MLFlowLogger("there", save_dir=str(tmp_path)).name == "7"
    assert MLFlowLogger(run_id="r", tracking_uri="http://x").version == "r"


@pytest.mark.parametrize(("log_model", "epochs"), [(False, []), ("all", [0, 1]), (True, [1])])
def test_checkpoints_go_to_mlflow(calls_of, tmp_path, log_model, epochs):
    from levin.loggers.mlflow import MLFlowLogger

    callback = fit(MLFlowLogger(save_dir=str(tmp_path), log_model=log_model), tmp_path)
    calls = calls_of("mlflow")
    assert [Path(args[1]).name for args, _ in named(calls, "client.log_artifact")] == [
        f"epoch={n}.ckpt" for n in epochs
    ]
    described = [files for _, files in named(calls, "log_artifacts")]
    assert len(described) == len(epochs)
    if epochs:
        assert described[-1]["aliases.txt"] == "['latest', 'best']"
        assert yaml.safe_load(described[-1]["metadata.yaml"])["original_filename"] == "epoch=1.ckpt"
    assert callback.best_model_path.endswith("epoch=1.ckpt")


@pytest.mark.parametrize("kind", ["a file", "a link to one"])
def test_a_checkpoint_that_waits_for_mlflow_is_held_as_it_is(kind, tmp_path):
    from levin.loggers.uploads import hold

    saved = tmp_path / "saved"
    saved.mkdir()
    path = saved / "last.ckpt"
    (saved / "epoch=0.ckpt").write_text("first")
    if kind == "a file":
        (saved / "epoch=0.ckpt").rename(path)
    else:
        path.symlink_to("epoch=0.ckpt")
    held = hold(str(path), str(tmp_path / "unsent"))
    for file in saved.iterdir():
        file.unlink()
    path.write_text("second")
    assert Path(held).name == "last.ckpt" and Path(held).read_text() == "first"


@pytest.mark.parametrize(
    "name",
    ["wandb.WandbLogger", "comet.CometLogger", "mlflow.MLFlowLogger", "trackio.TrackioLogger", "litlogger.LitLogger"],
)
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    module, _, kind = name.partition(".")
    package = {"comet": "comet_ml"}.get(module, module)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=f"needs the package {package}"):
        getattr(importlib.import_module(f"levin.loggers.{module}"), kind)()
