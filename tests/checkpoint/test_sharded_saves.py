"""Sharded saves of two ranks: beside another one that is going on in the background, and under names that differ."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch

from levin import Trainer
from levin.checkpoint import consolidate
from levin.checkpoint.background import AsyncCheckpointIO
from levin.checkpoint.sharded import ShardedCheckpointIO
from levin.strategies import FSDPStrategy
from tests.distributed import cuts_on_cpu, world_size
from tests.strategies.small import QUIET, Small


def tree(value: float) -> dict[str, object]:
    state = {"weight": torch.full((4,), value), f"only_{value}": torch.tensor(value)}
    return {"pytorch-lightning_version": "2.6.0", "state_dict": state}


class Late(ShardedCheckpointIO):
    """On rank 1 what is saved in the background begins when the save at once is over, or well under way."""

    is_over = threading.Event()

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if threading.current_thread() is not threading.main_thread() and torch.distributed.get_rank() == 1:
            self.is_over.wait(20)
        super().save_checkpoint(checkpoint, path, storage_options)


# A signal's save at once, for example.
@world_size(2)
def test_two_saves_do_not_mix(tmp_path):
    checkpoint_io = AsyncCheckpointIO(Late(), on_request=True)
    checkpoint_io.checkpoint_io.connect()
    behind, at_once = str(tmp_path / "behind.ckpt"), str(tmp_path / "at_once.ckpt")
    with checkpoint_io.request(behind):
        checkpoint_io.save_checkpoint(tree(1.0), behind)
    time.sleep(0.5)  # rank 0 waits for the others in the background
    checkpoint_io.save_checkpoint(tree(2.0), at_once)
    Late.is_over.set()
    checkpoint_io.wait()
    checkpoint_io.check()
    for path, value in ((behind, 1.0), (at_once, 2.0)):
        state = consolidate(path)["state_dict"]
        assert state.keys() == tree(value)["state_dict"].keys()
        assert state["weight"].tolist() == [value] * 4
    checkpoint_io.teardown()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_nothing_that_a_killed_save_left_is_in_the_next_one(tmp_path):
    left = tmp_path / "a.ckpt.part"
    left.mkdir()
    (left / "__9_0.distcp").write_text("half of a part")
    ShardedCheckpointIO().save_checkpoint(tree(1.0), tmp_path / "a.ckpt")
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert sorted(os.listdir(tmp_path / "a.ckpt")) == [".metadata", "__0_0.distcp", "meta.pt"]


@cuts_on_cpu
@world_size(2, connect=False)
def test_a_folder_that_each_rank_calls_by_another_name_has_that_of_rank_0(tmp_path):
    module = Small()
    strategy = FSDPStrategy(state_dict_type="sharded")
    trainer = Trainer(**{**QUIET, "strategy": strategy, "devices": 2, "max_epochs": 1, "enable_checkpointing": False})
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / f"rank-{trainer.global_rank}.ckpt")
    assert os.listdir(tmp_path) == ["rank-0.ckpt"]
    weight = consolidate(tmp_path / "rank-0.ckpt")["state_dict"]["net.1.weight"]
    assert torch.equal(weight, module.net[1].weight.full_tensor())
