"""Strategies on one CUDA device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from levin.strategies import DDPStrategy
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


def test_fsdp_of_one_process_talks_over_nccl_and_trains_as_the_plain_run(tmp_path):
    seen = []

    class Looking(Validated):
        def on_train_start(self):
            seen.append((dist.get_backend(), {type(p).__name__ for p in self.parameters()}))

    runs = []
    for strategy in ("auto", "fsdp"):
        torch.manual_seed(0)
        module = (Validated if strategy == "auto" else Looking)(dropout=0.0)
        runner = trainer(
            strategy=strategy, max_epochs=2, use_distributed_sampler=False,
            callbacks=SaveAt(8, tmp_path / f"{strategy}.ckpt"),
        )  # fmt: skip
        runner.fit(module, loader(), loader(8))
        runs.append([*values(module), runner.callback_metrics["val_loss"].item()])
    assert seen == [("nccl", {"DTensor"})]
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)
    assert (tmp_path / "fsdp.ckpt").exists()


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
