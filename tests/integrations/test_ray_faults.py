"""Steps of Ray Train's workers while processes of Ray itself are stopped or killed."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.integrations.times import print_times

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).parents[2]
STEPS = 400
# Process of Ray that is killed while the workers train -> the conditions of each 400 steps.
CONDITIONS = {
    "gcs_server": ["Ray, healthy", "control store stopped", "raylet stopped", "control store killed"],
    "raylet": ["Ray, healthy", "raylet killed"],
}
PROGRAM = """
import os, sys
from pathlib import Path
import psutil, ray
import levin.compat

levin.compat.install()
folder, steps, victim = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def train(config):
    import lightning.pytorch as pl
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
    from tests.integrations.times import Clock
    from tests.strategies.small import QUIET, Small

    store, raylet = psutil.Process(config["store"]), psutil.Process(config["raylet"])
    folder, steps = Path(config["folder"]), config["steps"]

    def write():
        clock.write(folder / "times")

    clock = Clock({
        "gcs_server": {
            1 * steps: store.suspend,
            2 * steps: lambda: [store.resume(), raylet.suspend()],
            3 * steps: lambda: [raylet.resume(), store.kill()],
            4 * steps: lambda: [write(), raylet.kill()],
        },
        "raylet": {1 * steps: raylet.kill, 2 * steps: write},
    }[config["victim"]])
    strategy = RayDDPStrategy()
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 1, "devices": "auto", "strategy": strategy, "enable_checkpointing": False,
                            "plugins": [RayLightningEnvironment()]})
    trainer = prepare_trainer(trainer)
    (folder / f"worker-{os.getpid()}").touch()
    if strategy.global_rank == 0:
        trainer.callbacks.append(clock)
    trainer.fit(Small(size=4 * 2 * 100_000))


from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ray.init("local", num_cpus=3, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
         runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"], "OMP_NUM_THREADS": "1"}})
pids = {child.name(): child.pid for child in psutil.Process().children()}
TorchTrainer(
    train,
    train_loop_config={
        "store": pids["gcs_server"], "raylet": pids["raylet"], "folder": folder, "steps": steps, "victim": victim,
    },
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=folder, name="run"),
).fit()
"""


@pytest.mark.parametrize("victim", CONDITIONS)
def test_steps_go_on_without_the_processes_of_ray_until_it_ends_the_workers(victim, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "src"), str(ROOT)])
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(
            [sys.executable, "program.py", str(tmp_path), str(STEPS), victim], cwd=tmp_path, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
    family = {psutil.Process(program.pid)}
    try:
        deadline = time.monotonic() + 400
        while not (tmp_path / "times").exists():
            assert program.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            family.update(psutil.Process(program.pid).children(recursive=True))
            time.sleep(0.2)
        lost_s = time.monotonic()
        names = {f"worker-{process.pid}": process for process in family}
        workers = [names[path.name] for path in tmp_path.glob("worker-*")]
        assert len(workers) == 2
        _, alive = psutil.wait_procs(workers, timeout=120)
        ended_s = time.monotonic() - lost_s
        assert not alive, "workers train on without their Ray"
        if victim == "raylet":
            assert program.wait(60) and "ActorDiedError" in (tmp_path / "log").read_text()
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        program.wait()
    seconds = json.loads((tmp_path / "times").read_text())
    times = {name: seconds[STEPS * i : STEPS * (i + 1) - 2] for i, name in enumerate(CONDITIONS[victim])}
    print_times("Ray Train, two workers", times, {name: sum(part) for name, part in times.items()})
    print(f"then Ray ended the workers after {ended_s:.1f} s")
    healthy, *others = (statistics.median(part) for part in times.values())
    assert all(median < 3 * healthy + 0.002 for median in others)
