"""An error that says that the memory of a device is full also says what holds it."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.loops.out_of_memory import MemoryUse, _num_bytes, explain


class Greedy(LightningModule):
    """Fails in its third step; 256 MiB of parameters stand for a large model."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.weight = torch.nn.Parameter(torch.zeros(2**26))

    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            raise self.error
        return self.weight[:4].sum() * batch.sum()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fail_with(error: BaseException) -> str:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(type(error)) as raised:
        trainer.fit(Greedy(error), DataLoader(torch.ones(4)))
    assert raised.value is error
    return str(error)


def test_out_of_memory_says_what_holds_the_memory_and_what_helps():
    told = fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert told.startswith("CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    assert "parameters hold 0.25 GiB, gradients 0.25 GiB, optimizer states 0.50 GiB and the batch 0.00 GiB; " in told
    assert "and the batch 0.00 GiB; its peak was not measured. What frees memory:\n" in told
    assert "do not fit, of what activations hold: all but one sample's.\n" in told
    assert "'bf16-true'), of parameters, gradients and states: 0.50 GiB" in told
    assert "accumulate_grad_batches" in told
    assert "bf16-mixed" in told


def test_another_error_is_left_as_it_is():
    assert fail_with(RuntimeError("mine")) == "mine"


def test_sizes_are_told_in_gibibytes():
    told = explain(MemoryUse(3 * 2**29, 0, 2**30, 2**29, 2**36, 2**37))
    assert "parameters hold 1.50 GiB" in told
    assert "used 64.00 GiB" in told
    assert "reserved 128.00 GiB" in told
    assert "the batch 0.50 GiB" in told
    assert "of 61.00 GiB for activations: up to half" in told
    assert "'fsdp', devices=2), of parameters, gradients and states: 1.25 GiB" in told


def test_only_what_is_on_the_device_and_of_a_spread_tensor_the_part_that_is_here_counts():
    class Spread(torch.Tensor):
        def to_local(self):
            return torch.zeros(2)

    values = [torch.zeros(3), torch.zeros(50, device="meta"), torch.zeros(100).as_subclass(Spread), "text", None]
    assert _num_bytes(values, torch.device("cpu")) == (3 + 2) * 4
