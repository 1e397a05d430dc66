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


def test_batches_that_a_module_keeps_for_a_while_are_not_written_over_by_later_ones():
    batches = [torch.full((2**20, 8), float(i)).pin_memory() for i in range(4)]

    class Keeping(Net):
        def __init__(self) -> None:
            super().__init__()
            self.kept = {}

        def training_step(self, batch, batch_idx):
            self.kept[batch_idx] = batch
            torch.cuda._sleep(10_000_000)
            if batch_idx >= 3:
                self.losses.append((self.kept.pop(batch_idx - 3) != (batch_idx - 3) % 4).any())
            return self.net(batch[:4]).square().mean() * 0

    module = Keeping()
    trainer().fit(module, ready([batches[i % 4] for i in range(40)]))
    assert len(module.losses) == 37
    assert not torch.stack(module.losses).any()


def test_a_host_that_is_far_ahead_of_the_device_does_not_fill_it_with_batches():
    batch = torch.zeros(2**22, 8).pin_memory()

    class Slow(Net):
        def training_step(self, batch, batch_idx):
            torch.cuda._sleep(10_000_000)
            return self.net(batch[:4]).square().mean()

    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    trainer().fit(Slow(), ready([batch] * 40))
    assert torch.cuda.max_memory_allocated() - start < 3.1 * batch.nbytes


def test_a_large_batch_is_copied_while_the_device_computes():
    batch = torch.zeros(2**25).pin_memory()

    class Timed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.starts = [torch.cuda.Event(enable_timing=True) for _ in range(21)]

        def training_step(self, batch, batch_idx):
            self.starts[batch_idx].record()
            torch.cuda._sleep(10_000_000)
            return self.net(batch[:32].view(4, 8)).square().mean()

    def copy_ms() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        batch.to(DEVICE, non_blocking=True)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    module = Timed()
    trainer().fit(module, ready([batch] * 21))
    here = Timed()
    trainer().fit(here, ready([batch.to(DEVICE)] * 21))
    torch.cuda.synchronize()
    moved_ms, here_ms = (m.starts[5].elapsed_time(m.starts[20]) / 15 for m in (module, here))
    copy_ms()
    assert moved_ms < here_ms + 0.3 * copy_ms()


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
            self.places = self.look()

        def on_train_end(self):
            self.places_after = self.look()

        def look(self):
            return {name: value.device.type for name, value in self.trainer.callback_metrics.items()}

    module = Looking()
    runner = trainer()
    runner.fit(module, loader(), loader(8))
    assert module.places["loss"] == module.places["both"] == "cuda"
    assert module.places_after["val_loss"] == "cuda"
    assert runner.callback_metrics["val_loss"].device.type == "cpu"
    assert runner.callback_metrics["both"].item() == pytest.approx(torch.stack(module.losses).mean().item())
