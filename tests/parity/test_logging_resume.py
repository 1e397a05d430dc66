"""Logged values of a run that was interrupted: from any step on they are those of the run that was not."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.parity import both
from tests.parity.logged import Halves, batches, observe

SIZES = (2, 3, 1, 2, 2)


def module_of(framework: SimpleNamespace) -> Any:
    class Model(framework.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 2)
            self.halves, self.rare = Halves(), Halves()

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).pow(2).mean()
            for reduce_fx in ("mean", "sum", "min", "max"):
                self.log(reduce_fx, loss, on_step=True, on_epoch=True, reduce_fx=reduce_fx, prog_bar=True)
            self.halves(batch[0])
            self.log("halves", self.halves, on_step=True, on_epoch=True)
            if batch_idx % 2 == 0:
                self.rare.update(batch[0])
                self.log("rare", self.rare, on_step=False, on_epoch=True)
            return loss

        def on_train_epoch_start(self):
            self.log("started", float(self.current_epoch))

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch[0]).mean(), on_step=True, on_epoch=True)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Model()


def fit(
    framework: SimpleNamespace, folder: Path, ckpt_path: Any = None, saves: str = "step", **flags: Any
) -> tuple[list[Any], Any]:
    if framework.name == "lightning":
        from lightning.pytorch.callbacks import ModelCheckpoint
    else:
        from levin.callbacks import ModelCheckpoint
    lines = both.Lines()
    how: dict[str, Any] = {"every_n_train_steps": 1} if saves == "step" else {"save_on_train_epoch_end": True}
    saving = [ModelCheckpoint(folder / "at", filename="{step}", save_top_k=-1, **how)] if saves else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = both.quiet(
            framework, folder, max_epochs=2, logger=both.recording_logger(framework, lines), log_every_n_steps=1,
            callbacks=saving, enable_checkpointing=bool(saves), num_sanity_val_steps=0, **flags,
        )  # fmt: skip
        trainer.fit(module_of(framework), batches(SIZES), batches((2, 1), seed=7), ckpt_path=ckpt_path)
    return [line for line in lines if isinstance(line[1], dict) and "finalize" not in line], observe(trainer)


@pytest.mark.parametrize("flags", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_from_any_step_on_the_same_values_are_logged(tmp_path, flags):
    whole, end = fit(both.levin(), tmp_path, **flags)
    trained = [step for step, values in whole if "mean_step" in values]
    for step in range(1, max(trained) + 1):
        lines, metrics = fit(both.levin(), tmp_path, tmp_path / "at" / f"step={step}.ckpt", saves="", **flags)
        rest = [line for line in lines if "mean_step" in line[1] or "mean_epoch" in line[1]]
        expected = [line for line in whole if "mean_step" in line[1] or "mean_epoch" in line[1]]
        assert rest == expected[len(expected) - len(rest) :], step
        assert rest[0][0] in (step - 1, step)
        assert metrics == end, step


def test_at_the_end_of_an_epoch_both_go_on_alike(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        folder = tmp_path / framework.name
        fit(framework, folder, saves="epoch")
        results.append(fit(framework, folder, folder / "at" / "step=5.ckpt", saves=""))
    (their_lines, their_end), (our_lines, our_end) = results
    assert [line for line in our_lines if "mean_step" in line[1]] == [
        line for line in their_lines if "mean_step" in line[1]
    ]
    assert our_end == their_end


def test_within_an_epoch_the_values_of_its_first_part_count(tmp_path):
    """Differs on purpose (mid-epoch resume): Lightning's epoch values lack the batches before the interruption."""
    wholes, resumed = [], []
    for framework in (both.lightning(), both.levin()):
        folder = tmp_path / framework.name
        wholes.append(fit(framework, folder)[0])
        resumed.append(fit(framework, folder, folder / "at" / "step=3.ckpt", saves="")[0])
    sums = [next(values["sum_epoch"] for _, values in lines if "sum_epoch" in values) for lines in (*wholes, *resumed)]
    assert sums[0] == sums[1] == sums[3]
    assert sums[2] < sums[3]
