"""How a batch reaches the user's code, and what a step that logs nothing may not do."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchmetrics
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer

SOURCE = str(Path(sys.modules["levin"].__file__).parent)


class Walker(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.frames: list[tuple[str, str]] = []

    def training_step(self, batch, batch_idx):
        frame, found = sys._getframe(1), []
        while frame is not None:
            if frame.f_code.co_filename.startswith(SOURCE):
                found.append((Path(frame.f_code.co_filename).name, frame.f_code.co_name))
            frame = frame.f_back
        self.frames = found
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, **flags):
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **flags,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(8, 4), batch_size=2))


def test_a_batch_takes_at_most_five_calls_in_three_files():
    module = Walker()
    fit(module)
    names = [name for _, name in module.frames]
    way = module.frames[: names.index("fit") + 1]
    assert len(way) <= 5, way
    assert len({file for file, _ in way}) <= 3, way


def test_a_step_that_logs_nothing_reads_nothing_from_the_device():
    reads = {"item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"}

    class Count(torch.overrides.TorchFunctionMode):
        number = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.number += getattr(func, "__name__", "") in reads
            return func(*args, **(kwargs or {}))

    counts = []
    for batches in (2, 4):
        with Count() as count:
            fit(Walker(), limit_train_batches=batches)
        counts.append(count.number)
    # What is read belongs to the epoch (a loader draws its seed), not to the steps.
    assert counts[0] == counts[1]


def test_metrics_are_looked_for_among_the_layers_once_however_many_they_are():
    walks = []
    for number in (1, 20):

        class Measured(LightningModule):
            def __init__(self, number=number):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
                self.metrics = torch.nn.ModuleList([torchmetrics.MeanMetric() for _ in range(number)])
                self.walks = 0

            def named_modules(self, *args, **kwargs):
                self.walks += 1
                return super().named_modules(*args, **kwargs)

            def training_step(self, batch, batch_idx):
                for index, metric in enumerate(self.metrics):
                    metric.update(1.0)
                    self.log(f"metric {index}", metric)
                return self.layer(batch).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        module = Measured()
        fit(module)
        walks.append(module.walks)
    assert walks[0] == walks[1]
