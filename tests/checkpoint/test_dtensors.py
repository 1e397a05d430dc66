"""What is spread over ranks is whole in a file that one rank writes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from levin import LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO, load
from levin.checkpoint.io import save_tree
from levin.strategies import DDPStrategy
from tests.callbacks.small import loader
from tests.distributed import cuts_on_cpu, world_size


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3, bias=False))
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    return module, optimizer, expected


@cuts_on_cpu
@world_size(2)
def test_a_file_of_one_rank_holds_whole_tensors(tmp_path):
    from torch.distributed.tensor import DTensor

    module, optimizer, expected = sharded()
    state = module.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    assert state["0.weight"].to_local().shape == (4, 8)
    full = {name: value.full_tensor() for name, value in state.items()}
    tree = {"state_dict": state, "optimizer_states": [optimizer.state_dict()], "epoch": 3}
    tree["rows"] = ([state["0.weight"], state["0.bias"]], [state["0.weight"], "a"])
    save_tree(TorchCheckpointIO(), tree, tmp_path / "model.ckpt", is_writer=dist.get_rank() == 0)
    dist.barrier()
    assert isinstance(state["0.weight"], DTensor)  # the tree itself is as it was
    saved = load(tmp_path / "model.ckpt")
    assert {name: value.shape for name, value in saved["state_dict"].items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert all(type(value) is torch.Tensor for value in saved["state_dict"].values())
    assert all(torch.equal(value, full[name]) for name, value in saved["state_dict"].items())
    moments = saved["optimizer_states"][0]["state"]
    assert [moments[number]["exp_avg"].shape for number in moments] == [(8, 8), (8,), (3, 8)]
    assert saved["epoch"] == 3
    (weight, bias), (again, word) = saved["rows"]
    assert all(torch.equal(value, full["0.weight"]) for value in (weight, again))
    assert torch.equal(bias, full["0.bias"]) and word == "a"


@cuts_on_cpu
@world_size(2)
def test_a_rank_alone_refuses_to_write_its_part(tmp_path):
    module, _, _ = sharded()
    with pytest.raises(RuntimeError, match="parts are on several ranks cannot be saved by one of them"):
        save_tree(TorchCheckpointIO(), {"state_dict": module.state_dict()}, tmp_path / "model.ckpt", is_alone=True)
    assert not (tmp_path / "model.ckpt").exists()


class Sharding(CheckpointIO):
    is_collective = True

    def __init__(self):
        self.seen = []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.seen.append((type(checkpoint["weight"]).__name__, path))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return {}

    def remove_checkpoint(self, path):
        self.seen.append(path)


@cuts_on_cpu
@world_size(2)
def test_a_collective_checkpoint_io_gets_the_parts_of_every_rank(tmp_path):
    module, _, _ = sharded()
    checkpoint_io = Sharding()
    tree = {"weight": module.state_dict()["0.weight"]}
    save_tree(checkpoint_io, tree, "a", is_writer=dist.get_rank() == 0)
    assert checkpoint_io.seen == [("DTensor", "a")]
    assert AsyncCheckpointIO(checkpoint_io).is_collective


class Sharded(DDPStrategy):
    """Spreads the parameters over the ranks, as a strategy that a user writes may do."""

    def wrap_module(self, module, for_training=True):
        from torch.distributed.fsdp import fully_shard

        fully_shard(module.layer)
        return module


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = torch.nn.Linear(2, 6)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


@pytest.mark.parametrize("async_save", [False, True])
@cuts_on_cpu
@world_size(2, connect=False)
def test_a_checkpoint_of_a_sharded_module_is_whole(tmp_path, async_save):
    model = Model()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=Sharded(), max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path), use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(tmp_path / "saved", async_save=async_save)],
    )  # fmt: skip
    trainer.fit(model, loader())
    assert model.layer.weight.to_local().shape == (3, 2)
    saved = load(tmp_path / "saved" / "epoch=0-step=4.ckpt")
    assert saved["state_dict"]["layer.weight"].shape == (6, 2)
    assert saved["optimizer_states"][0]["state"][0]["exp_avg"].shape == (6, 2)
    assert torch.equal(saved["state_dict"]["layer.weight"], model.layer.weight.full_tensor())
