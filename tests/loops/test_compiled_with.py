"""``Trainer(compile=...)`` together with what else a run may ask for: the numbers of the run that is not compiled."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from levin import Trainer
from levin.callbacks import StochasticWeightAveraging, WeightAveraging
from levin.precision import MixedPrecision
from tests.distributed import cuts_on_cpu, world_size
from tests.loops.test_compiled import CUTS, EAGER, IS_OLD, Model, assert_same, fit, graphs
from tests.strategies.small import QUIET, dataset, ordered_loader
from tests.strategies.test_fsdp import Deep


class Scheduled(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Following(Model):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val"}}


SCALED = {"scaled": True}


def with_scale(scaled=False, **flags):
    """Return ``flags`` with float16 and a loss scale, which ``precision="16-mixed"`` is only on a GPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    return {**flags, "plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if scaled else flags


def assert_no_breaks():
    assert graphs()
    assert not torch._dynamo.utils.counters["graph_break"]


@CUTS
@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (Model, SCALED),
        (Model, {**SCALED, "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}),
        (Model, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 3}),
        (Scheduled, {}),
        (Following, {}),
    ],
)
def test_compiled_training_is_the_same_training_with(module, flags):
    compiled = fit(module, compile=EAGER, **with_scale(**flags))
    assert_no_breaks()
    assert_same(compiled, fit(module, **with_scale(**flags)))


@CUTS
@pytest.mark.parametrize(
    "callback", [lambda: WeightAveraging(), lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1)]
)
def test_averages_of_weights_are_the_same(callback):
    compiled = fit(compile=EAGER, callbacks=[callback()], max_epochs=4)
    assert_no_breaks()
    assert_same(compiled, fit(callbacks=[callback()], max_epochs=4))


@CUTS
@pytest.mark.parametrize("saved_at", [3, 4])
def test_a_run_that_goes_on_within_a_window_goes_on_exactly(tmp_path, saved_at):
    flags = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, **SCALED}

    class Saving(Scheduled):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.trainer.fit_loop.total_batch_idx + 1 == saved_at:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, _ = fit(Scheduled, compile=EAGER, **with_scale(**flags))
    fit(Saving, compile=EAGER, **with_scale(**flags))
    resumed, _ = fit(Scheduled, compile=EAGER, ckpt_path=tmp_path / "middle.ckpt", **with_scale(**flags))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


class Split(Model):
    def train_dataloader(self):
        self.batch_size, self.size = 2, 20
        return ordered_loader(self)

    def training_step(self, batch, batch_idx):
        loss = self(batch[0]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True)
        self.log("one", 1.0, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", self(batch[0]).mean(), sync_dist=True)

    def val_dataloader(self):
        return DataLoader(dataset(8), batch_size=2)


def on_two(module, **flags):
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)  # as CUTS, in this process
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = module()
    trainer = Trainer(
        **{
            **QUIET,
            "devices": 2,
            "strategy": "ddp",
            "enable_checkpointing": False,
            "max_epochs": 2,
            **flags,
        }
    )
    trainer.fit(module)
    return module, trainer


ROUNDED = {"emulate_precision_casts": True}
CLIPPED = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}


@pytest.mark.parametrize(
    "flags",
    [
        {"precision": "bf16-mixed", **CLIPPED},
        pytest.param({}, marks=pytest.mark.slow),
        # Generated code rounds to bfloat16 where the step does.
        pytest.param({"precision": "bf16-mixed", "compile": {"options": ROUNDED}}, marks=pytest.mark.slow),
        pytest.param({"strategy": "ddp_find_unused_parameters_true"}, marks=pytest.mark.slow),
    ],
)
@world_size(2, connect=False, timeout_s=200)
def test_steps_of_two_processes_are_one_graph_each_and_the_same_training(flags):
    compiled = on_two(Split, **{"compile": EAGER, **flags})
    # DistributedDataParallel itself is no part of either.
    assert graphs() == 2, torch._dynamo.utils.counters["graph_break"]
    assert_same(compiled, on_two(Split, **{**flags, "compile": None}))


@cuts_on_cpu
@world_size(2, connect=False, timeout_s=200)
def test_blocks_of_a_sharded_module_train_the_same():
    compiled, _ = on_two(Deep, strategy="fsdp", compile=EAGER, **CLIPPED)
    assert IS_OLD or graphs() == 2  # as on one device: one for the first block, one for all others
    plain, _ = on_two(Deep, strategy="fsdp", **CLIPPED)
    torch.testing.assert_close(compiled.losses, plain.losses)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs.full_tensor())
