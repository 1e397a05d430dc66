"""A metric that is loaded goes on as the one that was saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric

from levin import Callback, Trainer
from levin.demos.boring_classes import BoringModel
from levin.resume.metric_states import collect_metric_states, load_metric_states


class MeanOfBatches(Metric):
    """Its state is averaged over the updates, which takes their number."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")

    def update(self, value):
        self.value = value

    def compute(self):
        return self.value


METRICS = {
    "averaged": MeanOfBatches,
    "mean": MeanMetric,
    "collection": lambda: MetricCollection({"sum": SumMetric(), "mean": MeanMetric()}),
}


def plain(value):
    return {name: float(item) for name, item in value.items()} if isinstance(value, dict) else float(value)


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_goes_on_where_it_was(kind):
    values = torch.tensor([3.0, 5.0, 10.0, 1.0])
    saved, again = (nn.ModuleDict({"metric": METRICS[kind]()}) for _ in range(2))
    for value in values[:3]:
        saved["metric"](value)
    # As a file would hold them.
    states = {name: {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
              for name, state in collect_metric_states(saved).items()}  # fmt: skip
    load_metric_states(again, states)
    assert plain(again["metric"].compute()) == plain(saved["metric"].compute())
    for module in (saved, again):
        module["metric"](values[3])
    assert plain(again["metric"].compute()) == plain(saved["metric"].compute())
    assert kind != "averaged" or plain(again["metric"].compute()) == float(values.mean())


def test_the_value_of_the_last_batch_is_kept():
    saved, again = (nn.ModuleDict({"metric": MeanMetric()}) for _ in range(2))
    saved["metric"](torch.tensor(7.0))
    load_metric_states(again, collect_metric_states(saved))
    assert again["metric"]._forward_cache == saved["metric"]._forward_cache == 7.0


class Validated(BoringModel):
    """Whose metric is another number in each epoch."""

    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()

    def validation_step(self, batch, batch_idx):
        self.mean(torch.tensor(float(self.current_epoch)))
        self.log("mean", self.mean)


class Values(Callback):
    def __init__(self, path):
        self.values, self.path = {}, path

    def on_validation_end(self, trainer, pl_module):
        self.values[trainer.current_epoch] = float(trainer.callback_metrics["mean"])
        if not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_a_validation_after_a_restart_counts_nothing_of_the_one_that_was_saved(tmp_path):
    def fit(path=None):
        values = Values(tmp_path / "saved.ckpt")
        Trainer(
            accelerator="cpu", devices=1, max_epochs=3, limit_train_batches=1, limit_val_batches=2, logger=False,
            callbacks=[values], enable_checkpointing=False, num_sanity_val_steps=0, enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(Validated(), ckpt_path=path)  # fmt: skip
        return values.values

    assert fit() == {0: 0.0, 1: 1.0, 2: 2.0}
    resumed = fit(tmp_path / "saved.ckpt")
    assert {epoch: resumed[epoch] for epoch in (1, 2)} == {1: 1.0, 2: 2.0}
