"""Studies of Optuna, jobs of Hydra, and processes with the variables that operators on Kubernetes set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed import _free_port

ROOT = Path(__file__).parents[2]
SET_BY_LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def start(command: list[str], folder: Path, **variables: object) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in SET_BY_LAUNCHERS}
    environment |= {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(outputs)
    return outputs


STUDY = """
import sys
import levin.compat
levin.compat.install()
import lightning.pytorch as pl
import optuna
from optuna_integration import PyTorchLightningPruningCallback
from tests.strategies.small import QUIET, Small

def objective(trial):
    lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
    callback = PyTorchLightningPruningCallback(trial, monitor="val_loss")
    trainer = pl.Trainer(**{**QUIET, "devices": 1, "max_epochs": 6, "callbacks": [callback], "enable_checkpointing": False})
    trainer.fit(Small(lr=lr))
    return trainer.callback_metrics["val_loss"].item()

pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=1)
study = optuna.create_study(storage=sys.argv[1], study_name="s", load_if_exists=True, pruner=pruner,
                            sampler=optuna.samplers.RandomSampler(int(sys.argv[2])))
study.optimize(objective, n_trials=8)
"""


def test_two_processes_work_on_one_study_and_prune(tmp_path):
    import optuna

    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(storage=storage, study_name="s")
    finish(*(start(["-c", STUDY, storage, str(seed)], tmp_path) for seed in range(2)))
    study = optuna.load_study(study_name="s", storage=storage)
    states = [trial.state.name for trial in study.trials]
    assert len(states) == 16 and set(states) == {"COMPLETE", "PRUNED"}
    for trial in study.trials:
        epochs = sorted(trial.intermediate_values)
        assert epochs == list(range(len(epochs))) and (len(epochs) == 6) == (trial.state.name == "COMPLETE")


JOB = """
import os, sys
import hydra
import torch
from levin import Trainer
from omegaconf import OmegaConf
from tests.strategies.small import QUIET, Small

@hydra.main(version_base=None, config_path=None, config_name=None)
def main(config):
    trainer = Trainer(**{**QUIET, "devices": 2, "strategy": "ddp", "max_epochs": config.epochs, "default_root_dir": "."})
    module = Small(lr=config.lr)
    trainer.fit(module)
    torch.save({"config": OmegaConf.to_container(config), "folder": os.getcwd(), "weights": module.state_dict()},
               f"rank-{trainer.global_rank}")

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("is_multirun", [False, True], ids=["one job", "several jobs"])
def test_both_ranks_of_a_hydra_job_have_its_settings_and_its_folder(is_multirun, tmp_path):
    (tmp_path / "train.py").write_text(JOB)
    options = ["hydra.job.chdir=True", "+epochs=2", "+lr=0.1" if not is_multirun else "+lr=0.1,0.01"]
    where = f"hydra.{'sweep' if is_multirun else 'run'}.dir={tmp_path}/out dir"
    finish(start(["train.py", *options, where, *(["--multirun"] if is_multirun else [])], tmp_path))
    folders = [tmp_path / "out dir" / name for name in (["0", "1"] if is_multirun else ["."])]
    for folder, lr in zip(folders, (0.1, 0.01)):
        ranks = [torch.load(folder / f"rank-{rank}", weights_only=False) for rank in range(2)]
        assert [rank["config"] for rank in ranks] == [{"epochs": 2, "lr": lr}] * 2
        assert [Path(rank["folder"]) for rank in ranks] == [folder.resolve()] * 2
        for first, second in zip(*(rank["weights"].values() for rank in ranks), strict=True):
            assert torch.equal(first, second)
        assert len(list(folder.rglob("*.ckpt"))) == 1
    # The other rank makes no folder of its own; .hydra is written once for each job.
    assert len(list((tmp_path / "out dir").rglob("config.yaml"))) == len(folders)
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "multirun").exists()


SWEEP = """
import logging, os
import hydra
import torch
from levin import Trainer
from levin.utilities.rank_zero import rank_zero_info
from tests.strategies.small import QUIET, Small

@hydra.main(version_base=None, config_path=None, config_name=None)
def main(config):
    trainer = Trainer(**{**QUIET, "devices": config.devices, "strategy": "ddp" if config.devices > 1 else "auto", "max_epochs": 1,
                         "enable_checkpointing": False})
    module = Small(lr=config.lr)
    trainer.fit(module)
    rank_zero_info("said once")
    torch.save({"lr": config.lr, "seen": sorted(module.seen)}, f"rank-{trainer.global_rank}")

if __name__ == "__main__":
    main()
"""


def sweep(folder: Path, launcher: str, devices: int, *options: str) -> subprocess.Popen[str]:
    """Start two jobs with a launcher of Hydra's plugins."""
    (folder / "train.py").write_text(SWEEP)
    command = [
        "train.py",
        "--multirun",
        f"hydra/launcher={launcher}",
        "hydra.job.chdir=True",
        f"hydra.sweep.dir={folder}/out",
    ]
    return start([*command, *options, f"+devices={devices}", "+lr=0.1,0.01"], folder)


def check_jobs(folder: Path) -> None:
    for job, lr in (("0", 0.1), ("1", 0.01)):
        rank = torch.load(folder / "out" / job / "rank-0")
        assert rank == {"lr": lr, "seen": list(range(16))}


def test_the_joblib_launcher_of_hydra(tmp_path):
    (output,) = finish(sweep(tmp_path, "joblib", 1, "hydra.launcher.n_jobs=2"))
    check_jobs(tmp_path)
    # As Hydra prints it, and for each job in its own file.
    assert output.count("said once") == 2 and output.count("[INFO] - said once") == 2, output
    for job in ("0", "1"):
        assert (tmp_path / "out" / job / "train.log").read_text().count("said once") == 1


def test_a_job_in_a_worker_of_joblib_cannot_start_ranks_and_says_so(tmp_path):
    process = sweep(tmp_path, "joblib", 2, "hydra.launcher.n_jobs=2")
    output = process.communicate(timeout=200)[0]
    assert process.returncode != 0 and "it is a worker of joblib" in output, output


def test_the_submitit_launcher_of_hydra(tmp_path):
    finish(sweep(tmp_path, "submitit_local", 1, "hydra.launcher.timeout_min=5"))
    check_jobs(tmp_path)


TRAIN = """
import sys
import torch
from levin import Trainer
from levin.environments import KubeflowEnvironment
from tests.strategies.small import QUIET, Small

if __name__ == "__main__":
    plugins = [KubeflowEnvironment()] if "plugin" in sys.argv else None
    trainer = Trainer(**{**QUIET, "devices": 1, "num_nodes": 2, "strategy": "ddp", "max_epochs": 1, "plugins": plugins,
                         "enable_checkpointing": False})
    module = Small()
    trainer.fit(module)
    torch.save({"seen": module.seen, "environment": type(trainer.strategy.cluster_environment).__name__},
               f"rank-{trainer.global_rank}")
"""


def of_pod(rank: int, port: int) -> dict[str, object]:
    """What the training operator of Kubeflow sets in the pods of a PyTorchJob with a master and a worker."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {
        **shared, **{f"PET_{name}": value for name, value in shared.items()}, "WORLD_SIZE": 2, "RANK": rank,
        "PET_NNODES": 2, "PET_NODE_RANK": rank, "PET_NPROC_PER_NODE": 1, "PYTHONUNBUFFERED": 1,
    }  # fmt: skip


@pytest.mark.parametrize("how", ["python", "torchrun"])
def test_the_pods_of_a_pytorchjob(how, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    command = ["train.py", "plugin"] if how == "python" else ["-m", "torch.distributed.run", "train.py"]
    port = _free_port()
    finish(*(start(command, tmp_path, **of_pod(rank, port)) for rank in range(2)))
    ranks = [torch.load(tmp_path / f"rank-{rank}", weights_only=False) for rank in range(2)]
    kind = "KubeflowEnvironment" if how == "python" else "TorchElasticEnvironment"
    assert [rank["environment"] for rank in ranks] == [kind] * 2
    assert sorted(ranks[0]["seen"] + ranks[1]["seen"]) == list(range(16))


def test_a_pod_without_the_plugin_is_told_of_it(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    process = start(["train.py"], tmp_path, **of_pod(1, _free_port()))
    output = process.communicate(timeout=100)[0]
    assert process.returncode != 0 and "Trainer(plugins=[KubeflowEnvironment()])" in output


def test_an_elastic_job_of_the_operator(tmp_path):
    (tmp_path / "train.py").write_text(
        TRAIN.replace('"num_nodes": 2', '"num_nodes": 1').replace('"devices": 1', '"devices": 2')
    )
    port = _free_port()
    variables = {
        "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"127.0.0.1:{port}", "PET_RDZV_ID": "job", "PET_NNODES": "1:2",
        "PET_NPROC_PER_NODE": 2, "PET_MAX_RESTARTS": 3,
    }  # fmt: skip
    finish(start(["-m", "torch.distributed.run", "train.py"], tmp_path, **variables))
    assert len(list(tmp_path.glob("rank-*"))) == 2
