from __future__ import annotations

import csv
import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from levin import Callback, LightningModule, Trainer
from levin.loggers import CSVLogger
from levin.loggers.csv_logs import ExperimentWriter


class Logging(LightningModule):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.column = f"by_{name}"

    def training_step(self, batch, batch_idx):
        self.log(self.column, 1.0)
        return self.layer(batch.float().unsqueeze(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def text(logger: CSVLogger) -> str:
    with fsspec.open(f"{logger.log_dir}/metrics.csv", "rb") as file:
        return file.read().decode()


def test_folders_follow_name_and_version(tmp_path):
    logger = CSVLogger(tmp_path)
    assert (logger.name, logger.version, logger.save_dir) == ("lightning_logs", 0, str(tmp_path))
    assert logger.root_dir == str(tmp_path / "lightning_logs")
    assert logger.log_dir == str(tmp_path / "lightning_logs" / "version_0")
    assert list(tmp_path.iterdir()) == []
    assert CSVLogger(tmp_path, name=None).log_dir == str(tmp_path / "version_0")
    assert CSVLogger(tmp_path, name="n/m", version=3).log_dir == str(tmp_path / "n/m/version_3")
    assert CSVLogger(tmp_path, version="abc").log_dir == str(tmp_path / "lightning_logs/abc")
    logger.save()
    assert CSVLogger(tmp_path).version == 1
    assert logger.version == 0


def test_rows_are_appended_with_sorted_columns(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"z": 1, "a": torch.tensor(2.0), "i": 3}, step=0)
    logger.log_metrics({"a": float("nan")}, step=5)
    logger.save()
    inode = os.stat(logger.log_dir + "/metrics.csv").st_ino
    logger.log_metrics({"z": 4.5}, step=6)
    logger.save()
    assert text(logger) == "a,i,step,z\r\n2.0,3,0,1\r\nnan,,5,\r\n,,6,4.5\r\n"
    assert os.stat(logger.log_dir + "/metrics.csv").st_ino == inode


def test_new_columns_rewrite_the_file_and_keep_the_rows(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"b": 1, "text": 'a, "b"\nc'}, step=0)
    logger.save()
    logger.log_metrics({"a": True}, step=1)
    logger.log_metrics({"c": None}, step=2)
    logger.save()
    logger.log_metrics({"a": 2}, step=3)
    logger.finalize("success")
    with open(logger.log_dir + "/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["a", "b", "c", "step", "text"]
    assert [row["a"] for row in rows] == ["", "True", "", "2"]
    assert rows[0]["text"] == 'a, "b"\nc'
    assert os.listdir(logger.log_dir) == ["metrics.csv"]


def test_rows_count_themselves_without_a_step(tmp_path):
    logger = CSVLogger(tmp_path, prefix="p")
    for value in range(3):
        logger.log_metrics({"a": value})
        logger.save()
    assert text(logger).split() == ["p-a,step", "0,0", "1,1", "2,2"]


def test_without_save_rows_are_flushed_at_intervals(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=3)
    seen = []
    for step in range(7):
        logger.log_metrics({"x": step}, step=step)
        path = Path(logger.log_dir, "metrics.csv")
        seen.append(len(path.read_text().splitlines()) - 1 if path.exists() else 0)
    assert seen == [0, 0, 3, 3, 3, 6, 6]
    logger.finalize("success")
    assert len(text(logger).splitlines()) == 8
    with pytest.raises(ValueError, match="flush_logs_every_n_steps must be >= 1, received 0"):
        CSVLogger(tmp_path, flush_logs_every_n_steps=0)


def test_a_used_directory_is_warned_about_and_overwritten(tmp_path):
    logger = CSVLogger(tmp_path, version="run")
    logger.log_metrics({"old": 1}, step=1)
    logger.finalize("success")
    logger = CSVLogger(tmp_path, version="run")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        logger.log_metrics({"new": 1}, step=1)
    assert "old" in text(logger)
    logger.save()
    assert text(logger) == "new,step\r\n1,1\r\n"


@pytest.mark.parametrize("place", ["folder", "memory://continued"])
def test_a_resumed_run_keeps_the_rows_before_it(tmp_path, place):
    """Also where the process before got further than its last checkpoint, and left half a line."""
    folder = tmp_path if place == "folder" else place

    def fit(max_steps, **arguments):
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=CSVLogger(folder, name=None, version="run"), max_steps=max_steps,
            max_epochs=-1, log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(Logging(str(max_steps)), DataLoader(range(8)), **arguments)
        return trainer

    fit(3).save_checkpoint(tmp_path / "three.ckpt")
    path = f"{folder}/run/metrics.csv"
    with fsspec.open(path, "ab") as file:
        file.write(b"1,9.0,7\r\n1,9.0,x")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(5, ckpt_path=tmp_path / "three.ckpt")
    with fsspec.open(path) as file:
        lines = file.read().decode().splitlines()
    rows = [(int(row["step"]), row["by_3"] != "", row["by_5"] != "") for row in csv.DictReader(lines)]
    assert rows == [(0, True, False), (1, True, False), (2, True, False), (3, False, True), (4, False, True)]
    with pytest.warns(UserWarning, match="exists and is not empty"):
        fit(2)
    with fsspec.open(path) as file:
        assert len(file.read().decode().splitlines()) == 3, "a run from the start replaces the file"


class Validating(Logging):
    def __init__(self):
        super().__init__("loss")

    def training_step(self, batch, batch_idx):
        self.log("step_and_epoch", 1.0 + batch_idx, on_step=True, on_epoch=True, batch_size=1)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("valid", 1.0, batch_size=1)


class SavingOnce(Callback):
    """Saves in the ``hook`` of the second epoch."""

    def __init__(self, hook, path):
        setattr(self, hook, lambda trainer, *_: trainer.current_epoch == 1 and trainer.save_checkpoint(path))


HOOKS_OF_A_MOMENT = [
    "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end",
]  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS_OF_A_MOMENT)
@pytest.mark.parametrize("checks", [1.0, 2])
def test_a_table_has_each_row_once_wherever_in_an_epoch_the_run_goes_on(tmp_path, hook, checks):
    def fit(max_epochs, *callbacks, **arguments):
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=CSVLogger(tmp_path, name="", version=""), max_epochs=max_epochs,
            log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
            callbacks=list(callbacks), val_check_interval=checks, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(Validating(), DataLoader(range(4)), DataLoader(range(2)), **arguments)
        return text(trainer.logger)

    fit(2, SavingOnce(hook, tmp_path / "second.ckpt"))
    with pytest.warns(UserWarning, match="exists and is not empty"):
        resumed = fit(3, ckpt_path=tmp_path / "second.ckpt")
    with pytest.warns(UserWarning, match="exists and is not empty"):
        unbroken = fit(3)
    assert resumed == unbroken


@pytest.mark.parametrize("place", ["folder", "memory://kept"])
def test_a_program_that_keeps_the_table_itself_has_each_row_once_after_a_resume(tmp_path, place):
    """RF-DETR reads the table, has the logger begin, writes the table again, and tells the writer its columns."""
    folder = tmp_path if place == "folder" else place

    def logger():
        return CSVLogger(folder, name=None, version="run")

    first = logger()
    for step in range(4):
        first.log_metrics({"loss": step}, step=step)
    first.finalize("success")
    table = text(first)
    again = logger()
    with pytest.warns(UserWarning, match="not empty"):
        again.experiment.metrics_keys = ["loss", "step"]
    with fsspec.open(f"{again.log_dir}/metrics.csv", "w", newline="") as file:
        file.write(table)
    again.continue_from(3)
    again.log_metrics({"loss": 30}, step=3)
    again.finalize("success")
    assert text(again) == "loss,step\r\n0,0\r\n1,1\r\n2,2\r\n30,3\r\n"


def test_rows_that_were_logged_before_the_run_goes_on_stay_and_no_file_is_needed(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.continue_from(3)
    logger.log_metrics({"new": 1}, step=5)
    logger.save()
    logger.continue_from(3)
    logger.log_metrics({"new": 2}, step=6)
    logger.save()
    assert text(logger) == "new,step\r\n1,5\r\n2,6\r\n"


def test_hyperparameters_are_merged_and_written_once(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"a": 1, "n": {"m": 2}})
    logger.log_hyperparams(Namespace(b=2))
    logger.log_hyperparams(None)
    logger.save()
    path = Path(logger.log_dir, "hparams.yaml")
    assert path.read_text() == "a: 1\nn:\n  m: 2\nb: 2\n"
    path.unlink()
    logger.save()
    assert not path.exists()
    logger.log_hyperparams({"a": 3})
    logger.save()
    assert path.read_text().startswith("a: 3\n")


def test_finalize_of_an_unused_logger_leaves_no_trace(tmp_path):
    CSVLogger(tmp_path).finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_a_logger_goes_on_after_finalize_and_after_pickling(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 0}, step=0)
    logger.save()
    logger.log_metrics({"a": 1}, step=1)
    logger = pickle.loads(pickle.dumps(logger))
    logger.finalize("success")
    logger.log_metrics({"a": 2}, step=2)
    logger.finalize("success")
    assert text(logger) == "a,step\r\n0,0\r\n1,1\r\n2,2\r\n"


def test_a_tensor_with_several_elements_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one element"):
        CSVLogger(tmp_path).log_metrics({"a": torch.zeros(2)})


def test_a_killed_process_has_lost_no_saved_row(tmp_path):
    script = """
        import os, signal
        from levin.loggers import CSVLogger
        logger = CSVLogger(".", version="run")
        for step in range(5):
            logger.log_metrics({"a": step, **({"b": 1} if step == 3 else {})}, step=step)
            logger.save()
        logger.log_metrics({"a": 9}, step=9)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "lightning_logs/run/metrics.csv").read_text().splitlines() == [
        "a,b,step", "0,,0", "1,,1", "2,,2", "3,1,3", "4,,4",
    ]  # fmt: skip


def test_a_full_disk_leaves_whole_lines_and_says_so(tmp_path, monkeypatch):
    writer = ExperimentWriter(str(tmp_path))
    writer.log_metrics({"a": 1}, 0)
    writer.save()
    writer.log_metrics({"a": 2}, 1)
    writer.save()
    write, left = os.write, [3]

    def full(descriptor, data):
        if not left[0]:
            raise OSError(28, "No space left on device")
        count = write(descriptor, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "write", full)
    writer.log_metrics({"a": 333}, 2)
    with pytest.raises(OSError, match="No space left"):
        writer.save()
    monkeypatch.setattr(os, "write", write)
    assert (tmp_path / "metrics.csv").read_text() == "a,step\n1,0\n2,1\n"
    writer.save()
    writer.close()
    assert (tmp_path / "metrics.csv").read_text() == "a,step\n1,0\n2,1\n333,2\n"


def test_a_remote_file_is_not_rewritten_at_every_save():
    filesystem = fsspec.filesystem("memory")
    logger = CSVLogger("memory://csv")
    assert logger.log_dir == "memory://csv/lightning_logs/version_0"
    logger.log_hyperparams({"a": 1})
    for step in range(4):
        logger.log_metrics({"a": step, **({"b": 1} if step == 3 else {})}, step=step)
        logger.save()
    folder = "/csv/lightning_logs/version_0"
    assert filesystem.cat_file(f"{folder}/metrics.csv").decode().splitlines() == ["a,step", "0,0"]
    logger.finalize("success")
    assert filesystem.cat_file(f"{folder}/metrics.csv").decode().splitlines() == [
        "a,b,step", "0,,0", "1,,1", "2,,2", "3,1,3",
    ]  # fmt: skip
    assert filesystem.cat_file(f"{folder}/hparams.yaml") == b"a: 1\n"
    assert CSVLogger("memory://csv").version == 1
    again = CSVLogger("memory://csv", version=0)
    with pytest.warns(UserWarning, match="not empty"):
        again.save()


@pytest.mark.parametrize("module", ["lightning.pytorch.loggers.csv_logs", "levin.loggers.csv_logs"])
@pytest.mark.filterwarnings("error")
def test_a_writer_that_keeps_the_rows_of_an_earlier_run(tmp_path, module):
    class Keeping(importlib.import_module(module).ExperimentWriter):
        def _check_log_dir_exists(self):
            pass

        def __init__(self, log_dir):
            super().__init__(log_dir=log_dir)
            if self._fs.isfile(self.metrics_file_path):
                with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                    self.metrics_keys = next(csv.reader(file))

    for step, row in enumerate([{"loss": 0.5}, {"loss": 0.25}, {"loss": 0.125, "accuracy": 1.0}]):
        writer = Keeping(str(tmp_path))
        writer.log_metrics(row, step)
        writer.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"loss": "0.5", "accuracy": "", "step": "0"},
            {"loss": "0.25", "accuracy": "", "step": "1"},
            {"loss": "0.125", "accuracy": "1.0", "step": "2"},
        ]
