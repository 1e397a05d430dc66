"""Ray Train and Ray Tune with Ray's own integration for Lightning, which gets levin through the alias."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import levin.compat
from levin import Trainer
from levin.checkpoint.zero import convert_zero_checkpoint_to_fp32_state_dict
from tests.strategies.small import QUIET, Small

ray = pytest.importorskip("ray")

# What Ray warns of is no matter of ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    levin.compat.install()  # For this process, and for the workers that Ray starts.
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "src"), str(ROOT)])
    ray.init(
        num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


def train(config: dict[str, Any]) -> None:
    """What each worker of Ray Train runs: a program that was written for Lightning."""
    import lightning.pytorch as pl
    from ray.train import get_checkpoint, get_context
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, RayTrainReportCallback, prepare_trainer

    from tests.strategies.small import QUIET, Small

    class Killed(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            mark = Path(config["folder"], "killed")
            if config["is_killed"] and trainer.current_epoch == 2 and trainer.global_rank == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), 9)

    trainer = pl.Trainer(**{
        **QUIET, "max_epochs": 4, "devices": "auto", "strategy": RayDDPStrategy(), "plugins": [RayLightningEnvironment()],
        "callbacks": [RayTrainReportCallback(), Killed()], "enable_checkpointing": False,
    })  # fmt: skip
    trainer = prepare_trainer(trainer)
    module = Small(size=32)
    checkpoint = get_checkpoint()
    if checkpoint is None:
        trainer.fit(module)
    else:
        with checkpoint.as_directory() as folder:
            trainer.fit(module, ckpt_path=os.path.join(folder, "checkpoint.ckpt"))
    torch.save(
        {
            "weights": module.state_dict(),
            "seen": module.seen,
            "class": type(trainer).__module__,
            "world": trainer.world_size,
        },
        Path(config["folder"], f"rank-{get_context().get_world_rank()}"),
    )


def test_a_worker_that_is_killed_goes_on_where_it_was(tmp_path):
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    results = {}
    for name in ("unbroken", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        result = TorchTrainer(
            train,
            train_loop_config={"folder": str(folder), "is_killed": name == "killed"},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(folder), name="run", failure_config=FailureConfig(max_failures=1)),
        ).fit()
        assert result.error is None and result.metrics["epoch"] == 3 and result.metrics["step"] == 16
        assert os.listdir(result.checkpoint.path) == ["checkpoint.ckpt"]
        results[name] = [torch.load(folder / f"rank-{rank}", weights_only=False) for rank in range(2)]
        assert all(rank["class"].startswith("levin.") and rank["world"] == 2 for rank in results[name])
    assert (tmp_path / "killed" / "killed").exists()
    first, second = results["unbroken"]
    # From the last checkpoint that Ray had heard of.
    assert len(first["seen"]) == 64 and len(results["killed"][0]["seen"]) in (32, 48)
    assert not {*first["seen"]} & {*second["seen"]}
    for name, weight in first["weights"].items():
        for rank in (second, *results["killed"]):
            assert torch.equal(weight, rank["weights"][name])


def train_cut(config: dict[str, Any]) -> None:
    """What each worker runs with a strategy of Ray's that cuts the module."""
    import lightning.pytorch as pl
    import ray.train.lightning
    from ray.train import get_context

    from tests.strategies.small import QUIET, Small

    if config["strategy"] == "RayDeepSpeedStrategy":
        import deepspeed

        deepspeed.ops.__compatible_ops__.clear()  # It would compile one for the CPU, for minutes.
    strategy = getattr(ray.train.lightning, config["strategy"])()
    trainer = pl.Trainer(**{
        **QUIET, "max_epochs": 2, "devices": "auto", "strategy": strategy, "enable_checkpointing": False,
        "plugins": [ray.train.lightning.RayLightningEnvironment()],
        "callbacks": [ray.train.lightning.RayTrainReportCallback()],
    })  # fmt: skip
    module = Small(size=32)
    ray.train.lightning.prepare_trainer(trainer).fit(module)
    left = {
        "seen": module.seen,
        "world": trainer.world_size,
        "kinds": [kind.__name__ for kind in type(strategy).__mro__],
    }
    torch.save(left, Path(config["folder"], f"rank-{get_context().get_world_rank()}"))


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_modules_that_are_cut(strategy, tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    result = TorchTrainer(
        train_cut,
        train_loop_config={"folder": str(tmp_path), "strategy": f"Ray{strategy}"},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path), name="run"),
    ).fit()
    assert result.error is None and result.metrics["step"] == 8
    path = Path(result.checkpoint.path, "checkpoint.ckpt")
    assert os.listdir(path.parent) == [path.name]
    if strategy == "DeepSpeedStrategy":
        saved = convert_zero_checkpoint_to_fp32_state_dict(path, tmp_path / "whole")
    else:
        saved = torch.load(path, weights_only=False)
    first, second = (torch.load(tmp_path / f"rank-{rank}") for rank in range(2))
    assert first["world"] == 2 and not {*first["seen"]} & {*second["seen"]}
    assert strategy in first["kinds"]
    # Whole, and what one process makes of the same batches.
    alone = Small(size=32, batch_size=8)
    Trainer(**{**QUIET, "max_epochs": 2, "devices": 1, "enable_checkpointing": False}).fit(alone)
    for name, weight in alone.state_dict().items():
        assert torch.allclose(weight, saved["state_dict"][name], atol=1e-6), name


def fit_digits(learning_rate: float, *callbacks: Any, path: str | None = None) -> Any:
    """Train the digits example, and return its module."""
    import lightning.pytorch as pl

    sys.path.insert(0, str(ROOT / "examples"))
    from digits import DigitClassifier, DigitsData

    pl.seed_everything(0)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=4, enable_progress_bar=False, enable_model_summary=False, logger=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_train_batches=10, callbacks=list(callbacks),
    )  # fmt: skip
    module = DigitClassifier(learning_rate=learning_rate)
    trainer.fit(module, DigitsData(), ckpt_path=path)
    return module


def trial(config: dict[str, Any]) -> None:
    """What each trial of Ray Tune runs: the digits example with its settings."""
    import lightning.pytorch as pl
    from ray import tune
    from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback

    class Killed(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            mark = Path(config["folder"], "killed")
            if config["lr"] == config["killed_lr"] and trainer.current_epoch == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), 9)

    checkpoint = tune.get_checkpoint()
    path = None if checkpoint is None else os.path.join(checkpoint.to_directory(), "checkpoint")
    fit_digits(config["lr"], TuneReportCheckpointCallback({"accuracy": "val_acc"}), Killed(), path=path)


def test_asha_over_eight_trials_of_the_digits_one_of_which_is_killed(tmp_path):
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    rates = [1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 0.0]
    config = {"lr": tune.grid_search(rates), "killed_lr": rates[0], "folder": str(tmp_path)}
    tuner = tune.Tuner(
        trial,
        param_space=config,
        tune_config=tune.TuneConfig(
            metric="accuracy", mode="max", max_concurrent_trials=2, reuse_actors=True, scheduler=ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2)
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), name="digits", failure_config=tune.FailureConfig(max_failures=1)),
    )  # fmt: skip
    results = tuner.fit()
    assert len(results) == 8 and not results.errors
    epochs = {result.config["lr"]: result.metrics["training_iteration"] for result in results}
    print("\nRay Tune: epochs by learning rate", epochs)
    assert (tmp_path / "killed").exists() and epochs[rates[0]] == 4
    assert min(epochs.values()) < 4  # Trials that were no good were stopped.
    # What was killed went on from its checkpoint, as if nothing had been.
    killed = next(result for result in results if result.config["lr"] == rates[0])
    saved = torch.load(os.path.join(killed.checkpoint.path, "checkpoint"), weights_only=False)
    for name, weight in fit_digits(rates[0]).state_dict().items():
        assert torch.equal(weight, saved["state_dict"][name]), name
    best = results.get_best_result()
    assert best.metrics["accuracy"] > 0.5 and best.config["lr"] in rates[:3]
    saved = torch.load(os.path.join(best.checkpoint.path, "checkpoint"), weights_only=False)
    assert saved["hyper_parameters"]["learning_rate"] == best.config["lr"] and saved["epoch"] >= 0
