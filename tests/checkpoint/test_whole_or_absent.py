"""A checkpoint file is whole or absent, whatever happens to the disk; and what is damaged is found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid

import fsspec
import pytest
import torch

from levin.__main__ import main
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO, TorchCheckpointIO, atomic_save, find_newest_intact, load
from levin.checkpoint.sharded import ShardedCheckpointIO
from levin.checkpoint.verify import verify
from levin.checkpoint.zero import ZeroCheckpointIO
from levin.utilities import filesystem
from tests.callbacks.small import TrainOnly, loader, names, trainer
from tests.checkpoint import disks
from tests.distributed import world_size

fcntl = pytest.importorskip("fcntl")


class Large(TrainOnly):
    """A model of 300 kB: one file fits on the small disk, a second one does not fit beside two others."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.weights = torch.nn.Parameter(torch.zeros(75_000))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.weights[:2].sum()


def state(value: float, num_bytes: int = 400_000):
    return {"weights": torch.full((num_bytes // 4,), value)}


# A full disk --------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_older_file_and_no_litter(tmp_path):
    with disks.small(tmp_path / "disk") as disk:
        path = disk / "model.ckpt"
        atomic_save(state(1.0), path)
        with pytest.raises(OSError, match=disks.FULL) as caught:
            atomic_save(state(2.0, 2 * disks.SMALL_BYTES), path)
        assert caught.value.filename == str(path)
        assert names(disk) == ["model.ckpt"]
        assert load(path)["weights"][0] == 1.0


@pytest.mark.parametrize("way", ["blocking", "async_save", "plugin"])
def test_a_run_fails_on_a_full_disk_and_keeps_what_it_had(tmp_path, way):
    with disks.small(tmp_path / "disk") as disk:
        (disk / "others").write_bytes(bytes(disks.SMALL_BYTES - 500_000))
        if not os.path.ismount(disk):
            pytest.skip("without the right to mount, only single files are limited")
        callback = ModelCheckpoint(disk / "saved", async_save=way == "async_save")
        run = trainer(tmp_path, [callback], plugins=AsyncCheckpointIO() if way == "plugin" else None)
        with pytest.raises(OSError, match=disks.FULL):
            run.fit(Large(), loader())
        first = str(disk / "saved" / "epoch=0-step=4.ckpt")
        assert names(disk / "saved") == ["epoch=0-step=4.ckpt"]
        verify(first)
        assert callback.best_model_path == first
        assert load(first)["global_step"] == 4


def test_a_folder_that_cannot_be_written_to_is_a_clear_error(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    atomic_save(state(1.0), folder / "model.ckpt")
    with disks.read_only(folder):
        with pytest.raises(OSError, match=disks.READ_ONLY) as caught:
            atomic_save(state(2.0), folder / "model.ckpt")
        assert caught.value.filename == str(folder / "model.ckpt")
    assert names(folder) == ["model.ckpt"]
    assert load(folder / "model.ckpt")["weights"][0] == 1.0


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_fails_when_its_folder_cannot_be_written_to(tmp_path, async_save):
    (tmp_path / "saved").mkdir()
    with disks.read_only(tmp_path / "saved"):
        run = trainer(tmp_path, [ModelCheckpoint(tmp_path / "saved", async_save=async_save)])
        with pytest.raises(OSError, match=disks.READ_ONLY):
            run.fit(TrainOnly(), loader())
    assert run.interrupted


def test_a_folder_or_a_file_in_the_way_is_a_clear_error(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(IsADirectoryError, match="A folder is in the place of the file"):
        atomic_save(state(1.0), tmp_path / "folder")
    with pytest.raises(NotADirectoryError, match="A file is in the place of a folder"):
        atomic_save(state(1.0), tmp_path / "file" / "model.ckpt")
    assert names(tmp_path) == ["file"]


def test_what_cannot_be_pickled_is_named_and_leaves_nothing(tmp_path):
    with pytest.raises((AttributeError, TypeError), match=r"\['hyper_parameters'\]\['function'\] cannot be saved"):
        atomic_save({"hyper_parameters": {"lr": 0.1, "function": lambda x: x}}, tmp_path / "model.ckpt")
    assert names(tmp_path) == []


# Other systems ------------------------------------------------------------------------------------------------------


def remote_names(url):
    return sorted(os.path.basename(path) for path in fsspec.filesystem("memory").ls(url, detail=False))


@pytest.mark.parametrize("moment", ["while writing", "before the move", "some bytes are lost"])
def test_a_failure_on_a_remote_system_leaves_the_older_file_and_no_litter(monkeypatch, moment):
    url = f"memory://{uuid.uuid4().hex}"
    system = type(fsspec.filesystem("memory"))
    atomic_save(state(1.0), f"{url}/model.ckpt")
    before = fsspec.filesystem("memory").cat(f"{url}/model.ckpt")

    def fail(*args, **kwargs):
        raise ConnectionError("cut")

    with monkeypatch.context() as patch:
        if moment == "while writing":
            patch.setattr(type(fsspec.filesystem("memory").open(f"{url}/x", "wb")), "write", fail)
            fsspec.filesystem("memory").rm(f"{url}/x")
        elif moment == "before the move":
            patch.setattr(system, "mv", fail)
        else:
            info = system.info
            patch.setattr(system, "info", lambda self, path, **kwargs: info(self, path, **kwargs) | {"size": 10})
        with pytest.raises(OSError, match="cut|10 of [0-9]+ bytes arrived"):
            atomic_save(state(2.0), f"{url}/model.ckpt")
    assert remote_names(url) == ["model.ckpt"]
    assert fsspec.filesystem("memory").cat(f"{url}/model.ckpt") == before
    verify(f"{url}/model.ckpt")


def test_the_background_writes_to_a_remote_system(tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    callback = ModelCheckpoint(url, async_save=True, save_top_k=-1)
    trainer(tmp_path, [callback], max_epochs=2).fit(TrainOnly(), loader())
    assert remote_names(url) == ["epoch=0-step=4.ckpt", "epoch=1-step=8.ckpt"]
    assert load(callback.best_model_path)["global_step"] == 8
    assert find_newest_intact(url).endswith("epoch=1-step=8.ckpt")


# The order of things ------------------------------------------------------------------------------------------------


def test_the_name_comes_after_the_content_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    synced, replace = os.fsync, os.replace

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.exists("/proc/self/fd") else ""
        calls.append("sync folder" if os.path.isdir(path) else "sync file")
        synced(descriptor)

    def rename(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    atomic_save(state(1.0), tmp_path / "model.ckpt")
    assert calls == ["sync file", "rename", "sync folder"]


class Engine:
    """What a folder needs of DeepSpeed's engine: the weights are frozen or not, and three files are written."""

    def zero_optimization(self) -> bool:
        return True

    def save_checkpoint(self, folder: str, tag: str, exclude_frozen_parameters: bool) -> None:
        for name in ("latest", f"{tag}/weights.pt", f"{tag}/states.pt"):
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(str(exclude_frozen_parameters))


@world_size(1)
def test_the_name_of_a_folder_of_deepspeed_comes_after_all_of_its_content_is_on_the_disk(tmp_path):
    calls: list[str] = []
    synced, rename = os.fsync, os.rename

    def fsync(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced(descriptor)

    def renamed(source, target):
        calls.append("rename")
        rename(source, target)

    os.fsync, os.rename = fsync, renamed
    folder = tmp_path / "model.ckpt"
    (tmp_path / "model.ckpt.part").mkdir()
    (tmp_path / "model.ckpt.part" / "left").write_text("of a writer that was killed")
    saver = ZeroCheckpointIO(exclude_frozen=True)
    saver.engine = Engine()
    saver.save_checkpoint({"global_step": 3, "state_dict": {}, "optimizer_states": []}, folder)
    is_named = calls.index("rename")
    for name in ("latest", "checkpoint/weights.pt", "checkpoint/states.pt", "checkpoint"):
        assert f"{folder}.part/{name}" in calls[:is_named]
    assert str(tmp_path) in calls[is_named:]
    assert os.listdir(tmp_path) == ["model.ckpt"] and sorted(os.listdir(folder)) == ["checkpoint", "latest", "meta.pt"]
    assert (folder / "latest").read_text() == "True"
    assert load(folder / "meta.pt")["global_step"] == 3
    # Weights that do not learn are left out where that was asked for and the engine can.
    for excludes, can in ((False, True), (True, False)):
        saver.exclude_frozen, saver.engine.zero_optimization = excludes, lambda can=can: can
        saver.save_checkpoint({"global_step": 4, "state_dict": {}, "optimizer_states": []}, folder)
        assert (folder / "latest").read_text() == "False"


def test_what_killed_writers_left_goes_with_the_next_save(tmp_path):
    left, young, busy = (tmp_path / f".levin-{name}.tmp" for name in ("left", "young", "busy"))
    for path in (left, young, busy):
        path.write_text("half a file")
    old = time.time() - 1000
    os.utime(left, (old, old))
    os.utime(busy, (old, old))
    with busy.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        atomic_save(state(1.0), tmp_path / "model.ckpt")
    assert names(tmp_path) == [".levin-busy.tmp", ".levin-young.tmp", "model.ckpt"]


def test_links_that_killed_writers_left_go_with_the_next_save(tmp_path):
    left, young = (tmp_path / f".levin-{name}.tmp" for name in ("left", "young"))
    for path in (left, young):
        path.symlink_to("model.ckpt")
    old = time.time() - 1000
    os.utime(left, (old, old), follow_symlinks=False)
    atomic_save(state(1.0), tmp_path / "model.ckpt")
    assert names(tmp_path) == [".levin-young.tmp", "model.ckpt"]


def test_temporary_files_are_no_checkpoints_to_resume_from(tmp_path):
    (tmp_path / f"{filesystem.TEMPORARY_PREFIX}1{filesystem.TEMPORARY_SUFFIX}").write_text("half a file")
    assert find_newest_intact(tmp_path) is None


# Telling damaged files ----------------------------------------------------------------------------------------------


def flip(data: bytes, position: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 0x10
    return bytes(changed)


DAMAGES = {
    "empty": lambda data: b"",
    "the first byte": lambda data: data[:1],
    "half of it": lambda data: data[: len(data) // 2],
    "all but the last byte": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros at the end": lambda data: data[:-4096] + bytes(4096),
    "a page of zeros": lambda data: data[:8192] + bytes(4096) + data[12288:],
    "a bit in the weights": lambda data: flip(data, len(data) // 2),
    "a bit in the pickle": lambda data: flip(data, data.index(b"weights")),
    # Places in the first entry of the directory.
    "unknown flags": lambda data: flip(data, data.index(b"PK\1\2") + 8),
    "a compressed record": lambda data: flip(data, data.index(b"PK\1\2") + 10),
    "a record on another volume": lambda data: flip(data, data.index(b"PK\1\2") + 34),
    "a record that is a folder": lambda data: flip(data, data.index(b"PK\1\2") + 38),
    "another kind of file": lambda data: b"once upon a time",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_told(tmp_path, damage):
    path = tmp_path / "model.ckpt"
    atomic_save({"weights": torch.rand(10_000)}, path)
    verify(path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    for read in (verify, load):
        with pytest.raises(ValueError, match=r"model.ckpt (is damaged: .*\. Use an older checkpoint|is no checkpoint)"):
            read(path)


def test_the_command_says_of_each_file_whether_it_is_intact(tmp_path, capsys):
    good, bad, gone = (str(tmp_path / name) for name in ("good.ckpt", "bad.ckpt", "gone.ckpt"))
    for path in (good, bad):
        atomic_save(state(1.0), path)
    with open(bad, "r+b") as file:
        file.truncate(1000)
    assert main(["verify", good]) == 0
    assert capsys.readouterr().out == f"intact  {good}\n"
    assert main(["verify", good, bad, gone]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"intact  {good}"
    assert lines[1].startswith(f"BAD     {bad}: {bad} is damaged: ")
    assert lines[2] == f"BAD     {gone}: Checkpoint file not found: {gone}"
    assert len(lines) == 3


def test_the_command_is_there(tmp_path):
    atomic_save(state(1.0), tmp_path / "good.ckpt")
    command = [sys.executable, "-m", "levin", "verify", "good.ckpt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "intact  good.ckpt\n"
    with pytest.raises(SystemExit) as caught:
        main(["verify"])
    assert caught.value.code == 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_auto_goes_on_from_the_newest_intact_file(tmp_path):
    def run(max_epochs, ckpt_path=None):
        callback = ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
        result = trainer(tmp_path, [callback], max_epochs=max_epochs)
        result.fit(TrainOnly(), loader(), ckpt_path=ckpt_path)
        return result

    assert run(2, "auto").ckpt_path is None
    newest = tmp_path / "saved" / "epoch=1-step=8.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(
        UserWarning, match=r"Skipping a checkpoint that cannot be used: .*epoch=1-step=8.ckpt is damaged"
    ):
        resumed = run(3, "auto")
    assert resumed.ckpt_path == str(tmp_path / "saved" / "epoch=0-step=4.ckpt")
    assert resumed.global_step == 12


@pytest.mark.parametrize(
    "make",
    [TorchCheckpointIO, AsyncCheckpointIO, ShardedCheckpointIO, ZeroCheckpointIO],
    ids=lambda make: make.__name__,
)
def test_options_that_nothing_heeds_are_refused(tmp_path, make):
    with pytest.raises(TypeError, match="storage_options must be None for .*, received {'ttl': 3}"):
        make().save_checkpoint({"a": 1}, tmp_path / "x", storage_options={"ttl": 3})
    assert not list(tmp_path.iterdir())
