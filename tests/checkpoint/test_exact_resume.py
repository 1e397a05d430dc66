"""Wherever a run of whatever kind is stopped, the run that goes on from its checkpoint is the unbroken one, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from torch.utils.data import DataLoader

from levin import LightningModule, Trainer
from levin.precision import MixedPrecision
from tests.checkpoint.exact_runs import MOMENTS, Setup, check, differences
from tests.data.loaders_for_tests import RESUMABLE, Config

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def examples(number: int, derandomize: bool = True) -> settings:
    return settings(
        max_examples=number, deadline=None, derandomize=derandomize, database=None,
        phases=(Phase.explicit, Phase.generate), suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )  # fmt: skip


in_process = st.builds(
    Config,
    sampler=st.sampled_from(sorted(set(RESUMABLE) - {"no_batches"})),
    sources=st.sampled_from(["", "tpn", "ogl", "tpnogl"]),
    batch_size=st.integers(2, 5),
    collates=st.booleans(),
)
in_workers = st.builds(
    Config,
    sampler=st.sampled_from(["sequential", "shuffle", "eager_python", "in_place", "buckets"]),
    sources=st.sampled_from(["tpn", "tpnogl"]),
    batch_size=st.integers(2, 5),
    num_workers=st.integers(1, 2),
    persistent=st.booleans(),
    prefetch=st.integers(1, 2),
    inits=st.booleans(),
)


def setups(train, kinds, vals):
    return st.builds(
        Setup,
        train=train,
        kind=st.sampled_from(kinds),
        mode=st.sampled_from(["", "", "min_size", "max_size", "max_size_cycle"]),
        val=st.sampled_from(vals),
        batches=st.none() | st.integers(1, 7),
        val_batches=st.integers(1, 3),
        optimization=st.sampled_from(["automatic", "automatic", "overridden", "manual"]),
        accumulate=st.integers(1, 3),
        weighted=st.booleans(),
        clip=st.sampled_from([None, 0.5]),
        scheduler=st.sampled_from(["step", "epoch", "plateau step", "plateau epoch", "none"]),
        val_interval=st.sampled_from([1.0, 1.0, 1, 2]),
        every_n_epochs=st.sampled_from([1, 1, 2]),
        reload=st.integers(0, 2),
        hooks=st.booleans(),
        keeps=st.booleans(),
        stops_early=st.booleans(),
        log_every=st.sampled_from([1, 1, 3]),
        sanity=st.integers(0, 2),
    )


stops = st.tuples(st.sampled_from(MOMENTS), st.integers(1, 8))


def valid(setup: Setup) -> Setup:
    """Leave out what the Trainer refuses."""
    from dataclasses import replace

    if setup.optimization == "manual":
        setup = replace(setup, accumulate=1, clip=None)
    if setup.val_interval != 1.0 and (setup.batches or 0) < setup.val_interval:
        setup = replace(setup, val_interval=1.0)
    if setup.kind in ("stream", "blind stream") and setup.mode:
        setup = replace(setup, mode="max_size_cycle")
    return setup


def checked(setup: Setup, stop: tuple[str, int], is_last: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assume(check(valid(setup), Path(folder), *stop, is_last))


ALL_KINDS = ["plain", "plain", "plain", "stateful", "stream", "blind stream", "list"]


@examples(30)
@given(setups(in_process, ALL_KINDS, ["plain", "own", "two"]), stops, st.booleans())
def test_a_resumed_run_is_the_unbroken_one(setup, stop, is_last):
    checked(setup, stop, is_last)


@examples(4)
@given(setups(in_workers, ["plain", "plain", "stateful", "stream"], ["plain", "workers"]), stops, st.booleans())
def test_a_resumed_run_with_workers_is_the_unbroken_one(setup, stop, is_last):
    checked(setup, stop, is_last)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(1500, derandomize=False)
@given(setups(in_process, ALL_KINDS, ["plain", "own", "two"]), stops, st.booleans())
def test_many_resumed_runs_are_the_unbroken_ones(setup, stop, is_last):
    checked(setup, stop, is_last)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@examples(150, derandomize=False)
@given(setups(in_workers, ["plain", "plain", "stateful", "stream"], ["plain", "workers"]), stops, st.booleans())
def test_many_resumed_runs_with_workers_are_the_unbroken_ones(setup, stop, is_last):
    checked(setup, stop, is_last)


def test_the_loss_scale_goes_on_where_it_was(tmp_path):
    def run(path=None, ckpt_path=None):
        torch.manual_seed(3)
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3))
        module = torch.nn.Linear(2, 1)

        class Model(LightningModule):
            def __init__(self):
                super().__init__()
                self.net = module

            def training_step(self, batch, batch_idx):
                if path is not None and self.trainer.global_step == 5 and batch_idx == 5:
                    self.trainer.save_checkpoint(path)
                return self.net(batch).pow(2).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, plugins=[precision],
        )  # fmt: skip
        data = DataLoader(torch.randn(10, 2, generator=torch.Generator().manual_seed(1)), batch_size=1)
        trainer.fit(Model(), data, ckpt_path=ckpt_path)
        return module.state_dict(), precision.state_dict()

    path = tmp_path / "scaled.ckpt"
    unbroken = run(path)
    assert unbroken[1]["scale"] == 64.0
    resumed = run(ckpt_path=path)
    assert not (lines := differences(unbroken, resumed)), lines
