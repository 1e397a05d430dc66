"""What trackers bring for Lightning themselves, on levin through the import alias."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.test_loggers import run_program

pytest.importorskip("mlflow")
PROGRAM = """
import json, sys
from pathlib import Path
import levin.compat
levin.compat.install()
import lightning.pytorch as pl
from tests.integrations.test_loggers import Line, loader
folder = Path(sys.argv[1])
settings = {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False,
            "enable_model_summary": False}
"""
AUTOLOG = (
    PROGRAM
    + """
import mlflow
class Kept(pl.Callback):
    losses = []
    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(trainer.callback_metrics["loss"].item())
mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
mlflow.set_experiment(experiment_id=mlflow.create_experiment("own", artifact_location=str(folder / "artifacts")))
mlflow.pytorch.autolog(log_models=False, checkpoint=False)
stopping = pl.callbacks.EarlyStopping("loss", patience=7)
with mlflow.start_run() as run:
    pl.Trainer(logger=False, callbacks=[Kept(), stopping], **settings).fit(Line(), loader(4))
client = mlflow.MlflowClient()
history = [[entry.step, entry.value] for entry in client.get_metric_history(run.info.run_id, "loss")]
(folder / "left").write_text(json.dumps({
    "losses": Kept.losses, "history": history, "parameters": client.get_run(run.info.run_id).data.params,
    "files": [file.path for file in client.list_artifacts(run.info.run_id)],
}))
"""
)
WATCH = (
    PROGRAM
    + """
import wandb
from lightning.pytorch.loggers import WandbLogger
logger, module, names = WandbLogger(offline=True, project="p", save_dir=folder), Line(), []
log = wandb.Run._log
wandb.Run._log = lambda run, data, *args, **kwargs: [names.extend(data), log(run, data, *args, **kwargs)]
logger.watch(module, log="gradients", log_freq=2, log_graph=False)
pl.Trainer(logger=logger, log_every_n_steps=4, **settings).fit(module, loader(8))
wandb.finish()
(folder / "left").write_text(json.dumps(names))
"""
)


def run(program: str, folder: Path) -> Any:
    run_program(program, folder)
    return json.loads((folder / "left").read_text())


def test_autolog_of_mlflow_keeps_each_epoch_and_the_settings(tmp_path):
    left = run(AUTOLOG, tmp_path)
    assert left["history"] == [[epoch, pytest.approx(loss)] for epoch, loss in enumerate(left["losses"])]
    assert len(left["losses"]) == 2 and left["losses"][0] > left["losses"][1]
    parameters = left["parameters"]
    assert (parameters["epochs"], parameters["optimizer_name"], parameters["lr"]) == ("2", "SGD", "0.1")
    assert (parameters["monitor"], parameters["patience"]) == ("loss", "7")
    assert left["files"] == ["model_summary.txt"]


def test_watch_of_wandb_sees_the_gradients(tmp_path):
    names = run(WATCH, tmp_path)
    # 16 steps, every second one; what the module itself logs, every fourth.
    assert [names.count(f"gradients/layer.{name}") for name in ("weight", "bias")] == [8, 8]
    assert names.count("loss") == 4
