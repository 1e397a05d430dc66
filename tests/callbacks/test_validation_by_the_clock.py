"""With a duration as ``val_check_interval`` nobody knows at the end of an epoch whether its metric is there, or new."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.callbacks import EarlyStopping, ModelCheckpoint


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val", float(self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("interval", "steps"), [("00:01:00:00", []), ({"microseconds": 1}, [1, 2, 3, 4, 5, 6])], ids=["never", "each batch"]
)
def test_callbacks_wait_for_a_validation(tmp_path, interval, steps):
    saver = ModelCheckpoint(tmp_path, monitor="val", mode="max", save_top_k=-1, filename="{step}-{val:.0f}")
    plain = ModelCheckpoint(tmp_path, save_top_k=-1, filename="plain-{step}")
    trainer = Trainer(
        accelerator="cpu", max_epochs=3, val_check_interval=interval, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver, plain, EarlyStopping("val", mode="max", patience=5)],
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(torch.ones(4, 2), 2), DataLoader(torch.ones(2, 2), 2))
    assert trainer.global_step == 6
    expected = [name for step in steps for name in (f"step={step}-val={step}.ckpt", f"plain-step={step}.ckpt")]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == sorted(expected)
