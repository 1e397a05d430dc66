"""Checkpoints that are folders, on remote systems: complete or absent, and good for every way of going on."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import uuid
import warnings

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import stringify_path
from torch.distributed.tensor import Shard, distribute_tensor

from levin import Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import consolidate
from levin.checkpoint.folder import main as consolidate_command
from levin.checkpoint.layout import is_sharded
from levin.checkpoint.sharded import ShardedCheckpointIO
from levin.checkpoint.verify import find_newest_intact, verify
from levin.strategies import FSDPStrategy
from tests.distributed import cuts_on_cpu, run_ranks, world_size
from tests.strategies.small import QUIET
from tests.strategies.test_fsdp import Deep, alone, go_on, in_rank, whole

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable)")


class Shared(LocalFileSystem):
    """A system that several processes see by ``shared://`` alone, and that may fail."""

    protocol = "shared"
    on_write = staticmethod(lambda path: None)
    on_remove = staticmethod(lambda path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(stringify_path(path).removeprefix("shared://"))

    def unstrip_protocol(self, name):
        return f"shared://{self._strip_protocol(name)}"

    def _open(self, path, mode="rb", **options):
        if mode == "wb":
            self.on_write(path)
        return super()._open(path, mode, **options)

    def rm(self, path, **options):
        self.on_remove(path)
        super().rm(path, **options)


fsspec.register_implementation("shared", Shared, clobber=True)


@pytest.fixture
def memory():
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    fsspec.filesystem("memory").rm(url, recursive=True)


def fit(folder, epochs, ckpt_path=None, async_save=False):
    saved = ModelCheckpoint(
        folder, monitor="step", mode="max", save_top_k=2, save_last=True, filename="{epoch}", async_save=async_save
    )
    module = Deep(8)
    trainer = Trainer(**{
        **QUIET, "strategy": FSDPStrategy(state_dict_type="sharded"), "devices": 1, "max_epochs": epochs,
        "callbacks": [saved], "default_root_dir": folder,
    })  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Checkpoint directory")
        trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


def folders(url):
    return sorted(os.path.basename(path) for path in fsspec.filesystem("memory").ls(url, detail=False))


@pytest.mark.parametrize("async_save", [False, True], ids=["waits", "background"])
@cuts_on_cpu
@world_size(1, connect=False)
def test_a_run_is_kept_in_folders_and_goes_on(async_save):
    url = f"memory://{uuid.uuid4().hex}"
    trainer, _ = fit(url, 3, async_save=async_save)
    assert folders(url) == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    for name in folders(url):
        verify(f"{url}/{name}")
        # `last` was written three times.
        parts = sorted(os.path.splitext(part)[1] for part in folders(f"{url}/{name}"))
        assert parts == ["", ".distcp", ".pt"]
    _, unbroken = fit(f"{url}-unbroken", 6)
    best = trainer.checkpoint_callback.best_model_path
    for epochs, how in enumerate((best, "last", "auto"), 4):
        resumed, module = fit(url, epochs, how, async_save)
        assert resumed.global_step == 2 * epochs
        assert resumed.ckpt_path.rsplit("/")[-1] == ("epoch=2.ckpt" if how == best else "last.ckpt")
    torch.testing.assert_close(whole(module), whole(unbroken), rtol=0, atol=0)
    loaded = consolidate(f"{url}/last.ckpt")["state_dict"]
    torch.testing.assert_close(loaded, whole(module), rtol=0, atol=0)


def test_the_command_reads_and_writes_urls(memory, capsys):
    ShardedCheckpointIO().save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "here"}, f"{memory}/a.ckpt/")
    assert is_sharded(f"{memory}/a.ckpt") and is_sharded(f"{memory}/a.ckpt/")
    assert consolidate_command([f"{memory}/a.ckpt/"]) == 0
    assert "written" in capsys.readouterr().out
    with fsspec.open(f"{memory}/a.ckpt.consolidated") as file:
        assert torch.load(file)["note"] == "here"
    assert consolidate_command([f"{memory}/a.ckpt"]) == 1
    assert "is there already" in capsys.readouterr().out
    assert consolidate_command([f"{memory}/absent"]) == 1
    assert "is no folder" in capsys.readouterr().out


def save_of_two(folder):
    trainer = in_rank(FSDPStrategy(state_dict_type="sharded"), max_epochs=1)
    module = Deep(4)
    trainer.fit(module)
    path = f"shared://{folder}/saved.ckpt"
    trainer.save_checkpoint(path)
    trainer.save_checkpoint(path)


def go_on_with(folder, size):
    strategy = FSDPStrategy(state_dict_type="sharded")
    make = in_rank if size == 2 else (lambda **options: Trainer(devices=size, **{**QUIET, "max_epochs": 2, **options}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The checkpoint was saved by")
        module = go_on(
            f"shared://{folder}/saved.ckpt", make, batch_size=8 // size, strategy=strategy, enable_checkpointing=False
        )
    unbroken = Deep(8)
    alone().fit(unbroken)
    torch.testing.assert_close(whole(module), whole(unbroken))


@cuts_on_cpu
@pytest.mark.parametrize("size", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_folder_of_two_ranks_goes_on_with_another_number(tmp_path, size):
    run_ranks(save_of_two, 2, {"folder": str(tmp_path)}, connect=False)
    names = os.listdir(tmp_path / "saved.ckpt")
    assert {"meta.pt", ".metadata"} <= set(names) and len(names) == 4  # of two saves those of the second
    run_ranks(go_on_with, size, {"folder": str(tmp_path), "size": size}, connect=False)


@world_size(2)
def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    checkpoint_io = ShardedCheckpointIO()
    # The last is meta.pt before it has a name.
    for number, failing in enumerate(("__1_", "__0_", ".metadata", ".levin-")):

        def fail(path, failing=failing):
            if os.path.basename(path).startswith(failing):
                raise OSError("no room")

        url, folder = f"shared://{tmp_path}/{number}.ckpt", tmp_path / f"{number}.ckpt"
        for note in ("before", "after"):
            before = set(os.listdir(folder)) if folder.exists() else None
            dist.barrier()
            Shared.on_write = staticmethod(fail)
            with pytest.raises(OSError, match="no room") as caught:
                checkpoint_io.save_checkpoint(tree("never"), url)
            assert (f"Rank 0 could not save '{url}': OSError: no room" in str(caught.value)) == (
                failing == ".levin-" and dist.get_rank() == 1
            )
            dist.barrier()
            assert (set(os.listdir(folder)) if folder.exists() else None) == before
            assert before is None or consolidate(url)["note"] == "before"
            dist.barrier()
            Shared.on_write = staticmethod(lambda path: None)
            checkpoint_io.save_checkpoint(tree(note), url)
            assert consolidate(url)["note"] == note and len(os.listdir(folder)) == 4


def tree(note):
    mesh = dist.init_device_mesh("cpu", (2,))
    return {"weights": {"w": distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])}, "note": note}


def die_while_writing(url, name):
    def die(path):
        if os.path.basename(path).startswith(name):
            os._exit(9)

    Shared.on_write = staticmethod(die)
    ShardedCheckpointIO().save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "after"}, url)


@pytest.mark.parametrize("name", ["__0_", ".levin-"])
def test_a_process_that_dies_leaves_the_old_folder_or_none(tmp_path, name):
    for path in ("a.ckpt", "new.ckpt"):
        url = f"shared://{tmp_path}/{path}"
        if path == "a.ckpt":
            ShardedCheckpointIO().save_checkpoint({"weights": {"w": torch.zeros(3)}, "note": "before"}, url)
        process = multiprocessing.get_context("forkserver").Process(target=die_while_writing, args=(url, name))
        process.start()
        process.join()
        assert process.exitcode == 9
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Skipping a checkpoint that cannot be used: .* is a folder without `meta.pt`")
        assert os.path.basename(find_newest_intact(f"shared://{tmp_path}")) == "a.ckpt"
    with pytest.raises(ValueError, match="no complete checkpoint"):
        is_sharded(f"shared://{tmp_path}/new.ckpt")
    assert consolidate(f"shared://{tmp_path}/a.ckpt")["note"] == "before"
    # The next save takes away what the dead ones left.
    ShardedCheckpointIO().save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "after"}, url)
    assert consolidate(url)["note"] == "after" and len(os.listdir(tmp_path / "new.ckpt")) == 3


def test_a_save_that_fails_between_the_two_keeps_the_parts_of_both(tmp_path, monkeypatch):
    def fail(self, *paths, **options):
        raise OSError("gone")

    url, checkpoint_io = f"shared://{tmp_path}/a.ckpt", ShardedCheckpointIO()
    checkpoint_io.save_checkpoint({"weights": {"w": torch.zeros(3)}, "note": "before"}, url)
    monkeypatch.setattr(Shared, "mv", lambda self, old, new, **options: fail(self) if "metadata" in old else os.rename(
        self._strip_protocol(old), self._strip_protocol(new)
    ))  # fmt: skip
    with pytest.raises(OSError, match="gone"):
        checkpoint_io.save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "after"}, url)
    assert len([name for name in os.listdir(tmp_path / "a.ckpt") if name.endswith(".distcp")]) == 2
    with pytest.raises(ValueError, match="no complete checkpoint"):
        is_sharded(url)
    monkeypatch.undo()
    checkpoint_io.save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "after"}, url)
    assert consolidate(url)["note"] == "after" and len(os.listdir(tmp_path / "a.ckpt")) == 3


@pytest.mark.parametrize("is_remote", [False, True], ids=["local", "remote"])
def test_a_removal_that_fails_half_way_leaves_no_checkpoint(tmp_path, monkeypatch, is_remote):
    def fail(path, **options):
        if str(path).endswith("a.ckpt"):
            raise OSError("gone")

    url = f"shared://{tmp_path}/a.ckpt" if is_remote else str(tmp_path / "a.ckpt")
    ShardedCheckpointIO().save_checkpoint({"weights": {"w": torch.ones(3)}}, url)
    monkeypatch.setattr(Shared, "on_remove", staticmethod(fail))
    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(OSError, match="gone"):
        ShardedCheckpointIO().remove_checkpoint(url)
    with pytest.raises(ValueError, match="no complete"):
        verify(url)
    monkeypatch.undo()
    ShardedCheckpointIO().remove_checkpoint(url)
    assert os.listdir(tmp_path) == []


@world_size(2)
def test_a_local_save_that_fails_on_rank_0_fails_on_all(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory"):
        ShardedCheckpointIO().save_checkpoint(tree("never"), tmp_path / "file" / "a.ckpt")
