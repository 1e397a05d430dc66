"""Errors of the device say where they come from and what helps; the next run is not hurt by them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from levin import LightningModule
from tests.gpu.small import DEVICE, Net, loader, ready, trainer

ROOT = Path(__file__).parents[2]


def test_out_of_memory_says_what_holds_the_memory_and_the_next_fit_works():
    class Greedy(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                self.kept = torch.empty(2**42, dtype=torch.uint8, device=self.device)
            return super().training_step(batch, batch_idx)

    with pytest.raises(torch.cuda.OutOfMemoryError) as raised:
        trainer().fit(Greedy(), loader())
    told = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    for word in ("parameters", "gradients", "optimizer", "accumulate_grad_batches", "bf16"):
        assert word in told
    module = Net()
    trainer().fit(module, loader())
    assert len(module.losses) == 8


class Deep(LightningModule):
    """Whose activations take far more memory than its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[part for _ in range(16) for part in (nn.Linear(512, 512), nn.ReLU())])

    def training_step(self, batch, batch_idx):
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_batch_that_does_not_fit_goes_through_in_parts_and_the_weights_are_those_of_the_whole(caplog):
    batches = [torch.randn(16384, 512) for _ in range(3)]

    def run(**kwargs) -> tuple[list[torch.Tensor], float, int]:
        torch.manual_seed(0)
        module, runner = Deep(), trainer(**kwargs)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        runner.fit(module, ready(batches))
        return list(module.parameters()), runner.callback_metrics["loss"].item(), torch.cuda.max_memory_allocated()

    weights, loss, peak = run()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            run()
        with caplog.at_level("INFO"):
            in_parts, loss_in_parts, peak_in_parts = run(accumulate_grad_batches="auto")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "16384 samples do not fit into memory. Batches go through in parts of 8192 now." in caplog.text
    assert peak_in_parts < 0.6 * peak
    assert loss_in_parts == pytest.approx(loss)
    for part, whole in zip(in_parts, weights):
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5)


def test_a_batch_left_on_another_device_raises_at_its_step():
    class Left(Net):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    with pytest.raises(RuntimeError, match="same device"):
        trainer().fit(Left(), loader())


ASSERTING = """
import torch
from tests.gpu.small import Net, loader, trainer

class Wrong(Net):
    def training_step(self, batch, batch_idx):
        index = torch.full((4,), 100 if batch_idx == 2 else 0, device=self.device)
        return super().training_step(batch[:, torch.zeros(8, dtype=torch.long, device=self.device)], batch_idx) + batch[index].sum()

trainer(callbacks=[]).fit(Wrong(), loader())
torch.cuda.synchronize()
"""


def test_a_failed_assertion_on_the_device_ends_the_process_with_its_message():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(
        [sys.executable, "-c", ASSERTING], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


def test_modules_on_the_device_come_back_whole_after_an_error():
    class Failing(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("mine")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(KeyError, match="mine"):
        trainer().fit(module, loader())
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert DEVICE.type == "cuda"
