"""``levin consolidate`` turns the folder of a sharded checkpoint into a file that any Trainer goes on from."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from levin.__main__ import main
from levin.checkpoint import atomic_save, consolidate, load
from tests.callbacks.small import Small
from tests.checkpoint.test_migrate import fitted
from tests.distributed import cuts_on_cpu, world_size

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")


class Adam(Small):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.fixture
def run(tmp_path):
    """A run of two epochs and its checkpoint."""
    model, trainer = fitted(tmp_path / "run", 2, kind=Adam)
    return model, trainer, load(trainer.checkpoint_callback.best_model_path)


def write_sharded(folder, checkpoint, weights, optimizers, key="model"):
    meta = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    named = {f"optimizer_{number}": state for number, state in enumerate(optimizers)}
    dcp.save({key: weights, **named}, checkpoint_id=str(folder))
    torch.save(meta, folder / "meta.pt")


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("are_named", [True, False])
def test_the_file_is_that_of_a_trainer_and_training_goes_on_from_it(tmp_path, run, capsys, key, are_named):
    model, trainer, checkpoint = run
    optimizer = trainer.optimizers[0]
    state = get_optimizer_state_dict(model, optimizer) if are_named else optimizer.state_dict()
    folder = tmp_path / "epoch=1-step=8.ckpt"
    write_sharded(folder, checkpoint, model.state_dict(), [state], key)
    assert main(["consolidate", str(folder)]) == 0
    output = f"{folder}.consolidated"
    assert capsys.readouterr().out == f"written  {output}\n"
    found = load(output)
    assert found.keys() == checkpoint.keys()
    assert all(same(found[name], checkpoint[name]) for name in checkpoint if name != "levin")
    expected, unbroken = fitted(tmp_path / "unbroken", 4, kind=Adam)
    resumed, again = fitted(tmp_path / "resumed", 4, output, kind=Adam)
    assert again.global_step == unbroken.global_step == 16
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in resumed.state_dict().items())


@cuts_on_cpu
@world_size(2)
def test_shards_of_two_processes_are_put_together(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    plain = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    plain.load_state_dict(model.state_dict())
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    batch = torch.randn(5, 6)
    states = []
    for network in (model, plain):
        optimizer = torch.optim.Adam(network.parameters())
        network(batch).sum().backward()
        optimizer.step()
        states.append(get_optimizer_state_dict(network, optimizer))
    dcp.save({"model": model.state_dict(), "optimizer_0": states[0]}, checkpoint_id=str(tmp_path / "sharded"))
    if dist.get_rank() == 0:
        torch.save({"pytorch-lightning_version": "2.6.6", "epoch": 3}, tmp_path / "sharded" / "meta.pt")
    dist.barrier()
    found = consolidate(tmp_path / "sharded")
    assert found["epoch"] == 3
    assert len([name for name in os.listdir(tmp_path / "sharded") if name.endswith(".distcp")]) == 2
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(found["state_dict"][name], value)
    names = [name for name, _ in plain.named_parameters()]
    assert list(found["optimizer_states"][0]["state"]) == [0, 1, 2, 3]
    for number, name in enumerate(names):
        for key, value in states[1]["state"][name].items():
            torch.testing.assert_close(found["optimizer_states"][0]["state"][number][key], value)
    assert found["optimizer_states"][0]["param_groups"][0]["params"] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_of_ones_own_keeps_its_keys(tmp_path):
    shards = {"network": {"weight": torch.arange(3.0)}, "note": "kept", "numbers": {"a": [1, 2]}}
    dcp.save(shards, checkpoint_id=str(tmp_path / "own"))
    torch.save({"step": 4}, tmp_path / "own" / "meta.pt")
    assert same(consolidate(tmp_path / "own"), {**shards, "step": 4})


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_what_is_incomplete_or_in_the_way_is_an_error(tmp_path, run, capsys):
    model, trainer, checkpoint = run
    folder = tmp_path / "sharded"
    write_sharded(folder, checkpoint, model.state_dict(), [trainer.optimizers[0].state_dict()])
    (tmp_path / "there").write_text("mine")
    # As Lightning's command ends, too.
    assert main(["consolidate", str(folder), "--output_file", str(tmp_path / "there")]) == 1
    assert "is there already" in capsys.readouterr().out
    assert (tmp_path / "there").read_text() == "mine"
    for damage, message in (
        (lambda: (folder / "__0_0.distcp").write_bytes(b""), "is damaged"),
        (
            lambda: (folder / "__0_0.distcp").rename(folder / "__9_0.distcp"),
            "lacks __0_0.distcp, the part of a process",
        ),
        (lambda: (folder / ".metadata").write_bytes(b"\x80\x04"), "is damaged"),
        (lambda: (folder / ".metadata").unlink(), "no complete sharded checkpoint"),
        (lambda: (folder / "meta.pt").unlink(), "without `meta.pt`"),
    ):
        damage()
        assert main(["consolidate", str(folder)]) == 1
        assert message in capsys.readouterr().out
    assert not os.path.exists(f"{folder}.consolidated")
    assert main(["consolidate", str(tmp_path / "there")]) == 1
    assert "is no folder" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_folder_is_intact_only_with_what_goes_with_its_parts(tmp_path, capsys):
    folder = tmp_path / "sharded"
    dcp.save({"state_dict": {"weight": torch.arange(3.0)}}, checkpoint_id=str(folder))
    torch.save({"pytorch-lightning_version": "2.6.6"}, folder / "meta.pt")
    assert main(["verify", str(folder)]) == 0
    assert capsys.readouterr().out == f"intact  {folder}\n"
    (folder / "__0_0.distcp").rename(tmp_path / "part")
    assert main(["verify", str(folder)]) == 1
    lacking = f"BAD     {folder}: {folder} lacks `.metadata` or the `.distcp` files, so it is no complete sharded checkpoint.\n"
    assert capsys.readouterr().out == lacking
    (tmp_path / "part").rename(folder / "__0_0.distcp")
    (folder / ".metadata").rename(tmp_path / "index")
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out == lacking
    (tmp_path / "index").rename(folder / ".metadata")
    (folder / "meta.pt").write_bytes((folder / "meta.pt").read_bytes()[:-100])
    assert main(["verify", str(folder)]) == 1
    assert capsys.readouterr().out.startswith(f"BAD     {folder}: {folder}/meta.pt is damaged: ")


class Payload:
    def __reduce__(self):
        return os.system, ("touch was_here",)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("place", ["index", "value", "meta"])
def test_a_payload_is_refused_wherever_it_is(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sharded"
    value = Payload() if place == "value" else 1
    dcp.save({"model": {"weight": torch.ones(2)}, "value": value}, checkpoint_id=str(folder))
    atomic_save({"pytorch-lightning_version": "2.6.6", "x": Payload() if place == "meta" else 1}, folder / "meta.pt")
    if place == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(pickle.UnpicklingError, match="system"):
        consolidate(folder)
    assert not (tmp_path / "was_here").exists()
