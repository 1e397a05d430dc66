"""The page of a run: what is read from the disk, what is in it, what is written when a fit ends."""

from __future__ import annotations

import json
import math
import re
import time
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import levin
from levin.callbacks import ModelCheckpoint
from levin.demos.boring_classes import BoringModel, RandomDataset
from levin.loggers import CSVLogger, TensorBoardLogger
from levin.loops.time_shares import part_of
from levin.report.at_end import held_up_by
from levin.report.command import main
from levin.report.page import make_page, short_names, thinned
from levin.report.read import Series, find_runs, read_run
from levin.utilities.stacks import ThreadCalls


class Net(BoringModel):
    def __init__(self, lr=0.1):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.step(batch))


def fit(tmp_path, logger, max_epochs=1, ckpt_path=None, model=None, **options):
    quiet = {"enable_progress_bar": True, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = levin.Trainer(
        **{"default_root_dir": tmp_path, "logger": logger, "max_epochs": max_epochs} | quiet | options
    )
    trainer.fit(model or Net(), DataLoader(RandomDataset(32, 4)), DataLoader(RandomDataset(32, 2)), ckpt_path=ckpt_path)
    return trainer


def in_page(text, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)[1])


def test_no_page_where_no_logger_keeps_files(tmp_path):
    fit(tmp_path, False, enable_checkpointing=False)
    fit(tmp_path, CSVLogger(tmp_path), fast_dev_run=True)
    fit(tmp_path, CSVLogger(tmp_path), enable_progress_bar=False, enable_checkpointing=False)  # short, and not watched
    assert not list(tmp_path.rglob("report.html"))


def test_a_page_holds_all_fits_of_its_folder_and_how_they_ended(tmp_path):
    class Fails(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                raise RuntimeError("<script>alert(1)</script>" + 300 * "x")

    with pytest.raises(RuntimeError):
        fit(
            tmp_path,
            CSVLogger(tmp_path, "net", version=0),
            3,
            model=Fails(),
            callbacks=[ModelCheckpoint(tmp_path / "c", save_last=True)],
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(
            tmp_path,
            CSVLogger(tmp_path, "net", version=0),
            3,
            ckpt_path=tmp_path / "c/last.ckpt",
            callbacks=[ModelCheckpoint(tmp_path / "c")],
        )
    text = (tmp_path / "net/version_0/report.html").read_text()
    first, second = in_page(text, "records")
    assert (
        first["ended_by"] == "RuntimeError: <script>alert(1)</script>".ljust(300, "x") and "<script>alert" not in text
    )
    assert not first["is_signal"] and not second["is_signal"] and second["ended_by"] == ""
    assert second["resumed_from"].endswith("last.ckpt") and second["steps"] == [4, 12]
    assert in_page(text, "runs")[0]["series"]["train/loss"]["n"] == 12


def test_a_fit_that_the_user_interrupts_ends_by_a_signal(tmp_path):
    class Interrupted(Net):
        def on_train_epoch_end(self):
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, CSVLogger(tmp_path, "net", version=0), model=Interrupted())
    (record,) = in_page((tmp_path / "net/version_0/report.html").read_text(), "records")
    assert record["is_signal"] and record["ended_by"] == "KeyboardInterrupt"


def test_runs_of_lightning_are_read(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch.loggers")
    csv, tensorboard = lightning.CSVLogger(tmp_path, "a"), lightning.TensorBoardLogger(tmp_path, "b")
    for logger in (csv, tensorboard):
        logger.log_hyperparams({"lr": 0.5, "layers": {"width": 3}})
        for step in range(3):
            logger.log_metrics({"loss": 1 / (1 + step)}, step)
        logger.save()
        logger.finalize("success")
    for logger in (csv, tensorboard):
        run = read_run(Path(logger.log_dir))
        assert run.series["loss"].values == pytest.approx([1, 1 / 2, 1 / 3]) and run.series["loss"].steps == [0, 1, 2]
        assert run.hparams == {"lr": 0.5, "layers.width": 3}
        assert len(run.series["loss"].times) == (3 if logger is tensorboard else 0)
    assert [path.parent.name for path in find_runs(tmp_path)] == ["a", "b"]


def test_the_command_compares_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lr in (0.1, 0.2):
        fit(tmp_path, CSVLogger(tmp_path, "net"), model=Net(lr))
    capsys.readouterr()
    assert main(["net"]) == 0 and capsys.readouterr().out == "report.html\n"
    runs = in_page(Path("report.html").read_text(), "runs")
    assert [run["name"] for run in runs] == ["version_0", "version_1"] and [run["hparams"]["lr"] for run in runs] == [
        0.1,
        0.2,
    ]


def test_values_that_an_event_file_holds_as_tensors_are_read_and_texts_are_not(tmp_path):
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.util.tensor_util import make_tensor_proto
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in (3, 1):
            writer.add_scalar("loss", 0.5 * step, step, walltime=step + 0.5, new_style=True)
            writer.add_scalar("older", 0.25, step, walltime=7.0)
        writer.add_text("note", "7", 3)
        writer.add_histogram("weights", torch.ones(3), 3)
        for tag, values in (("one", [2]), ("several", [1.0, 2.0]), ("name", ["7"])):
            writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, tensor=make_tensor_proto(values))]), 4)
    series = read_run(tmp_path).series
    assert (series.pop("one").steps, series) == ([4], {
        "loss": Series([3, 1], [1.5, 0.5], [3.5, 1.5]), "older": Series([3, 1], [0.25, 0.25], [7, 7]),
    })  # fmt: skip


def test_an_event_file_that_was_cut_is_read_as_far_as_it_goes(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    for step in range(10):
        logger.log_metrics({"loss": step}, step)
    logger.finalize("success")
    (path,) = Path(logger.log_dir).glob("events*")
    path.write_bytes(path.read_bytes()[:-7])
    assert read_run(Path(logger.log_dir)).series["loss"].values == list(range(9))


def test_a_page_stays_small(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    names = [f"metric_{number}" for number in range(200)]
    rows = [
        ",".join(["step", *names]),
        *(",".join([str(step)] + [str(math.sin(step + n)) for n in range(200)]) for step in range(600)),
    ]
    (folder / "metrics.csv").write_text("\n".join(rows))
    one = read_run(folder)
    assert len(make_page([one], "one")) < 3_000_000
    assert len(make_page([one] * 20, "many")) < 6_000_000
    assert max(thinned([0.0] * 500 + [9.0] + [0.0] * 500, 50)) == 1000 and 500 in thinned(
        [0.0] * 500 + [9.0] + [0.0] * 500, 50
    )
    assert short_names([Path("/a/b/v0"), Path("/a/b/v1")]) == ["v0", "v1"]


def test_of_many_values_those_are_kept_that_show_in_a_plot():
    peak = [0.0, *range(3, 603), 9999.0, *range(3, 400), math.nan, math.nan, *range(3, 500)]
    kept = thinned(peak, 50)
    assert {0, 601, 999, len(peak) - 1} <= set(kept) and kept == sorted(set(kept)) and len(kept) <= 100
    assert thinned([math.nan] * 8, 4) == [0, 4, 7] and thinned([2.0, 1.0], 2) == [0, 1]


def test_a_page_needs_no_network(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, logger)
    text = (Path(logger.log_dir) / "report.html").read_text()
    assert not re.search(r'(src|href)=["\']', text) and "import(" not in text and "fetch(" not in text
    assert "Permission is hereby granted" in text and 60_000 < len(text) < 300_000


class SlowData(RandomDataset):
    def __getitem__(self, index):
        time.sleep(0.05)
        return super().__getitem__(index)


@pytest.mark.timing
def test_where_the_time_goes(tmp_path):
    class Look(levin.Callback):
        def on_train_end(self, trainer, module):
            self.shares = trainer.run.time_shares

    look = Look()
    trainer = levin.Trainer(
        max_epochs=1, logger=False, callbacks=[look], enable_progress_bar=False, enable_model_summary=False,
        accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(BoringModel(), DataLoader(SlowData(32, 60)))
    assert look.shares.share("data") > 0.7 and look.shares.num_samples >= 15
    assert [point.step for point in look.shares.points][-1] == 60
    look.shares.counts.update(data=50)
    assert "num_workers" in held_up_by(look.shares)


def test_parts_are_told_by_their_innermost_frame(tmp_path):
    seen = {}

    class Looks(BoringModel):
        def training_step(self, batch, batch_idx):
            seen["step"] = part_of(ThreadCalls()())
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            seen["validation"] = part_of(ThreadCalls()())

        def on_save_checkpoint(self, checkpoint):
            seen["checkpoint"] = part_of(ThreadCalls()())

    class Data(RandomDataset):
        def __getitem__(self, index):
            if seen.get("step"):
                seen["data"] = part_of(ThreadCalls()())
            return super().__getitem__(index)

    trainer = levin.Trainer(
        max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Looks(), DataLoader(Data(32, 4)), DataLoader(RandomDataset(32, 2)))
    assert seen == {"step": "training", "data": "data", "validation": "validation", "checkpoint": "checkpoints"}


def test_where_nothing_is_seen_of_a_thread_nothing_is_said_of_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr("levin.loops.time_shares.ThreadCalls", lambda: list)

    class Slow(Net):
        def training_step(self, batch, batch_idx):
            time.sleep(0.15)
            return super().training_step(batch, batch_idx)

        def on_train_end(self):
            assert self.trainer.run.time_shares.num_samples == 0

    fit(tmp_path, CSVLogger(tmp_path), model=Slow())


def test_looking_keeps_nothing_of_a_step_alive(tmp_path):
    class Large(Net):
        def __init__(self):
            super().__init__()
            self.tensors = []

        def training_step(self, batch, batch_idx):
            large = torch.ones(10)
            self.tensors.append(weakref.ref(large))
            time.sleep(0.15)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert [tensor() for tensor in self.tensors] == [None] * len(self.tensors)

    fit(tmp_path, CSVLogger(tmp_path), model=Large())


def test_the_curve_over_time_ends_with_the_fit(tmp_path):
    trainer = fit(tmp_path, CSVLogger(tmp_path))
    points = list(trainer.run.time_shares.points)
    assert [points[0].step, points[-1].step] == [0, trainer.global_step]
    trainer.run.time_shares.stop()
    assert trainer.run.time_shares.points == points


def test_two_loggers_of_one_folder_make_one_page(tmp_path):
    csv = CSVLogger(tmp_path, "net", version=0)
    trainer = fit(tmp_path, [csv, TensorBoardLogger(tmp_path, "net", version="version_0")])
    page = Path(csv.log_dir) / "report.html"
    (run,) = in_page(page.read_text(), "runs")
    assert trainer.global_step and len(run["series"]["train/loss"]["x"]) >= 4


def test_a_page_that_cannot_be_made_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr("levin.report.page.make_page", lambda *args: [][0])
    with pytest.warns(UserWarning, match="could not be written: IndexError"):
        assert fit(tmp_path, CSVLogger(tmp_path)).state.finished
