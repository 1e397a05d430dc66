"""What a page says of a fit, as it stands in it, and what is said when the fit ends."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
import torchmetrics
from torch.utils.data import DataLoader

import levin
from levin.callbacks import Callback, Checkpoint, ModelCheckpoint
from levin.demos.boring_classes import BoringDataModule, RandomDataset
from levin.loggers import CSVLogger, TensorBoardLogger
from levin.loops import time_shares
from levin.loops.time_shares import TimeShares
from levin.report.at_end import held_up_by
from levin.report.record import record_of
from levin.report.when import is_worth_a_report
from levin.utilities.exceptions import SIGTERMException
from tests.report.test_report import Net, fit, in_page


class Guard(Callback):
    """As BadStepGuard is after it left two steps out."""

    num_bad_steps = 2
    paths = ("bad/epoch=1-step=12.pt", "bad/epoch=0-step=7.pt", "bad/other.pt")


class Others(Callback):
    paths = ("step=1",)


class OtherCheckpoint(Checkpoint):
    """Saves elsewhere, and ranks nothing."""


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_a_fit_leaves_its_page(tmp_path, kind, caplog, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "train.py", "--name", "a b"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    logger = kind(tmp_path, "net")
    best = ModelCheckpoint(monitor="val_loss", mode="max", save_top_k=2)
    started = time.time()
    with caplog.at_level("INFO", "levin"):
        fit(
            tmp_path, logger, 2, callbacks=[best, OtherCheckpoint(), Guard(), Others()], gradient_clip_val=0.5,
            num_sanity_val_steps=-1, limit_val_batches=2, max_steps=100, accumulate_grad_batches=1,
        )  # fmt: skip
    page = Path(logger.log_dir) / "report.html"
    (run,) = in_page(page.read_text(), "runs")
    (record,) = run.pop("records")
    assert in_page(page.read_text(), "records") == [record]
    curves = run.pop("series")
    assert {name: (curve["x"], curve["n"]) for name, curve in curves.items()} == {
        "train/loss": ([*range(8)], 8),
        "val_loss": ([3, 7], 2),
    }
    assert run == {"name": "net/version_0", "path": logger.log_dir, "hparams": {"lr": 0.1}, "epochs": [[0, 0], [1, 4]]}
    ranked = sorted(best.best_k_models, key=best.best_k_models.get, reverse=True)
    points = record.pop("points")
    assert [point[1:] for point in points] == [[0, 0, 0.0, None], [8, 2, points[-1][3], None]]
    assert started < record["started"] == points[0][0] < points[-1][0] < record.pop("ended") < time.time()
    assert sum(record.pop("shares").values()) in (0, pytest.approx(1))
    callbacks = record["what"].pop("callbacks").split(", ")
    assert [name for name in callbacks if not name.endswith("ProgressBar")] == [
        "Guard", "Others", "ModelCheckpoint", "OtherCheckpoint",
    ]  # fmt: skip
    assert record == {
        "what": {
            "module": "tests.report.test_report.Net", "data": "RandomDataset of 4, batch size 1", "parameters": "66",
            "command": f"{os.path.basename(sys.executable)} train.py --name 'a b'", "folder": str(tmp_path), "git": "-",
            "host": socket.gethostname(), "device": "cpu", "processes": 1, "strategy": "SingleDeviceStrategy",
            "precision": "32-true",
        },
        "settings": {
            "max_epochs": 2, "max_steps": 100, "num_sanity_val_steps": "inf", "log_every_n_steps": 1,
            "gradient_clip_val": 0.5, "limit_val_batches": 2,
        },
        "versions": {
            "levin": levin.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchmetrics": torchmetrics.__version__, "numpy": numpy.__version__,
        },
        "started": points[0][0], "steps": [0, 8], "epochs": [0, 2], "resumed_from": None, "ended_by": "",
        "is_signal": False, "bad_steps": [7, 12],
        "best": [[path, "val_loss", pytest.approx(float(best.best_k_models[path]))] for path in ranked],
    }  # fmt: skip
    said = f"Best checkpoint: {best.best_model_path} (val_loss={float(best.best_model_score):.4g})"
    assert f"{said}\nLogs: {logger.log_dir}\nReport: {page}" in caplog.messages


class Mute(Net):
    """Takes batches of any form."""

    def training_step(self, batch, batch_idx):
        return self.layer.weight.sum()


def ended(tmp_path, data=None, model=None, **options):
    """The run of a short fit that has ended."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "limit_val_batches": 0} | quiet | options
    trainer = levin.Trainer(default_root_dir=tmp_path, **options)
    data = DataLoader(RandomDataset(32, 2)) if data is None else data
    is_module = isinstance(data, levin.LightningDataModule)
    trainer.fit(model or Mute(), **{"datamodule" if is_module else "train_dataloaders": data})
    return trainer.run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return ended(tmp_path_factory.mktemp("run"))


def interrupted():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    except SystemExit as error:
        return error


@pytest.mark.parametrize(
    ("error", "ended_by", "is_signal"),
    [
        (None, "", False), (KeyboardInterrupt(), "KeyboardInterrupt", True), (interrupted(), "KeyboardInterrupt", True),
        (SystemExit(3), "SystemExit: 3", True), (RuntimeError(), "RuntimeError", False),
        (SIGTERMException(), "SIGTERMException: 143", True), (ValueError("a: b"), "ValueError: a: b", False),
    ],
)  # fmt: skip
def test_a_record_says_what_ended_the_fit(run, error, ended_by, is_signal):
    record = record_of(run, error)
    assert (record["ended_by"], record["is_signal"]) == (ended_by, is_signal)


def test_the_record_of_a_fit_that_nobody_watched(run, monkeypatch):
    monkeypatch.setattr(run, "time_shares", None)
    record = record_of(run, None)
    assert record["started"] == record["ended"] and record["points"] == [] and record["shares"] == {}
    assert (record["steps"], record["epochs"], record["best"]) == ([2, 2], [1, 1], [])
    assert record["what"]["callbacks"] == "-" and record["settings"] == {"max_epochs": 1}


def test_the_shares_of_a_record_are_those_of_all_looks(run, monkeypatch):
    monkeypatch.setattr(run, "time_shares", shares_of(training=3, data=1))
    assert record_of(run, None)["shares"] == {"training": 0.75, "data": 0.25}


def test_a_gpu_is_named_in_the_record(run, monkeypatch):
    monkeypatch.setattr(type(run.strategy), "root_device", torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    assert record_of(run, None)["what"]["device"] == "name of cuda:1"


class Endless:
    def __iter__(self):
        yield from ([0], [1])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BoringDataModule(), "levin.demos.boring_classes.BoringDataModule"),
        (
            {"a": DataLoader(RandomDataset(32, 2000), batch_size=1000), "b": [1], "c": Endless()},
            "RandomDataset of 2,000, batch size 1000; list of 1, batch size ?; Endless, batch size ?",
        ),
    ],
)
def test_a_record_says_what_the_data_was(tmp_path, data, words):
    assert record_of(ended(tmp_path, data), None)["what"]["data"] == words


def test_a_record_of_a_fit_without_batches_names_no_data(tmp_path):
    assert record_of(ended(tmp_path, limit_train_batches=0), None)["what"]["data"] == "-"


def test_a_record_says_the_settings_that_are_not_the_default_ones(tmp_path):
    assert record_of(ended(tmp_path, limit_val_batches=1.0), None)["settings"] == {"max_epochs": 1}
    given = {
        "max_epochs": 3, "max_steps": 2, "limit_train_batches": 0.5, "limit_predict_batches": 7, "detect_anomaly": True,
        "val_check_interval": 1, "accumulate_grad_batches": 2, "check_val_every_n_epoch": 2, "num_sanity_val_steps": 0,
        "gradient_clip_val": 1, "log_every_n_steps": 7, "inference_mode": False,
    }  # fmt: skip
    settings = record_of(ended(tmp_path, **given), None)["settings"]
    left_out = {"num_sanity_val_steps": 0, "inference_mode": False, "val_check_interval": 1}
    assert settings == {name: value for name, value in given.items() if name not in left_out}


def test_a_record_names_the_checkpoint_that_the_best_one_is(tmp_path):
    last = ModelCheckpoint(tmp_path)
    record = record_of(ended(tmp_path, callbacks=[last], enable_checkpointing=True), None)
    assert record["best"] == [[last.best_model_path, None, None]] and last.best_model_path


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_says_the_revision_of_the_code(run, tmp_path, monkeypatch):
    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def said(folder):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        return record_of(run, None)["what"]["git"]

    git("init")
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    git("tag", "-a", "-m", "tagged", "v1")
    revision = git("rev-parse", "HEAD")[:12]
    assert said("clean") == revision
    (tmp_path / "code.py").write_text("2")
    assert said("changed") == f"{revision}+"
    monkeypatch.setenv("PATH", "")
    assert said("without git") == "-"


def test_the_curve_gets_a_point_of_each_ten_looks_and_coarser_when_it_is_long(run, monkeypatch):
    shares = TimeShares(run)
    shares.stop()
    monkeypatch.setattr(time_shares, "MAX_POINTS", 5)
    numbers = []
    for _ in range(12):
        for _ in range(10):
            shares._look()
        numbers.append(len(shares.points))
    assert numbers == [3, 4, 5, 3, 3, 4, 4, 5, 5, 3, 3, 3]
    assert shares.num_samples == sum(shares.counts.values()) == 120


# ---------------------------------------------------------------- what is said


def shares_of(**counts):
    shares = TimeShares.__new__(TimeShares)
    shares.counts, shares.points = Counter(counts), []
    return shares


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"data": 49}, None),
        ({"training": 81, "data": 19}, None),
        (
            {"training": 40, "data": 10},
            "20% of the time of training went into waiting for batches. "
            "Give the DataLoader more workers (num_workers, persistent_workers=True).",
        ),
        (
            {"training": 10, "logging": 30, "data": 20},
            "50% of the time of training went into logging. Log less often: Trainer(log_every_n_steps=...).",
        ),
        (
            {"training": 10, "checkpoints": 90},
            "90% of the time of training went into saving checkpoints. "
            "Save in the background: ModelCheckpoint(async_save=True).",
        ),
        ({"training": 61, "validation": 39}, None),
        (
            {"training": 60, "validation": 40},
            "40% of the time of training went into validation. "
            "Validate less often, or on less: check_val_every_n_epoch, limit_val_batches.",
        ),
        (
            {"training": 1, "callbacks": 49},
            "98% of the time of training went into callbacks. Trainer(profiler='simple') says which.",
        ),
        (
            {"training": 70, "moving batches": 30},
            "30% of the time of training went into moving batches to the device. "
            "Let the DataLoader pin its memory (pin_memory=True).",
        ),
    ],
)
def test_what_held_training_up_is_said_with_what_helps(counts, words):
    assert held_up_by(shares_of(**counts)) == words


def test_of_a_fit_that_nobody_watched_nothing_is_said():
    assert held_up_by(None) is None


@pytest.mark.parametrize(
    ("num_samples", "is_enabled", "is_worth"), [(99, False, False), (100, False, True), (0, True, True)]
)
def test_a_fit_gets_a_page_where_it_was_watched_or_took_ten_seconds(num_samples, is_enabled, is_worth):
    bar = types.SimpleNamespace(is_enabled=is_enabled, get_metrics=None)
    others = [types.SimpleNamespace(is_enabled=True), types.SimpleNamespace(get_metrics=None)]
    run = types.SimpleNamespace(time_shares=shares_of(training=num_samples), callbacks=[bar, *others])
    assert is_worth_a_report(run) is is_worth
    run.time_shares = None
    assert is_worth_a_report(run) is False


class Elsewhere(CSVLogger):
    """Names a folder in which no metrics are."""

    folder = None

    @property
    def log_dir(self):
        return self.folder


@pytest.mark.parametrize("folder", [None, "absent", "notes", "memory://logs"])
def test_the_page_lies_beside_the_files_of_the_first_logger_that_keeps_some(tmp_path, folder, caplog):
    (tmp_path / "notes").mkdir()
    other, logger = Elsewhere(tmp_path), CSVLogger(tmp_path, "net")
    last = ModelCheckpoint(tmp_path / "c")
    with caplog.at_level("INFO", "levin"):
        other._experiment = types.SimpleNamespace()
        other.log_metrics = other.save = other.finalize = other.log_hyperparams = lambda *args, **kwargs: None
        other.folder = folder if folder is None or "://" in folder else str(tmp_path / folder)
        fit(tmp_path, [other, logger], callbacks=[last])
    assert list(tmp_path.rglob("report.html")) == [tmp_path / "net/version_0/report.html"]
    places = f"Logs: {logger.log_dir}\nReport: {logger.log_dir}/report.html"
    assert f"Best checkpoint: {last.best_model_path}\n{places}" in caplog.messages


def test_of_a_fit_that_leaves_nothing_no_place_is_said(tmp_path, caplog):
    with caplog.at_level("INFO", "levin"):
        fit(tmp_path, False, enable_checkpointing=False)
    assert not [message for message in caplog.messages if "Logs" in message or not message]
