"""A sharded save at once, as that of a signal, while another one is going on in the background, on two ranks."""

from __future__ import annotations

import threading
import time

import torch

from levin.checkpoint import consolidate
from levin.checkpoint.background import AsyncCheckpointIO
from levin.checkpoint.sharded import ShardedCheckpointIO
from tests.distributed import world_size


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
