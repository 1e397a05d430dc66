"""Strategies on one CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from levin.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from levin.utilities.exceptions import MisconfigurationException
from levin.utilities.process_group import disconnect_processes
from tests.gpu.small import DEVICE, Net, SaveAt, Validated, loader, trainer, values


def test_ddp_of_one_process_talks_over_nccl_and_trains_as_the_plain_run():
    backends = []

    class Looking(Validated):
        def on_train_start(self):
            backends.append(dist.get_backend())

    runs = []
    for strategy in ("auto", DDPStrategy()):
        torch.manual_seed(0)
        module = (Validated if strategy == "auto" else Looking)(dropout=0.0)
        # The sampler of several processes would shuffle, as in Lightning.
        runner = trainer(strategy=strategy, max_epochs=2, use_distributed_sampler=False)
        runner.fit(module, loader(), loader(8))
        runs.append((values(module), runner.callback_metrics["val_loss"].item()))
    assert backends == ["nccl"]
    assert runs[0] == runs[1]


@pytest.fixture(autouse=True)
def no_process_group():
    yield
    disconnect_processes()


def transport():
    """Return what carries CUDA tensors between processes."""
    return dict(part.split(":") for part in dist.get_backend_config().split(","))["cuda"]


class Noting(Validated):
    """Notes the transport and the kinds of its parameters."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = []

    def on_train_start(self):
        if dist.is_initialized():
            self.seen.append((transport(), {type(p).__name__ for p in self.parameters()}))


SHARDED = {
    "fsdp": lambda: FSDPStrategy(),
    "folder": lambda: FSDPStrategy(state_dict_type="sharded"),
    "offload": lambda: FSDPStrategy(cpu_offload=True),
    "plan": lambda: ModelParallelStrategy(plan={"net.0": "column", "net.3": "row"}),
}


@pytest.mark.parametrize("kind", SHARDED)
def test_sharding_over_one_process_talks_over_nccl_trains_as_the_plain_run_and_resumes(kind, tmp_path):
    def run(strategy, path=None, **kwargs):
        torch.manual_seed(0)
        module = Noting(dropout=0.0)
        runner = trainer(
            strategy=strategy, max_epochs=2, use_distributed_sampler=False, gradient_clip_val=0.5,
            accumulate_grad_batches=2, **kwargs,
        )  # fmt: skip
        runner.fit(module, loader(), loader(8), ckpt_path=path)
        return module.seen, [*values(module), runner.callback_metrics["val_loss"].item()]

    _, plain = run("auto")
    seen, sharded = run(SHARDED[kind](), callbacks=SaveAt(5, tmp_path / "a.ckpt"))
    assert seen == [("nccl", {"DTensor"})]
    assert sharded == pytest.approx(plain, rel=1e-4)
    _, resumed = run(SHARDED[kind](), tmp_path / "a.ckpt")
    assert resumed == sharded[5:]
    if kind != "folder":
        # A file holds the weights whole, for a run on one device.
        _, on_one = run("auto", tmp_path / "a.ckpt")
        assert on_one == pytest.approx(sharded[5:], rel=1e-4)


def test_fsdp_runs_in_the_process_group_of_ddp():
    trainer(strategy=DDPStrategy()).fit(Net(), loader())
    trainer(strategy="fsdp").fit(Net(), loader())
    assert dist.get_backend() == "nccl"


def test_weights_on_the_cpu_are_told_that_nothing_carries_them():
    trainer(strategy=DDPStrategy()).fit(Net(), loader())
    with pytest.raises(MisconfigurationException, match="process_group_backend"):
        trainer(strategy=FSDPStrategy(cpu_offload=True)).fit(Net(), loader())


def test_ddp_of_one_process_resumes_exactly(tmp_path):
    def run(path=None, **kwargs):
        torch.manual_seed(0)
        module = Net()
        trainer(strategy=DDPStrategy(), max_epochs=2, **kwargs).fit(module, loader(shuffle=True), ckpt_path=path)
        return module

    unbroken = run(callbacks=SaveAt(5, tmp_path / "a.ckpt"))
    resumed = run(tmp_path / "a.ckpt")
    assert values(resumed) == values(unbroken)[5:]


def test_evaluation_and_prediction_run_on_the_device():
    class Predicting(Validated):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.places = set()

        def predict_step(self, batch, batch_idx):
            self.places.add(batch.device)
            return self.net(batch)

        test_step = Validated.validation_step

    module, runner = Predicting(dropout=0.0), trainer()
    (result,) = runner.validate(module, loader(), verbose=False)
    assert result["val_loss"] > 0
    (tested,) = runner.test(module, loader(), verbose=False)
    assert tested["val_loss"] == pytest.approx(result["val_loss"])
    predictions = runner.predict(module, loader())
    assert len(predictions) == 8
    assert predictions[0].device.type == "cpu"
    assert module.places == {DEVICE}
