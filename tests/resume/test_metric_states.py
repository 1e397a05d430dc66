"""A metric that is loaded goes on as the one that was saved."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric

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
