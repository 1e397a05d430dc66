"""The engine chooses what Lightning chooses, and refuses what it refuses, over the combinations of the four arguments."""

from __future__ import annotations

import itertools
import logging
import os
import random
import warnings
from typing import Any

import pytest

from levin import engine as levin_engine
from levin.checkpoint.io import TorchCheckpointIO
from levin.engine import build_engine
from levin.environments import KubeflowEnvironment, LightningEnvironment
from levin.precision import DoublePrecision, HalfPrecision
from levin.strategies import DDPStrategy, SingleDeviceStrategy, TorchSyncBatchNorm
from tests.parity import both

lightning = pytest.importorskip("lightning.pytorch")

ACCELERATORS = ["auto", "cpu", "cuda", "gpu", "mps", "CPU", "foo", None, 1]
DEVICES: list[Any] = ["auto", 1, 2, "1", "2", " 2 ", 0, "0", [], [0], [0, 1], "0,1", -1, "-1", -2, 1.0, None, "x", True]
STRATEGIES: list[Any] = [
    "auto", "ddp", "DDP", "ddp_spawn", "ddp_fork", "ddp_notebook",
    "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false",
    "ddp_spawn_find_unused_parameters_true", "ddp_fork_find_unused_parameters_false",
    "ddp_notebook_find_unused_parameters_true", "single_device", "foo", "", None, 5,
]  # fmt: skip
PRECISIONS: list[Any] = [
    None, "32-true", 32, "32", "64-true", 64, "64", "16-mixed", 16, "16", "bf16-mixed", "bf16", "16-true", "bf16-true",
    "8", 8, "", "BF16", [], 1.0,
]  # fmt: skip
NODES: list[Any] = [1, 2, 0, -1, "2", 1.0, None, True]
LAUNCHERS = {"_SubprocessScriptLauncher": "popen", "_MultiProcessingLauncher": "start"}


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def kind_of(error: Exception) -> str:
    if isinstance(error, ValueError) or type(error).__name__ == "MisconfigurationException":
        return "value"
    return type(error).__name__


def chosen_by_lightning(**kwargs: Any) -> Any:
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    try:
        trainer = lightning.Trainer(**dict.fromkeys(off, False), **kwargs)
    except Exception as error:
        both.caught(error)
        return kind_of(error)
    strategy = trainer.strategy
    launcher = strategy.launcher
    return {
        "strategy": type(strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "devices": trainer.device_ids,
        "root": str(strategy.root_device),
        "world_size": trainer.world_size,
        "nodes": trainer.num_nodes,
        "precision": trainer.precision,
        "plugin": type(trainer.precision_plugin).__name__,
        "environment": type(getattr(strategy, "cluster_environment", None)).__name__,
        "launcher": LAUNCHERS.get(type(launcher).__name__),
        "start_method": getattr(launcher, "_start_method", None),
        "find_unused": getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters"),
    }


def chosen_by_levin(**kwargs: Any) -> Any:
    try:
        engine = build_engine(**kwargs)
    except Exception as error:
        both.caught(error)
        return kind_of(error)
    strategy = engine.strategy
    launcher = strategy.launcher
    return {
        "strategy": type(strategy).__name__,
        "accelerator": type(engine.accelerator).__name__,
        "devices": engine.device_ids,
        "root": str(strategy.root_device),
        "world_size": strategy.world_size,
        "nodes": engine.num_nodes,
        "precision": engine.precision.precision,
        "plugin": type(engine.precision).__name__,
        "environment": type(engine.environment).__name__,
        "launcher": {"SubprocessLauncher": "popen", "MultiProcessingLauncher": "start"}.get(type(launcher).__name__),
        "start_method": getattr(launcher, "start_method", None),
        "find_unused": getattr(strategy, "ddp_kwargs", {}).get("find_unused_parameters"),
    }


def differs_on_purpose(kwargs: dict[str, Any], ours: Any) -> bool:
    # Lightning drops devices and nodes that one device cannot use; nothing is ignored silently here.
    has_more = kwargs.get("devices") in (2, "2", " 2 ") or kwargs.get("num_nodes") == 2
    return kwargs.get("strategy") == "single_device" and has_more and ours == "value"


def combinations() -> list[dict[str, Any]]:
    names = ("accelerator", "devices", "strategy", "precision", "num_nodes")
    axes = (ACCELERATORS, DEVICES, STRATEGIES, PRECISIONS, NODES)
    defaults = ("auto", "auto", "auto", None, 1)
    alone = [dict(zip(names, defaults)) | {name: value} for name, axis in zip(names, axes) for value in axis]
    devices_and_strategies = [
        {"accelerator": "cpu", "devices": devices, "strategy": strategy, "num_nodes": nodes}
        for devices, strategy, nodes in itertools.product((1, 2, "auto"), STRATEGIES, (1, 2))
    ]
    everything = [dict(zip(names, values)) for values in itertools.product(*axes)]
    return alone + devices_and_strategies + random.Random(0).sample(everything, 400)


@pytest.mark.lightning_raises("MisconfigurationException", "ValueError", "TypeError")
def test_every_combination_is_chosen_or_refused_alike():
    different = []
    cases = combinations()
    for kwargs in cases:
        theirs, ours = chosen_by_lightning(**kwargs), chosen_by_levin(**kwargs)
        if theirs != ours and not differs_on_purpose(kwargs, ours):
            different.append(f"{kwargs}\n  lightning {theirs}\n  levin     {ours}")
    assert not different, f"{len(different)} of {len(cases)}:\n" + "\n".join(different[:20])


def levin_parts() -> dict[str, Any]:
    return {
        "half": HalfPrecision("bf16-true"),
        "double": DoublePrecision(),
        "io": TorchCheckpointIO(),
        "io2": TorchCheckpointIO(),
        "kubeflow": KubeflowEnvironment(),
        "local": LightningEnvironment(),
        "sync": TorchSyncBatchNorm(),
        "int": 3,
        "text": "ddp",
        "ddp": DDPStrategy(),
    }


def lightning_parts() -> dict[str, Any]:
    from lightning.pytorch import plugins
    from lightning.pytorch.plugins import environments
    from lightning.pytorch.strategies import DDPStrategy as LightningDDP

    return {
        "half": plugins.HalfPrecision("bf16-true"),
        "double": plugins.DoublePrecision(),
        "io": plugins.TorchCheckpointIO(),
        "io2": plugins.TorchCheckpointIO(),
        "kubeflow": environments.KubeflowEnvironment(),
        "local": environments.LightningEnvironment(),
        "sync": plugins.TorchSyncBatchNorm(),
        "int": 3,
        "text": "ddp",
        "ddp": LightningDDP(),
    }


@pytest.mark.lightning_raises("ValueError", "MisconfigurationException")
def test_plugins_are_accepted_or_refused_alike(monkeypatch):
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1234"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    names = list(levin_parts())
    groups = [[name] for name in names] + [list(pair) for pair in itertools.combinations(names, 2)]
    different = []
    for group in groups:
        for extra in ({}, {"precision": "32-true"}, {"sync_batchnorm": True}):
            arguments = dict(accelerator="cpu", devices=2, strategy="ddp", **extra)
            theirs_parts, ours_parts = lightning_parts(), levin_parts()
            theirs = chosen_by_lightning(plugins=[theirs_parts[name] for name in group], **arguments)
            ours = chosen_by_levin(plugins=[ours_parts[name] for name in group], **arguments)
            if theirs != ours:
                different.append(f"{group} {extra}\n  lightning {theirs}\n  levin     {ours}")
    assert not different, f"{len(different)}:\n" + "\n".join(different[:20])


@pytest.mark.lightning_raises("MisconfigurationException")
def test_parts_inside_and_beside_a_strategy(monkeypatch):
    import torch
    from lightning.pytorch import plugins
    from lightning.pytorch.accelerators import CPUAccelerator as LightningCPU
    from lightning.pytorch.plugins import environments
    from lightning.pytorch.strategies import DDPStrategy as LightningDDP
    from lightning.pytorch.strategies import SingleDeviceStrategy as LightningSingle

    from levin.accelerators import CPUAccelerator

    cpu = torch.device("cpu")
    cases = [
        ({}, {}),
        ({"accelerator": "cpu object"}, {}),
        ({"accelerator": "cpu object"}, {"accelerator": "cpu"}),
        ({"precision_plugin": "double"}, {}),
        ({"precision_plugin": "double"}, {"precision": "32-true"}),
        ({"precision_plugin": "double"}, {"plugins": "double"}),
        ({"checkpoint_io": "io"}, {}),
        ({"checkpoint_io": "io"}, {"plugins": "io"}),
        ({"cluster_environment": "local"}, {}),
        ({"cluster_environment": "local"}, {"plugins": "local"}),
        ({"parallel_devices": [cpu, cpu]}, {}),
        ({"parallel_devices": [cpu, cpu]}, {"accelerator": "cpu"}),
        ({"parallel_devices": [cpu]}, {}),
    ]  # fmt: skip
    theirs_by_name = {
        "cpu object": LightningCPU, "double": plugins.DoublePrecision, "io": plugins.TorchCheckpointIO,
        "local": environments.LightningEnvironment,
    }  # fmt: skip
    ours_by_name = {
        "cpu object": CPUAccelerator, "double": DoublePrecision, "io": TorchCheckpointIO, "local": LightningEnvironment,
    }  # fmt: skip

    def filled(values: dict[str, Any], parts: dict[str, Any]) -> dict[str, Any]:
        return {k: parts[v]() if isinstance(v, str) and v in parts else v for k, v in values.items()}

    different = []
    for theirs_class, ours_class in ((LightningDDP, DDPStrategy), (LightningSingle, SingleDeviceStrategy)):
        for inside, beside in cases:
            if ours_class is SingleDeviceStrategy and not set(inside) <= {
                "accelerator",
                "precision_plugin",
                "checkpoint_io",
            }:
                continue
            theirs = chosen_by_lightning(
                strategy=theirs_class(**filled(inside, theirs_by_name)), **filled(beside, theirs_by_name)
            )
            ours = chosen_by_levin(strategy=ours_class(**filled(inside, ours_by_name)), **filled(beside, ours_by_name))
            # Lightning overlooks the second precision when it is the default one, written out.
            is_overlooked = beside == {"precision": "32-true"} and ours == "value"
            if theirs != ours and not is_overlooked:
                different.append(f"{ours_class.__name__} {inside} {beside}\n  lightning {theirs}\n  levin     {ours}")
    assert not different, f"{len(different)}:\n" + "\n".join(different)


CLUSTERS = {
    "torchrun": {
        "TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "host", "MASTER_PORT": "29400", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    },
    "srun": {
        "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2",
        "SLURM_NODELIST": "gpu[07-08]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    },
    "salloc": {
        "SLURM_JOB_ID": "12345", "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "2", "SLURM_NODELIST": "gpu[07-08]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
    },
    "by hand": {"LOCAL_RANK": "1", "NODE_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1234"},
}  # fmt: skip


def where(trainer_or_engine: Any) -> dict[str, Any]:
    strategy = trainer_or_engine.strategy
    environment = strategy.cluster_environment
    return {
        "environment": type(environment).__name__,
        "ranks": (strategy.global_rank, strategy.local_rank, strategy.node_rank, strategy.world_size),
        "address": (environment.main_address, environment.main_port if "MASTER_PORT" in os.environ else 0),
        "external": environment.creates_processes_externally,
        "root": str(strategy.root_device),
        "sampler": dict(strategy.distributed_sampler_kwargs),
    }


@pytest.mark.parametrize("cluster", list(CLUSTERS))
def test_ranks_are_read_alike(cluster, monkeypatch):
    for name, value in CLUSTERS[cluster].items():
        monkeypatch.setenv(name, value)
    arguments = {"accelerator": "cpu", "devices": 2, "num_nodes": 2, "strategy": "ddp"}
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    theirs = lightning.Trainer(**off, **arguments)
    ours = levin_engine.build_engine(**arguments)
    assert where(theirs) == where(ours)


@pytest.mark.parametrize("cluster", ["torchrun", "srun"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("num_nodes", [1, 2])
@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_numbers_that_do_not_fit_the_allocation(cluster, devices, num_nodes, strategy, monkeypatch):
    for name, value in CLUSTERS[cluster].items():
        monkeypatch.setenv(name, value)
    arguments = {"accelerator": "cpu", "devices": devices, "num_nodes": num_nodes, "strategy": strategy}
    fits = devices * num_nodes == 4 if cluster == "torchrun" else (devices, num_nodes) == (2, 2)
    ours = chosen_by_levin(**arguments)
    if strategy == "auto" and devices * num_nodes == 1:  # a side Trainer; where SLURM runs, levin's can be requeued
        assert {**ours, "environment": "None"} == {**chosen_by_lightning(**arguments), "environment": "None"}
        return
    # Lightning finds out in the run, or not at all; here it is said at once.
    assert ours == (chosen_by_lightning(**arguments) if fits else "value")


def test_one_device_in_a_batch_script_and_in_one_of_several_processes(monkeypatch):
    script = {"SLURM_STEP_ID": None, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}
    for name, value in {
        **CLUSTERS["srun"],
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        **script,
    }.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    arguments = {"accelerator": "cpu", "devices": 1}
    theirs, ours = chosen_by_lightning(**arguments), chosen_by_levin(**arguments)
    assert (ours["strategy"], ours["world_size"]) == (theirs["strategy"], theirs["world_size"])
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert chosen_by_lightning(**arguments) == theirs
    with pytest.warns(UserWarning, match="This process works for itself: .*strategy='single_device'"):
        assert chosen_by_levin(**arguments)["world_size"] == 1
    assert chosen_by_levin(**arguments, strategy="single_device")["world_size"] == 1
    # There each process trains alone, on the same data.
    assert chosen_by_lightning(accelerator="cpu")["world_size"] == 1
    assert chosen_by_levin(accelerator="cpu") == "value"


def test_processes_are_not_started_twice(monkeypatch):
    for name, value in CLUSTERS["torchrun"].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"strategy='ddp_spawn' starts its processes itself, received TorchElastic"):
        build_engine(accelerator="cpu", devices=2, num_nodes=2, strategy="ddp_spawn")
