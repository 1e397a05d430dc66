"""How batches come to the device."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.small import DEVICE, Net, Validated, loader, ready, trainer


class Keeping(Net):
    """Keeps the batches of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kwargs", [{}, {"pin_memory": True}, {"num_workers": 2, "pin_memory": True}], ids=str)
def test_batches_are_on_the_device_and_whole(kwargs):
    module, data = Keeping(), loader(**kwargs)
    trainer().fit(module, data)
    expected = list(loader())
    assert len(module.batches) == len(expected)
    for ours, theirs in zip(module.batches, expected):
        assert ours.device == DEVICE
        assert torch.equal(ours.cpu(), theirs)


def test_a_large_batch_from_pinned_memory_is_whole_when_the_step_reads_it():
    batches = [torch.full((2**22, 8), float(i)).pin_memory() for i in range(6)]

    class Checking(Net):
        def training_step(self, batch, batch_idx):
            self.losses.append((batch != batch_idx).any())
            return self.net(batch[:4]).square().mean() * 0

    module = Checking()
    trainer().fit(module, ready(batches))
    assert not torch.stack(module.losses).any()


def test_a_batch_that_the_loader_fills_again_is_not_changed_under_a_step_that_runs():
    class Reusing:
        def __init__(self) -> None:
            self.buffer = torch.empty(2**22, 8)

        def __len__(self):
            return 6

        def __iter__(self):
            for i in range(6):
                yield self.buffer.fill_(i)

    class Checking(Net):
        def training_step(self, batch, batch_idx):
            self.losses.append((batch != batch_idx).any())
            return self.net(batch[:4]).square().mean() * 0

    module = Checking()
    trainer().fit(module, Reusing())
    assert not torch.stack(module.losses).any()


def test_the_users_transfer_hooks_run_in_order_with_the_device():
    calls = []

    class Hooked(Net):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            calls.append(("before", str(batch.device)))
            return batch + 1

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            calls.append(("transfer", str(device)))
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            calls.append(("after", str(batch.device)))
            return batch * 2

        def training_step(self, batch, batch_idx):
            calls.append(("step", batch_idx))
            return super().training_step(batch, batch_idx)

    trainer(limit_train_batches=2).fit(Hooked(), loader())
    assert [call for call in calls if call[0] != "step"] == [
        ("before", "cpu"), ("transfer", "cuda:0"), ("after", "cuda:0"),
    ] * 2  # fmt: skip
    assert [call for call in calls if call[0] == "step"] == [("step", 0), ("step", 1)]


def test_nested_batches_and_objects_that_move_by_themselves():
    class Own:
        def __init__(self, data):
            self.data = data

        def to(self, device, non_blocking=False):
            return Own(self.data.to(device))

    seen = []

    class Nested(Net):
        def training_step(self, batch, batch_idx):
            seen.append((batch["x"][0].device, batch["own"].data.device, batch["name"]))
            return self.net(batch["x"][0]).square().mean()

    data = [{"x": [torch.randn(4, 8)], "own": Own(torch.zeros(1)), "name": "a"}] * 2
    trainer().fit(Nested(), ready(data))
    assert seen == [(DEVICE, DEVICE, "a")] * 2


def test_logged_values_stay_on_the_device():
    class Looking(Validated):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.places = {name: value.device.type for name, value in self.trainer.callback_metrics.items()}

    module = Looking()
    runner = trainer()
    runner.fit(module, loader(), loader(8))
    assert module.places["loss"] == module.places["both"] == "cuda"
    assert {name: value.device.type for name, value in runner.callback_metrics.items()}["val_loss"] == "cuda"
    assert runner.callback_metrics["both"] == pytest.approx(torch.stack(module.losses).mean().item())
