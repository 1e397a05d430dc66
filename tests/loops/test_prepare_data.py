"""Data are prepared once per machine, or once altogether, and nobody goes on before."""

from __future__ import annotations

import os
import time

from levin import LightningDataModule, Trainer
from tests.distributed import world_size
from tests.strategies.small import QUIET, Small, loader


class Prepared(LightningDataModule):
    def __init__(self, folder, per_node: bool) -> None:
        super().__init__()
        self.folder, self.prepare_data_per_node = folder, per_node

    def prepare_data(self):
        time.sleep(0.2)
        (self.folder / f"{int(self.prepare_data_per_node)}-{self.trainer.global_rank}").touch()

    def setup(self, stage):
        # Whoever comes here finds what was prepared on its machine.
        rank = self.trainer.global_rank if self.prepare_data_per_node and self.trainer.num_nodes == 2 else 0
        assert (self.folder / f"{int(self.prepare_data_per_node)}-{rank}").exists()

    def test_dataloader(self):
        return loader()


@world_size(2, timeout_s=120, connect=False)
def test_once_per_machine_or_once_altogether(tmp_path):
    rank = os.environ["RANK"]
    for nodes in (1, 2):
        folder = tmp_path / f"{nodes}-machines"
        folder.mkdir(exist_ok=True)
        if nodes == 2:
            os.environ.update(NODE_RANK=rank, LOCAL_RANK="0")
        for per_node in (True, False):
            trainer = Trainer(**{**QUIET, "devices": 2 // nodes, "num_nodes": nodes, "strategy": "ddp"})
            trainer.test(Small(), datamodule=Prepared(folder, per_node), verbose=False)
            trainer.strategy.barrier()
        expected = ["0-0", "1-0"] if nodes == 1 else ["0-0", "1-0", "1-1"]
        assert sorted(path.name for path in folder.iterdir()) == expected
