"""A module's forward outside the loops: its train and eval modes, its input, its number format."""

from __future__ import annotations

import torch
from torch import nn

import levin
from levin.utilities.modes import eval_mode, forward_of_example, kept_modes


class Counts(nn.Linear):
    """A layer that has a part of ``train`` of its own."""

    num_calls = 0

    def train(self, mode=True):
        self.num_calls += 1
        return super().train(mode)


def test_every_submodule_gets_its_own_mode_back():
    for layer in (nn.Linear(1, 1), Counts(1, 1)):
        module = nn.Sequential(layer, nn.Dropout(), nn.Sequential(nn.Dropout()))
        module[1].eval()
        before = [child.training for child in module.modules()]
        with eval_mode(module):
            assert not any(child.training for child in module.modules())
            assert getattr(layer, "num_calls", 1) == 1
        assert [child.training for child in module.modules()] == before
        with kept_modes(module):
            assert [child.training for child in module.modules()] == before
            module.train()
        assert [child.training for child in module.modules()] == before


def test_an_example_goes_through_the_model_as_its_batches_do():
    class Net(levin.LightningModule):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch * 2

    net, plain = Net(), nn.Linear(1, 1, device="meta")
    net._trainer = levin.Trainer(accelerator="cpu", precision="64-true", logger=False)
    with forward_of_example(net, torch.ones(1)) as example:
        assert example.tolist() == [4.0] and example.dtype == torch.float64 and not torch.is_grad_enabled()
    with forward_of_example(plain, [torch.ones(1), "a"]) as example:
        assert example[0].device.type == "meta" and example[1] == "a" and example[0].dtype == torch.float32
    with forward_of_example(nn.Identity(), "a") as example:
        assert example == "a"
