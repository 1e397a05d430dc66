"""``ckpt_path="auto"`` finds the newest intact checkpoint; "last", "best" and "hpc" what they are called after."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pytest
import torch
import torch.distributed as dist

from levin import Trainer
from levin.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from levin.checkpoint import load
from levin.checkpoint.select import agree, select_checkpoint
from levin.loggers import CSVLogger
from levin.utilities.states import TrainerFn
from tests.callbacks.small import TrainOnly, loader
from tests.distributed import world_size

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def fit(root, max_epochs, ckpt_path="auto", callbacks=None, logger=True, **kwargs):
    trainer = Trainer(
        accelerator="cpu", devices=1, default_root_dir=str(root), logger=logger, callbacks=callbacks, max_epochs=max_epochs,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **kwargs,
    )  # fmt: skip
    trainer.fitted = TrainOnly()
    trainer.fit(trainer.fitted, loader(), ckpt_path=ckpt_path)
    return trainer


def two(folder, **arguments):
    """Callbacks that save in the folders ``a`` and ``b``."""
    return [
        ModelCheckpoint(folder / name, filename=name, mode=mode, **arguments)
        for name, mode in (("a", "min"), ("b", "max"))
    ]


def age(path, seconds):
    """Make a file older than it is."""
    when = os.stat(path).st_mtime - seconds
    os.utime(path, (when, when))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def memory():
    """A folder on a remote system."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    if fsspec.filesystem("memory").exists(url):
        fsspec.filesystem("memory").rm(url, recursive=True)


# auto ---------------------------------------------------------------------------------------------------------------


def test_auto_starts_afresh_when_there_is_nothing(tmp_path):
    assert fit(tmp_path, 1).ckpt_path is None


def test_auto_finds_what_an_earlier_process_with_default_settings_left(tmp_path):
    script = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from tests.checkpoint.test_newest import fit\n"
        "trainer = fit(sys.argv[1], int(sys.argv[2]))\n"
        "print(trainer.ckpt_path, trainer.global_step, trainer.logger.version)"
    )
    lines = []
    for max_epochs in (1, 2, 2, 3):
        command = [sys.executable, "-c", script, str(tmp_path), str(max_epochs)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        lines.append(done.stdout.splitlines()[-1].replace(str(tmp_path), "."))
    assert lines == [
        "None 4 0",
        "./lightning_logs/version_0/checkpoints/epoch=0-step=4.ckpt 8 1",
        "./lightning_logs/version_1/checkpoints/epoch=1-step=8.ckpt 8 2",  # had nothing to do and left no file
        "./lightning_logs/version_1/checkpoints/epoch=1-step=8.ckpt 12 3",
    ]


def test_auto_goes_back_to_an_earlier_version_when_all_files_of_the_newest_are_damaged(tmp_path):
    fit(tmp_path, 1)
    fit(tmp_path, 2)
    logs = tmp_path / "lightning_logs"
    cut(logs / "version_1" / "checkpoints" / "epoch=1-step=8.ckpt")
    with pytest.warns(UserWarning, match="Skipping .*version_1/checkpoints/epoch=1-step=8.ckpt is damaged"):
        resumed = fit(tmp_path, 3)
    assert resumed.ckpt_path == str(logs / "version_0" / "checkpoints" / "epoch=0-step=4.ckpt")
    assert resumed.global_step == 12


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_auto_takes_only_the_version_that_was_asked_for(tmp_path):
    def run(version, max_epochs):
        return fit(tmp_path, max_epochs, logger=CSVLogger(tmp_path, version=version)).ckpt_path

    assert run(0, 1) is None
    assert run(1, 1) is None
    assert run(0, 2) == str(tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "epoch=0-step=4.ckpt")


def test_auto_takes_the_newest_of_all_folders(tmp_path):
    fit(tmp_path, 1, callbacks=two(tmp_path))
    age(tmp_path / "a" / "a.ckpt", 10)
    # A file of the signal handler counts too, unless it is older.
    trainer = fit(tmp_path, 1, None, callbacks=[ModelCheckpoint(tmp_path / "c")])
    trainer.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    age(tmp_path / "hpc_ckpt_1.ckpt", 20)

    def found():
        return os.path.relpath(fit(tmp_path, 1, callbacks=two(tmp_path, save_top_k=0)).ckpt_path, tmp_path)

    assert found() == "b/b.ckpt"
    age(tmp_path / "b" / "b.ckpt", 15)
    assert found() == "a/a.ckpt"
    age(tmp_path / "a" / "a.ckpt", 15)
    assert found() == "b/b.ckpt"
    cut(tmp_path / "b" / "b.ckpt")
    cut(tmp_path / "a" / "a.ckpt")
    with pytest.warns(UserWarning, match="is damaged"):
        assert found() == "hpc_ckpt_1.ckpt"


def test_auto_takes_no_file_without_optimizers_to_train_on(tmp_path):
    def callbacks():
        return [
            ModelCheckpoint(tmp_path / "weights", save_weights_only=True),
            ModelCheckpoint(tmp_path / "all", every_n_epochs=2),
        ]

    assert fit(tmp_path, 3, callbacks=callbacks()).global_step == 12
    resumed = fit(tmp_path, 4, callbacks=callbacks())
    assert resumed.ckpt_path == str(tmp_path / "all" / "epoch=1-step=8.ckpt")
    assert resumed.global_step == 16


def test_auto_works_on_a_remote_system(memory):
    callback = ModelCheckpoint(memory, save_top_k=-1)
    fit("unused", 2, callbacks=[callback], logger=False)
    remote = fsspec.filesystem("memory")
    newest = f"{memory}/epoch=1-step=8.ckpt"
    with remote.open(newest, "rb") as file:
        content = file.read()
    with remote.open(newest, "wb") as file:
        file.write(content[: len(content) // 2])
    with remote.open(f"{memory}/.hidden.ckpt", "wb") as file:
        file.write(b"")
    with pytest.warns(UserWarning, match=r"Skipping .*epoch=1-step=8.ckpt is damaged"):
        resumed = fit("unused", 3, callbacks=[ModelCheckpoint(memory, save_top_k=-1)], logger=False)
    assert resumed.ckpt_path.endswith("epoch=0-step=4.ckpt")
    assert resumed.ckpt_path.startswith("memory://")
    assert resumed.global_step == 12


def test_auto_works_with_logs_on_a_remote_system(memory):
    for max_epochs, expected in ((1, None), (2, "version_0/checkpoints/epoch=0-step=4.ckpt")):
        found = fit(memory, max_epochs, logger=CSVLogger(memory)).ckpt_path
        assert found == expected or found.endswith(expected)


@world_size(2)
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_all_ranks_start_from_what_rank_0_finds(tmp_path):
    rank = dist.get_rank()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", default_root_dir=str(tmp_path / f"disk_{rank}"), logger=False,
        enable_progress_bar=False, enable_model_summary=False, max_epochs=1, callbacks=[ModelCheckpoint(tmp_path)],
    )  # fmt: skip
    trainer.fit(TrainOnly(), loader())
    path = str(tmp_path / "epoch=0-step=2.ckpt")
    assert agree(trainer.run, path if rank == 0 else None) == path


# last, best, hpc ----------------------------------------------------------------------------------------------------


def select(trainer, name):
    return select_checkpoint(trainer.run, name, model_given=True)


def test_last_is_the_newest_of_the_files_called_last(tmp_path):
    trainer = fit(tmp_path, 1, None, callbacks=two(tmp_path, save_last=True, save_top_k=0))
    (tmp_path / "a" / "last-v1.ckpt").symlink_to("gone.ckpt")
    age(tmp_path / "b" / "last.ckpt", 10)
    assert select(trainer, "last") == str(tmp_path / "a" / "last.ckpt")
    age(tmp_path / "a" / "last.ckpt", 20)
    assert select(trainer, "last") == str(tmp_path / "b" / "last.ckpt")


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_last_is_the_file_of_an_exception_when_that_is_newer(tmp_path, memory):
    for folder in (str(tmp_path / "saved"), memory):
        callbacks = [ModelCheckpoint(tmp_path / "a", save_last=True, save_top_k=0), OnExceptionCheckpoint(folder)]
        trainer = fit(tmp_path, 1, None, callbacks=callbacks)
        assert select(trainer, "last").endswith("last.ckpt")
        trainer.save_checkpoint(callbacks[1].ckpt_path)
        age(tmp_path / "a" / "last.ckpt", 10)
        assert select(trainer, "last") == f"{folder}/on_exception.ckpt"


def test_last_starts_afresh_with_a_warning_when_there_is_none(tmp_path):
    with pytest.warns(UserWarning, match="there is no last checkpoint available"):
        assert fit(tmp_path, 1, "last").ckpt_path is None


def test_last_and_best_work_on_a_remote_system(memory):
    callback = ModelCheckpoint(memory, save_last=True)
    trainer = fit("unused", 1, None, callbacks=[callback], logger=False)
    assert load(select(trainer, "last"))["global_step"] == 4
    assert select(trainer, "best") == f"{memory}/epoch=0-step=4.ckpt"
    assert fit("unused", 2, "last", callbacks=[ModelCheckpoint(memory)], logger=False).global_step == 8


def test_best_is_that_of_the_first_callback(tmp_path):
    trainer = fit(tmp_path, 1, None, callbacks=two(tmp_path))
    with pytest.warns(UserWarning, match="found several `ModelCheckpoint` callbacks"):
        assert select(trainer, "best") == str(tmp_path / "a" / "a.ckpt")
    trainer = Trainer(default_root_dir=str(tmp_path), enable_checkpointing=False, logger=False, accelerator="cpu")
    with pytest.raises(ValueError, match="`ModelCheckpoint` is not configured"):
        trainer.validate(TrainOnly(), loader(), ckpt_path="best")


@pytest.mark.parametrize("is_remote", [False, True])
def test_hpc_is_the_highest_number(tmp_path, memory, is_remote):
    folder = memory if is_remote else str(tmp_path)
    trainer = fit(folder, 1, None, logger=False, callbacks=[ModelCheckpoint(tmp_path / "a")])
    with pytest.raises(ValueError, match="no hpc_ckpt_N.ckpt"):
        select(trainer, "hpc")
    for number in (9, 10):
        trainer.save_checkpoint(f"{folder}/hpc_ckpt_{number}.ckpt")
    assert select(trainer, "hpc").endswith("hpc_ckpt_10.ckpt")
    assert load(select(trainer, "hpc"))["global_step"] == 4


@pytest.mark.parametrize("job", ["train.sh", "bash", "zsh", "fish", "interactive"])
def test_the_file_of_a_requeued_job_counts_for_fit_alone_and_for_no_shell(tmp_path, monkeypatch, job):
    first = fit(tmp_path, 1, None, logger=False, callbacks=[ModelCheckpoint(tmp_path / "a")])
    first.save_checkpoint(tmp_path / "hpc_ckpt_1.ckpt")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", job)
    found = str(tmp_path / "hpc_ckpt_1.ckpt") if job == "train.sh" else None
    assert select(first, None) == found
    for name in ("validate", "test", "predict"):
        first.state.fn = TrainerFn(name)
        assert select(first, None) is None
        assert select(first, "hpc") == str(tmp_path / "hpc_ckpt_1.ckpt")  # for those who ask for it


@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_subclass_of_the_exception_checkpoint_goes_on_by_itself_too(tmp_path):
    class Mine(OnExceptionCheckpoint):
        pass

    for callback in (OnExceptionCheckpoint(tmp_path), Mine(tmp_path)):
        trainer = fit(tmp_path, 1, None, callbacks=[callback], logger=False)
        trainer.save_checkpoint(callback.ckpt_path)
        assert select(trainer, None) == str(tmp_path / "on_exception.ckpt")
        os.remove(callback.ckpt_path)


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be an existing file, received .*gone.ckpt"):
        fit(tmp_path, 1, str(tmp_path / "gone.ckpt"))


def test_weights_of_the_checkpoint_are_taken_up(tmp_path):
    first = fit(tmp_path, 1)
    saved = load(first.checkpoint_callback.best_model_path)["state_dict"]
    resumed = fit(tmp_path, 1)
    assert all(torch.equal(value, saved[name]) for name, value in resumed.fitted.state_dict().items())
