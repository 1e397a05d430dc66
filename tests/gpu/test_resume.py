"""Seeds and exact resume on a CUDA device, and checkpoints written in the background."""

from __future__ import annotations

import threading

import pytest
import torch

from levin import Callback, seed_everything
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO, load
from levin.checkpoint.staging import Stager
from tests.gpu.small import DEVICE, Net, Numbers, SaveAt, Validated, loader, tensors, trainer, values

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def noisy_loader(num_workers: int) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(
        Numbers(40, is_noisy=True), batch_size=4, shuffle=True, num_workers=num_workers, pin_memory=True
    )


def run(num_workers: int, precision: str, accumulate: int, seed: int = 1, resume=None, callbacks=()) -> Net:
    seed_everything(seed)
    module = Net()
    if resume is not None:
        seed_everything(seed + 100)  # what a resumed run brings along must not count
        torch.rand(3, device=DEVICE)
    trainer(
        max_epochs=2, precision=precision, accumulate_grad_batches=accumulate, callbacks=list(callbacks),
        gradient_clip_val=1.0,
    ).fit(module, noisy_loader(num_workers), ckpt_path=resume)  # fmt: skip
    return module


@pytest.mark.parametrize(
    ("num_workers", "precision", "accumulate", "at"),
    [
        (0, "32-true", 1, 3),
        (2, "16-mixed", 1, 7),
        (2, "bf16-mixed", 3, 14),
        (0, "bf16-true", 1, 10),
    ],
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, num_workers, precision, accumulate, at):
    path = tmp_path / "a.ckpt"
    unbroken = run(num_workers, precision, accumulate, callbacks=[SaveAt(at, path)])
    resumed = run(num_workers, precision, accumulate, resume=path)
    assert values(resumed) == values(unbroken)[at:]
    assert len(resumed.losses) == 20 - at
    for ours, theirs in zip(resumed.parameters(), unbroken.parameters()):
        assert torch.equal(ours, theirs)


def test_one_seed_gives_one_run_and_another_seed_another():
    first, again, other = (values(run(0, "32-true", 1, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_generator_of_the_device_is_in_the_checkpoint(tmp_path):
    runner = trainer()
    runner.fit(Net(), noisy_loader(0))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    expected = torch.cuda.get_rng_state(0)
    found = [t for t in tensors(load(tmp_path / "a.ckpt")) if t.dtype == torch.uint8 and t.numel() == len(expected)]
    assert found


def test_tensors_of_a_checkpoint_say_their_device_and_load_without_one(tmp_path):
    runner = trainer()
    runner.fit(Net(), noisy_loader(0))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    loaded = torch.load(tmp_path / "a.ckpt", map_location="cpu", weights_only=False)
    assert {tensor.device.type for tensor in tensors(loaded)} == {"cpu"}
    module = Net.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu")
    assert module.device.type == "cpu"
    for ours, theirs in zip(module.parameters(), runner.lightning_module.parameters()):
        assert torch.equal(ours, theirs.cpu())


def test_a_background_checkpoint_is_that_of_its_moment_though_training_goes_on(tmp_path, monkeypatch):
    opened = threading.Event()
    write = AsyncCheckpointIO._write

    def gated(checkpoint_io, snapshot, path, storage_options):
        assert opened.wait(20)
        write(checkpoint_io, snapshot, path, storage_options)

    monkeypatch.setattr(AsyncCheckpointIO, "_write", gated)

    class Moment(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.weights = [p.detach().clone() for p in pl_module.parameters()]
                trainer.save_checkpoint(tmp_path / "a.ckpt")
            if batch_idx == 6:
                opened.set()

    moment = Moment()
    runner = trainer(callbacks=moment, plugins=AsyncCheckpointIO())
    module = Net(width=8, hidden=2**16)
    runner.fit(module, noisy_loader(0))
    saved = load(tmp_path / "a.ckpt")["state_dict"].values()
    for ours, theirs, last in zip(saved, moment.weights, module.parameters()):
        assert torch.equal(ours.cpu(), theirs.cpu())
        assert not torch.equal(ours.cpu(), last.cpu())


def test_a_snapshot_is_taken_into_pinned_memory_without_waiting_for_the_device():
    weight = torch.ones(2**24, device=DEVICE)
    stager = Stager()
    stager.stage({"weight": weight}).realize()  # takes the memory
    assert stager._block.is_pinned
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    torch.cuda._sleep(200_000_000)
    snapshot = stager.stage({"weight": weight})
    weight.add_(1)
    torch.cuda.set_sync_debug_mode("default")
    assert not snapshot.events[0].query()
    assert snapshot.realize()["weight"].unique().tolist() == [1.0]
    stager.release()


def test_checkpoints_of_each_epoch_are_found_and_hold_the_weights(tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2, save_last=True)
    runner = trainer(max_epochs=3, callbacks=checkpoints, enable_checkpointing=True)
    runner.fit(Validated(), noisy_loader(0), loader())
    best = load(checkpoints.best_model_path)
    assert float(checkpoints.best_model_score) == pytest.approx(
        best["callbacks"][checkpoints.state_key]["current_score"].item()
    )
    assert (tmp_path / "last.ckpt").exists()
