"""The loggers of services, on stand-ins for their packages that write down each call."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
import textwrap
import time
import types
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

class Audio(Image): ...
class Video(Image): ...

class Table(Image):
    def __init__(self, **kwargs):
        self.kwargs = kwargs

def Api():
    return Recorder("api")
""",
    "wandb/errors.py": """
class CommError(Exception): ...
class AuthenticationError(CommError): ...
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

    def __setitem__(self, key, value):
        calls.append(("set", (key, value.given), {}))

    def __getitem__(self, key):
        return Recorder(f"item {key}")

class File:
    def __init__(self, *args, **kwargs):
        self.given = args, kwargs

class Model(File): ...
""",
    "trackio/__init__.py": RECORDER
    + """
def init(*args, **kwargs):
    calls.append(("init", args, kwargs))
    return Recorder("run", config=Recorder("config"))
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
    "mlflow/exceptions.py": """
class MlflowException(Exception):
    def __init__(self, error_code):
        self.error_code = error_code
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


def test_wandb_gets_media_and_tables(calls_of, tmp_path):
    from levin.loggers.wandb import WandbLogger

    logger = WandbLogger(save_dir=tmp_path, prefix="x")
    logger.log_audio("a", ["a.wav"], 3, sample_rate=[8])
    logger.log_video("v", ["v.mp4"], fps=[4], format=["gif"])
    logger.log_table("t", ["c"], [[1]], step=5)
    logger.log_text("w", dataframe="frame")
    calls = calls_of("wandb")
    (audio, video, table, text) = [args[0] for args, _ in named(calls, "run.log")]
    assert [list(each) for each in (audio, video, table, text)] == [
        ["x-a", "trainer/global_step"], ["x-v"], ["x-t", "trainer/global_step"], ["x-w"],
    ]  # fmt: skip
    assert (audio["trainer/global_step"], table["trainer/global_step"]) == (3, 5)
    for (made,), kind, item, kwargs in (
        (audio["x-a"], "Audio", "a.wav", {"sample_rate": 8}),
        (video["x-v"], "Video", "v.mp4", {"fps": 4, "format": "gif"}),
    ):
        assert (type(made).__name__, made.item, made.kwargs) == (kind, item, kwargs)
    assert table["x-t"].kwargs == {"columns": ["c"], "data": [[1]], "dataframe": None}
    assert text["x-w"].kwargs == {"columns": None, "data": None, "dataframe": "frame"}
    with pytest.raises(TypeError) as caught:
        logger.log_audio("a", "a.wav")
    assert str(caught.value) == "audios must be a list, received str. Put a single one into a list."
    with pytest.raises(ValueError, match=r"^fps must have one value for each of 1 videos, received 2\.$"):
        logger.log_video("v", ["v.mp4"], fps=[1, 2])


def test_wandb_takes_a_run_that_is_under_way_and_its_artifacts(calls_of, tmp_path, monkeypatch):
    from levin.loggers.wandb import WandbLogger

    calls, wandb = calls_of("wandb"), sys.modules["wandb"]
    WandbLogger.download_artifact("a:v0", tmp_path, "model")
    monkeypatch.setattr(wandb, "run", wandb.Recorder("mine", id="m"))
    WandbLogger.download_artifact("a:v0")
    WandbLogger.download_artifact("a:v0", artifact_type="model", use_artifact=False)
    with pytest.warns(UserWarning, match="There is a wandb run already in progress") as warned:
        logger = WandbLogger(save_dir=tmp_path / "unused")
        assert logger.experiment is wandb.run is logger.experiment
    logger.use_artifact("b:v1", "model")
    logger.log_metrics({"image": torch.ones(2), "loss": 1})
    assert logger.version == "m" and len(warned) == 1 and not list(tmp_path.glob("unused"))
    assert [call for call in calls if call[0] not in ("mine.define_metric", "mine.log")] == [
        ("api.artifact", ("a:v0",), {"type": "model"}), ("artifact.download", (), {"root": str(tmp_path)}),
        ("mine.use_artifact", ("a:v0",), {}), ("use_artifact.download", (), {"root": None}),
        ("api.artifact", ("a:v0",), {"type": "model"}), ("artifact.download", (), {"root": None}),
        ("mine.use_artifact", ("b:v1",), {"type": "model"}),
    ]  # fmt: skip
    ((values,), _) = named(calls, "mine.log")[0]
    assert values.keys() == {"image", "loss"} and torch.equal(values["image"], torch.ones(2))
    given = WandbLogger(experiment=wandb.Recorder("given", id="g"))
    given.log_metrics({"a": 1})
    assert given.version == "g" and named(calls, "given.log") == [(({"a": 1},), {})]


@pytest.mark.parametrize(
    ("given", "folder", "init"),
    [
        ({}, ".", {"name": None, "project": "lightning_logs", "id": None}),
        ({"dir": "d", "id": "i"}, "d", {"name": None, "project": "lightning_logs", "id": "i"}),
        ({"dir": "d", "save_dir": "s", "id": "i", "version": "v", "anonymous": False}, "s",
         {"name": None, "project": "lightning_logs", "id": "v"}),
        ({"offline": True, "mode": "disabled"}, ".", {"name": None, "project": "lightning_logs", "id": None, "mode": "disabled"}),
    ],
)  # fmt: skip
def test_wandb_is_started_with_what_was_given(calls_of, tmp_path, monkeypatch, given, folder, init):
    from levin.loggers.wandb import WandbLogger

    monkeypatch.chdir(tmp_path)
    logger = WandbLogger(**given)
    assert logger.version == init["id"] and logger.save_dir == folder and logger.name == init["project"]
    _ = logger.experiment, logger.experiment
    assert named(calls_of("wandb"), "init") == [((), {"dir": folder, "resume": "allow", **init})]
    assert Path(folder).is_dir()
    monkeypatch.setenv("WANDB_PROJECT", "by variable")
    assert (WandbLogger().name, WandbLogger(project="p").name) == ("by variable", "p")


@pytest.mark.parametrize(("error", "is_away"), [("CommError", True), ("AuthenticationError", False)])
def test_wandb_that_cannot_be_reached_keeps_the_run_in_files(calls_of, tmp_path, monkeypatch, error, is_away):
    from levin.loggers.wandb import WandbLogger

    calls, wandb, init = calls_of("wandb"), sys.modules["wandb"], sys.modules["wandb"].init
    errors = importlib.import_module("wandb.errors")

    def fails(**kwargs):
        if kwargs.get("mode") != "offline":
            raise getattr(errors, error)("No answer.")
        run = init(**kwargs)
        run.dir = "/w/offline-run/files"
        return run

    monkeypatch.setattr(wandb, "init", fails)
    if not is_away:
        with pytest.raises(errors.AuthenticationError):
            WandbLogger(save_dir=tmp_path).log_metrics({"a": 1})
        return
    with pytest.warns(UserWarning) as warned:
        WandbLogger(save_dir=tmp_path).log_metrics({"a": 1})
    assert str(warned[0].message) == (
        "Weights & Biases cannot be reached: No answer. The run is kept in /w/offline-run/files. Upload it later with:"
        " wandb sync /w/offline-run"
    )
    assert named(calls, "init")[0][1]["mode"] == "offline" and named(calls, "run.log") == [(({"a": 1},), {})]


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


def test_lightning_gets_tags_files_and_models(calls_of, tmp_path, monkeypatch, caplog):
    from levin.loggers.litlogger import LitLogger

    monkeypatch.chdir(tmp_path)
    with pytest.warns(
        UserWarning, match="^save_logs=True has no effect: litlogger would start the program a second time"
    ):
        logger = LitLogger("logs", name="n", save_logs=True, checkpoint_name="c")
    assert (logger.name, logger.version, logger.root_dir, logger.log_dir, logger.save_dir) == (
        "n", None, "logs", "logs/n", "logs/n",
    )  # fmt: skip
    logger.finalize()
    calls = calls_of("litlogger")
    assert calls == [] and not list(tmp_path.glob("logs"))
    with caplog.at_level("INFO", "levin"):
        assert logger.url == "http://there"
        logger.log_hyperparams({"net": {"width": 8}}, {"score": 2})
        logger.log_hyperparams({"lr": 0.1})
        with pytest.warns(RuntimeWarning) as warned:
            logger.log_metrics({"inf": float("inf"), "loss": 1, "text": "a", "nan": torch.tensor(float("nan"))}, 3)
        logger.log_file("sub/../a/plot.png")
        logger.log_file("/elsewhere/b.png")
        for verbose in (False, True):
            logger.log_model("net", "folder", verbose, "v1", {"a": 1})
            logger.log_model_artifact("a/weights.ckpt", verbose, "v2")
            assert logger.get_file("a/plot.png", verbose).startswith("<")
        again = pickle.loads(pickle.dumps(logger))
        logger.finalize("success")
    assert str(warned[0].message) == "Lightning takes finite numbers alone. Left out: ['inf', 'nan', 'text']"
    assert [message for message in caplog.messages if "Downloaded" not in message] == [
        "The run is shown at http://there", "Uploaded a model to the experiment n.",
        "a/weights.ckpt is uploaded to the experiment n.",
    ]  # fmt: skip
    assert sum("Downloaded" in message for message in caplog.messages) == 1
    tags = [params for (params,), _ in named(calls, "experiment.update")]
    assert {name: value for each in tags for name, value in each.items()} == {"net/width": "8", "lr": "0.1"}
    assert named(calls, "set") == [
        (("a/plot.png", (("sub/../a/plot.png",), {})), {}), (("b.png", (("/elsewhere/b.png",), {})), {}),
    ]  # fmt: skip
    assert [model.given for (model,), _ in named(calls, "item c.append")] == 2 * [
        (("net",), {"version": "v1", "metadata": {"a": 1}, "staging_dir": "folder"})
    ]
    assert [model.given for (model,), _ in named(calls, "item weights.append")] == 2 * [
        (("a/weights.ckpt",), {"version": "v2"})
    ]
    assert named(calls, "item a/plot.png.save") == [(("a/plot.png",), {})] * 2
    assert calls[-1] == ("experiment.finalize", (), {"print_summary": False})
    assert len(named(calls, "Experiment")) == 1 and again.url == "http://there" and len(named(calls, "Experiment")) == 2
    again.finalize()


def test_lightning_gets_many_values_in_parts(calls_of, tmp_path):
    from levin.loggers.litlogger import LitLogger

    logger = LitLogger(tmp_path)
    logger.log_metrics({f"m{number}": number for number in range(2001)}, 0)
    logger.finalize("success")
    sent = [series for (_, _, series), _ in named(calls_of("litlogger"), "metrics.append_experiment_metrics")]
    assert [len(part) for part in sent] == [1000, 1000, 1]
    assert {(series.name, *series.values) for part in sent for series in part} == {
        (f"m{number}", (float(number), 0)) for number in range(2001)
    }


@pytest.mark.parametrize("log_model", [False, True])
def test_checkpoints_go_to_lightning(calls_of, tmp_path, log_model):
    from levin.loggers.litlogger import LitLogger

    fit(LitLogger(tmp_path / "logs", name="n", log_model=log_model), tmp_path)
    models = [model.given for (model,), _ in named(calls_of("litlogger"), "item n.append")]
    assert [(Path(path).name, options) for (path,), options in models] == (
        [(f"epoch={n}.ckpt", {"version": f"epoch={n}"}) for n in range(2)] if log_model else []
    )
    assert not list(tmp_path.rglob("unsent/*"))


def test_trackio(calls_of):
    from levin.loggers.trackio import TrackioLogger

    logger = TrackioLogger("p", "n", "x", group="g", config={"a": 1})
    assert (logger.name, logger.version, logger.save_dir) == ("p", "n", None)
    logger.finalize("success")
    logger.log_metrics({"loss": 0.5}, 3)
    logger.log_hyperparams({"b": torch.nn.ReLU})
    logger.log_metrics({"loss": 0.25})
    logger.finalize("success")
    pickle.loads(pickle.dumps(logger)).log_metrics({})
    init = {"name": "n", "embed": False, "resume": "allow", "group": "g"}
    after = {"a": 1, "b": "torch.nn.modules.activation.ReLU"}
    assert calls_of("trackio") == [
        ("init", ("p",), {**init, "config": {"a": 1}}), ("run.log", ({"x-loss": 0.5},), {"step": 3}),
        ("config.update", (after,), {}), ("run.log", ({"x-loss": 0.25},), {"step": None}), ("run.finish", (), {}),
        ("init", ("p",), {**init, "config": after}), ("run.log", ({},), {"step": None}),
    ]  # fmt: skip
    assert TrackioLogger().name == "lightning_logs" and TrackioLogger().version != TrackioLogger().version


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
    assert all(kwargs == {"name": "model.ckpt", "policy": "mutable"} for _, kwargs in named(calls, "artifact.add_file"))
    settings = {
        "monitor": None, "mode": "min", "save_last": None, "save_top_k": top_k, "save_weights_only": False,
        "_every_n_train_steps": 0,
    }  # fmt: skip
    assert [kwargs for _, kwargs in named(calls, "Artifact")] == [
        {"name": "model-v", "type": "model", "metadata": {"score": None, "original_filename": f"epoch={n}.ckpt",
                                                          "ModelCheckpoint": settings}}
        for n in epochs
    ]  # fmt: skip
    assert [kwargs for _, kwargs in named(calls, "run.log_artifact")] == [{"aliases": ["latest", "best"]}] * len(epochs)


def test_only_a_run_of_wandb_that_went_well_uploads_what_is_left(calls_of, tmp_path):
    from levin.loggers.wandb import WandbLogger

    callback = fit(False, tmp_path)
    logger = WandbLogger(save_dir=tmp_path, log_model=True, checkpoint_name="c", add_file_policy="immutable")
    logger.after_save_checkpoint(callback)
    logger.finalize("success")
    _ = logger.experiment
    logger.finalize("failed")
    calls = calls_of("wandb")
    assert named(calls, "Artifact") == []
    logger.finalize("success")
    logger.finalize("success")
    assert [kwargs["name"] for _, kwargs in named(calls, "Artifact")] == ["c"]
    assert named(calls, "artifact.add_file")[0][1]["policy"] == "immutable"


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
    assert [name for name, _, _ in calls] == [
        "start", "experiment.log_other", "experiment.log_metrics", "experiment.log_parameters",
        "experiment.set_model_graph", "experiment.flush",
    ]  # fmt: skip
    assert named(calls, "experiment.log_other") == [(("Created from", "levin"), {})]
    again = pickle.loads(pickle.dumps(logger))
    again.finalize("success")
    assert len(named(calls, "experiment.flush")) == 1
    again.log_metrics({"loss": 1.0})
    assert named(calls, "start")[1][1]["experiment_key"] == "key"
    assert named(calls, "experiment.log_metrics")[1] == (({"loss": 1.0},), {"prefix": "x", "step": None, "epoch": None})
    for log_graph in (False, True):
        CometLogger(online=False, log_graph=log_graph).log_graph(model)
        assert len(named(calls, "experiment.set_model_graph")) == 1 + log_graph


def test_comet_takes_the_old_names_of_its_arguments(calls_of):
    from levin.loggers.comet import CometLogger

    old = {"project_name": "old", "offline": True, "experiment_name": "n", "save_dir": "s"}
    with pytest.warns(DeprecationWarning) as warned:
        assert CometLogger(**old).name == "old"
        assert CometLogger(project="new", **old).name == "new"
    assert [str(warning.message) for warning in warned] == 2 * [
        f"The parameter `{name}` is deprecated, please use `{new}` instead."
        for name, new in zip(old, ("project", "online", "name", "offline_directory"))
    ]
    for _, options in named(calls_of("comet_ml"), "start"):
        config = options["experiment_config"]
        assert options["online"] is False
        assert (config.offline_directory, config.kwargs) == ("s", {"disabled": False, "name": "n"})


@pytest.mark.parametrize("is_reachable", [True, False])
@pytest.mark.parametrize("alive", [True, False])
def test_where_comet_cannot_be_reached_the_experiment_is_kept_in_files(calls_of, monkeypatch, is_reachable, alive):
    import requests

    from levin.loggers.comet import CometLogger

    calls = calls_of("comet_ml")
    package, asked = sys.modules["comet_ml"], []

    def head(address, timeout):
        asked.append((address, timeout))
        if not is_reachable:
            raise requests.ConnectionError("away")

    def start(**kwargs):
        calls.append(("start", (), kwargs))
        is_alive = alive or kwargs["online"] is False
        return package.Recorder("experiment", get_key=lambda: "key", project_name=None, alive=is_alive)

    config = {"get_config": lambda: "config", "get_api_key": lambda key, config: asked.append((key, config))}
    config["get_backend_address"] = lambda: "http://comet"
    monkeypatch.setattr(package, "start", start)
    monkeypatch.setattr(package, "config", types.SimpleNamespace(**config), raising=False)
    monkeypatch.setitem(sys.modules, "comet_ml.config", package.config)
    monkeypatch.setattr(requests, "head", head)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        logger = CometLogger(api_key="k", project="p")
    assert asked == [("k", "config"), ("http://comet", 5)] and (logger.name, logger.version) == ("p", "key")
    is_kept = not (is_reachable and alive)
    assert [options["online"] for _, options in named(calls, "start")] == [None] * is_reachable + [False] * is_kept
    assert [str(warning.message) for warning in warned] == is_kept * [
        "Comet cannot be reached. The experiment is kept in local files, and Comet says at the end how to upload them."
    ]


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
    given = MLFlowLogger(run_id="r", tracking_uri="http://x", synchronous=True)
    assert (given.version, given.name, given.save_dir, given.experiment.uri) == ("r", "9", None, "http://x")
    assert len(named(calls, "create_run")) == 2 and given.experiment is given.experiment
    given.experiment.status = "FAILED"
    MLFlowLogger(synchronous=True).finalize("failed")
    for status in ("failed", "killed"):
        given.finalize(status)
    assert named(calls, "client.set_terminated")[1:] == [(("r", "killed"), {})]


def test_mlflow_gets_many_values_in_parts_and_texts_for_tags(calls_of, tmp_path):
    from levin.loggers.mlflow import MLFlowLogger

    tags = {"mlflow.runName": "old"}
    logger = MLFlowLogger(run_name="n", tags=tags, synchronous=True, save_dir=None, artifact_location="s3://a")
    assert logger.save_dir == "./mlruns"
    with pytest.warns(UserWarning) as warned:
        logger.log_metrics({f"m{number}": number for number in range(2001)})
    assert [str(warning.message) for warning in warned] == [
        "The tag mlflow.runName is found in tags. The value will be overridden by n."
    ]
    calls = calls_of("mlflow")
    assert named(calls, "create_experiment") == [(("lightning_logs",), {"artifact_location": "s3://a"})]
    assert (
        named(calls, "create_run")[0][1] == {"tags": {"mlflow.runName": "n", "resolved": True}} and tags == logger.tags
    )
    parts = [kwargs["metrics"] for _, kwargs in named(calls, "client.log_batch")]
    assert [len(part) for part in parts] == [1000, 1000, 1] and parts[2][0].values == ("m2000", 2000, 0)
    assert MLFlowLogger("new", save_dir=str(tmp_path), synchronous=False).version == "run"
    assert "mlflow.runName" not in named(calls, "create_run")[1][1]["tags"]


def test_what_mlflow_missed_is_kept_and_sent_later(calls_of, tmp_path, monkeypatch):
    from levin.loggers.mlflow import MLFlowLogger

    monkeypatch.setattr("levin.loggers.mlflow._START_LIMIT_S", 0.05)
    monkeypatch.setattr("levin.loggers.mlflow.time.time", lambda: 2.0)
    calls = calls_of("mlflow")
    importlib.import_module("mlflow.tracking")
    exceptions = importlib.import_module("mlflow.exceptions")
    away = {"error": ConnectionError("no route")}
    find = sys.modules["mlflow.tracking"].MlflowClient.get_experiment_by_name

    def look(self, name):
        if "error" in away:
            raise away["error"]
        return find(self, name)

    monkeypatch.setattr(sys.modules["mlflow.tracking"].MlflowClient, "get_experiment_by_name", look)
    logger = MLFlowLogger(
        "exp", "n", "http://user:secret@there", {"t": 1}, str(tmp_path / "m"), prefix="x", artifact_location="a"
    )
    with pytest.warns(UserWarning) as warned:
        assert logger.name == "exp"
    assert str(warned[0].message) == (
        "MLflow at http://there did not answer within 0.05 s. The run goes on without it, and what it logs is sent when"
        " MLflow answers."
    )
    logger.log_metrics({"a": 1})
    logger.log_metrics({"a": 2}, 3)
    logger.log_hyperparams({"p": 1})
    logger.finalize("failed")
    (path,) = (tmp_path / "m-unsent").iterdir()
    assert path.name == f"{logger.version}.jsonl" and logger.version.endswith(f"-{os.getpid()}")
    arguments, *entries = map(json.loads, path.read_text().splitlines())
    assert arguments == {
        "experiment_name": "exp", "run_name": "n", "tracking_uri": "http://there", "tags": {"t": "1"},
        "artifact_location": "a", "run_id": None,
    }  # fmt: skip
    assert entries == [
        ["start", {"run_id": None}, 30.0], ["metrics", [["x-a", 1, 2000, 0]], 30.0],
        ["metrics", [["x-a", 2, 2000, 3]], 30.0], ["params", {"p": "1"}, 30.0], ["status", "FAILED", 30.0],
    ]  # fmt: skip
    away["error"] = exceptions.MlflowException("TEMPORARILY_UNAVAILABLE")
    with pytest.raises(ConnectionError, match=f"MLflow at http://other cannot be reached, {path} stays as it is"):
        MLFlowLogger.send_unsent(path, "http://other")
    away["error"] = exceptions.MlflowException("INVALID")
    with pytest.raises(exceptions.MlflowException):
        MLFlowLogger.send_unsent(str(path))
    assert calls == [] and path.exists()
    del away["error"]
    MLFlowLogger.send_unsent(path)
    assert not path.exists()
    assert [name for name, _, _ in calls] == [
        "create_experiment", "create_run", "client.log_batch", "client.log_batch", "client.set_terminated",
    ]  # fmt: skip
    (_, metrics), (_, params) = named(calls, "client.log_batch")
    assert [(each.values, each.timestamp) for each in metrics["metrics"]] == [
        (("x-a", 1, 0), 2000),
        (("x-a", 2, 3), 2000),
    ]
    assert [each.values for each in params["params"]] == [("p", "1")]


@pytest.mark.parametrize(("log_model", "epochs"), [(False, []), ("all", [0, 1]), (True, [1])])
def test_checkpoints_go_to_mlflow(calls_of, tmp_path, log_model, epochs):
    from levin.loggers.mlflow import MLFlowLogger

    callback = fit(MLFlowLogger(save_dir=str(tmp_path / "m"), log_model=log_model), tmp_path)
    assert not list(tmp_path.glob("m-unsent/*"))
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
