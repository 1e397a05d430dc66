"""Loggers against the real packages, and against an MLflow server that answers, is slow, is away and comes back."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from levin import LightningModule, Trainer
from levin.callbacks import ModelCheckpoint
from levin.loggers import CSVLogger, MLFlowLogger, WandbLogger
from tests.distributed import _free_port
from tests.integrations.proxy import Proxy, running
from tests.integrations.times import Clock, print_times

# What the packages warn of is no matter of ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore:Checkpoint directory"
)
ROOT = Path(__file__).parents[2]


class Line(LightningModule):
    def __init__(self, lr: float = 0.1, sizes: dict | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).pow(2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


def loader(num_batches: int) -> Any:
    return torch.utils.data.DataLoader(torch.ones(num_batches, 8))


def trainer(folder: Path, logger: Any, **options: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "logger": logger,
            **options,
        }  # fmt: skip
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an MLflow server on sqlite."""
    folder, port = tmp_path_factory.mktemp("server"), _free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    with running(command, f"http://127.0.0.1:{port}/health", folder / "log", limit_s=200):
        yield port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    # As short as somebody sets them who knows that the server is near.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    proxy = Proxy(server)
    yield proxy
    proxy.stop()


def url_of(proxy: Proxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


def losses(logger: MLFlowLogger, name: str = "loss") -> list[tuple[int, float]]:
    history = logger.experiment.get_metric_history(logger.run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def test_mlflow_has_all_of_a_run_and_goes_on_with_it(proxy, tmp_path):
    logger = MLFlowLogger(
        "digits", run_name="first", tracking_uri=url_of(proxy), tags={"team": "a"}, save_dir=str(tmp_path / "mlruns"),
        log_model="all", prefix="x",
    )  # fmt: skip
    saved = ModelCheckpoint(tmp_path / "saved", filename="{epoch}", monitor="loss", save_top_k=1, save_last=True)
    first = trainer(tmp_path, [logger, CSVLogger(tmp_path)], callbacks=[saved])
    first.fit(Line(sizes={"in": [8, 1]}), loader(4))
    client, run_id = logger.experiment, logger.run_id
    run = client.get_run(run_id)
    assert run.data.params == {"lr": "0.1", "sizes/in": "[8, 1]"}
    assert run.data.tags["team"] == "a" and run.info.run_name == "first" and run.info.status == "FINISHED"
    rows = [row for row in csv.DictReader((Path(first.loggers[1].log_dir) / "metrics.csv").open()) if row["loss"]]
    assert losses(logger, "x-loss") == [(int(row["step"]), float(row["loss"])) for row in rows]
    # Each file as it was when it was saved, though the callback has removed the first one since.
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=1.ckpt", "last.ckpt"]
    assert sorted(item.path for item in client.list_artifacts(run_id)) == ["epoch=0", "epoch=1", "last"]
    for name in ("epoch=0", "epoch=1"):
        folder = Path(client.download_artifacts(run_id, name, str(tmp_path)))
        assert sorted(path.name for path in folder.iterdir()) == ["aliases.txt", f"{name}.ckpt", "metadata.yaml"]
        assert torch.load(folder / f"{name}.ckpt", weights_only=False)["global_step"] == 4 * (int(name[-1]) + 1)
        assert yaml.safe_load((folder / "metadata.yaml").read_text())["original_filename"] == f"{name}.ckpt"
    assert list((tmp_path / "mlruns-unsent").iterdir()) == []

    again = MLFlowLogger(tracking_uri=url_of(proxy), run_id=run_id, prefix="x", save_dir=str(tmp_path / "mlruns"))
    options = {"max_epochs": 3, "callbacks": [ModelCheckpoint(tmp_path / "saved", monitor="loss")]}
    trainer(tmp_path, again, **options).fit(Line(), loader(4), ckpt_path=saved.last_model_path)
    assert again.name == logger.name
    assert [step for step, _ in losses(again, "x-loss")] == list(range(12))


def test_mlflow_refuses_in_the_constructor_of_the_run(proxy, tmp_path):
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match="nope"):
        trainer(tmp_path, MLFlowLogger(tracking_uri=url_of(proxy), run_id="nope")).fit(Line(), loader(1))


def test_mlflow_registers_a_checkpoint_that_was_uploaded(proxy, tmp_path):
    logger = MLFlowLogger("digits", tracking_uri=url_of(proxy), log_model=True, save_dir=str(tmp_path / "mlruns"))
    trainer(tmp_path, logger, callbacks=[ModelCheckpoint(tmp_path / "saved", filename="best")]).fit(Line(), loader(2))
    client = logger.experiment
    client.create_registered_model("line")
    uri = f"{client.get_run(logger.run_id).info.artifact_uri}/best"
    version = client.create_model_version("line", source=uri, run_id=logger.run_id)
    found = Path(client.download_artifacts(version.run_id, "best/best.ckpt", str(tmp_path)))
    assert Line.load_from_checkpoint(found, weights_only=False).hparams.lr == 0.1


def test_a_server_that_is_slow_or_away_slows_nothing(proxy, tmp_path):
    num_steps, times, held_up_s = 400, {}, {}
    conditions = {
        "no logger": {},
        "healthy": {},
        "slow (0.3 s a piece)": {1: lambda: setattr(proxy, "delay_s", 0.3)},
        "deaf": {1: lambda: setattr(proxy, "is_deaf", True)},
        "refuses": {1: proxy.stop},
    }
    loggers = {}
    for name, when in conditions.items():
        logger = MLFlowLogger(
            "times", tracking_uri=url_of(proxy), run_name=name, save_dir=str(tmp_path / name / "mlruns")
        )
        clock, loggers[name] = Clock(when), logger
        began = time.perf_counter()
        trainer(
            tmp_path,
            logger if name != "no logger" else False,
            max_epochs=1,
            callbacks=[clock],
            enable_checkpointing=False,
        ).fit(Line(), loader(num_steps))
        held_up_s[name] = time.perf_counter() - began
        times[name] = clock.seconds
        proxy.delay_s, proxy.is_deaf = 0.0, False
    proxy.start()
    print_times("MLflow", times, held_up_s)
    for name, seconds in times.items():
        # A request that training waited for would take 300 ms or more.
        assert sorted(seconds)[-2] < 0.25, name
    for name in ("healthy", "slow (0.3 s a piece)"):
        assert [step for step, _ in losses(loggers[name])] == list(range(num_steps))
    for name in ("deaf", "refuses"):
        (kept,) = (tmp_path / name / "mlruns-unsent").glob("*.jsonl")
        MLFlowLogger.send_unsent(kept)
        assert not kept.exists()
        assert [step for step, _ in losses(loggers[name])] == list(range(num_steps))
        assert loggers[name].experiment.get_run(loggers[name].run_id).info.status == "FINISHED"


def test_a_server_that_comes_back_gets_what_it_missed(proxy, tmp_path, caplog):
    logger = MLFlowLogger("back", tracking_uri=url_of(proxy), save_dir=str(tmp_path / "mlruns"))
    when = {3: proxy.stop, 30: lambda: time.sleep(5), 31: proxy.start}
    trainer(tmp_path, logger, max_epochs=1, callbacks=[Clock(when)]).fit(Line(), loader(60))
    assert [step for step, _ in losses(logger)] == list(range(60))
    assert not list(tmp_path.rglob("*.jsonl"))
    assert len([record for record in caplog.records if "MLflow cannot be reached" in record.message]) == 1


def test_a_server_that_is_away_from_the_start(proxy, tmp_path, monkeypatch):
    monkeypatch.setattr("levin.loggers.mlflow._START_LIMIT_S", 1.0)
    proxy.stop()
    logger = MLFlowLogger("away", tracking_uri=url_of(proxy), tags={"a": 1}, save_dir=str(tmp_path / "mlruns"))
    fit = trainer(tmp_path, logger, max_epochs=1)
    with pytest.warns(UserWarning, match=r"did not answer within .* goes on without it"):
        fit.fit(Line(), loader(3))
    assert fit.global_step == 3 and "/away/" in fit.checkpoint_callback.best_model_path
    (kept,) = (tmp_path / "mlruns-unsent").glob("*.jsonl")
    with pytest.raises(ConnectionError, match="stays as it is"):
        MLFlowLogger.send_unsent(kept)
    proxy.start()
    MLFlowLogger.send_unsent(kept)
    client = MLFlowLogger("away", tracking_uri=url_of(proxy)).experiment
    (found,) = [
        run for run in client.search_runs([client.get_experiment_by_name("away").experiment_id]) if run.data.params
    ]
    assert len(client.get_metric_history(found.info.run_id, "loss")) == 3 and found.data.tags["a"] == "1"


def run_program(program: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=200,
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def wandb_records(folder: Path) -> list[Any]:
    """What the file of a run holds, once it holds the end of the run."""
    (file,) = folder.glob("wandb/*run-*/*.wandb")
    deadline = time.monotonic() + 20
    while True:
        records = parsed(file.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, records
        time.sleep(0.2)


def parsed(data: bytes) -> list[Any]:
    """The records of blocks of 32 KiB with pieces of them, as LevelDB writes its logs."""
    from wandb.proto import wandb_internal_pb2

    place, record, records = 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + size > len(data):
            break
        record += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(record))
            record = b""
    return records


def wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in row.item} for row in rows]


def test_wandb_offline_is_read_back(tmp_path):
    import wandb

    logger = WandbLogger(name="n", project="p", save_dir=tmp_path, offline=True, version="abc", group="g")
    trainer(tmp_path, logger).fit(Line(sizes={"in": 8}), loader(3))
    logger.log_table("words", columns=["a"], data=[["b"]])
    wandb.finish()
    records = wandb_records(tmp_path)
    rows = [row for row in wandb_history(records) if "loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(6))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project, run.display_name, run.run_group) == ("abc", "p", "n", "g")
    updates = [item for record in records for item in record.config.update]
    assert {item.key: json.loads(item.value_json) for item in updates if item.key in ("lr", "sizes")} == {
        "lr": 0.1, "sizes": {"in": 8},
    }  # fmt: skip


WANDB = """
import statistics, sys, warnings
from pathlib import Path
import wandb
from levin.loggers import WandbLogger
from tests.integrations.test_loggers import Line, loader, trainer
from tests.integrations.times import Clock
warnings.simplefilter("default", UserWarning)
logger = WandbLogger(project="p", save_dir=sys.argv[1], settings=wandb.Settings(init_timeout=5))
clock = Clock()
trainer(Path(sys.argv[1]), logger, callbacks=[clock]).fit(Line(), loader(50))
wandb.finish()
print(f"W&B unreachable: median step {1e6 * statistics.median(clock.seconds):.0f} us")
"""


def test_wandb_that_cannot_be_reached_keeps_the_run(tmp_path):
    address = f"http://127.0.0.1:{_free_port()}"
    done = run_program(WANDB, tmp_path, WANDB_BASE_URL=address, WANDB_API_KEY="a" * 40)
    assert "Weights & Biases cannot be reached" in done.stderr and "Upload it later with: wandb sync " in done.stderr
    print(done.stdout.splitlines()[-1])
    for attempt in tmp_path.glob("wandb/run-*/*.wandb"):
        attempt.unlink()
    assert len([row for row in wandb_history(wandb_records(tmp_path)) if "loss" in row]) == 100


COMET = """
import sys
from pathlib import Path
from levin.loggers import CometLogger
from tests.integrations.test_loggers import Line, loader, trainer
folder = Path(sys.argv[1])
logger = CometLogger(project="p", online=False, offline_directory=str(folder), prefix="x", name="n")
trainer(folder, logger).fit(Line(sizes={"in": 8}), loader(3))
logger.experiment.end()
"""


@pytest.mark.parametrize("is_reachable", [True, False], ids=["offline", "unreachable"])
def test_comet_is_read_back(is_reachable, tmp_path):
    program, variables = COMET, {}
    if not is_reachable:
        program = COMET.replace("online=False, ", "")
        variables = {"COMET_URL_OVERRIDE": f"http://127.0.0.1:{_free_port()}/", "COMET_API_KEY": "a" * 25}
    done = run_program(program, tmp_path, **variables)
    assert "comet upload" in done.stdout + done.stderr
    (archive,) = tmp_path.glob("*.zip")
    messages = [json.loads(line) for line in zipfile.ZipFile(archive).read("messages.json").decode().splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    assert [metric["step"] for metric in metrics if metric["metricName"] == "x_loss"] == list(range(6))
    params = {m["payload"]["param"]["paramName"]: m["payload"]["param"]["paramValue"] for m in messages if m["type"] == "parameter_msg"}  # fmt: skip
    assert params["lr"] == 0.1


def trackio_rows(folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    with sqlite3.connect(folder / "p.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(name, step, json.loads(metrics)) for name, step, metrics in rows]


TRACKIO = """
import pickle, sys
from pathlib import Path
from levin.loggers import TrackioLogger
from tests.integrations.test_loggers import Line, loader, trainer
folder, epochs = Path(sys.argv[1]), int(sys.argv[2])
logger = TrackioLogger("p", name="r", prefix="x", auto_log_cpu=False)
trainer(folder, logger, max_epochs=epochs).fit(Line(), loader(3), ckpt_path="auto")
pickle.loads(pickle.dumps(logger)).log_metrics({"late": 1.0}, step=99)
logger.finalize("success")
"""


def test_trackio_is_read_back_and_goes_on(tmp_path):
    for epochs in (1, 2):
        run_program(TRACKIO, tmp_path, epochs, TRACKIO_DIR=str(tmp_path))
    rows = [(name, step) for name, step, metrics in trackio_rows(tmp_path) if "x-loss" in metrics]
    assert rows == [("r", step) for step in range(6)]
    with sqlite3.connect(tmp_path / "p.db") as database:
        (config,) = database.execute("select config from configs where run_name = 'r'").fetchone()
        # Another run of the same name would have a number of its own.
        assert len(database.execute("select distinct run_id from metrics").fetchall()) == 1
    assert json.loads(config)["lr"] == 0.1


TOGETHER = """
import sys
from pathlib import Path
from levin.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from tests.integrations.test_loggers import Line, loader, trainer
if __name__ == "__main__":
    folder, url = Path(sys.argv[1]), sys.argv[2]
    loggers = [
        CSVLogger(folder / "csv"), TensorBoardLogger(folder / "board"), TrackioLogger("p", name="r", auto_log_cpu=False),
        WandbLogger(save_dir=folder, offline=True, project="p"),
        MLFlowLogger("together", tracking_uri=url, save_dir=str(folder / "mlruns"), log_model=True),
    ]
    fit = trainer(folder, loggers, devices=2, strategy="ddp", max_epochs=1)
    fit.fit(Line(), loader(8))
    if fit.is_global_zero:
        loggers[-1].experiment.log_text(loggers[-1].run_id, "by hand", "note.txt")
"""


def test_all_at_once_on_two_ranks_write_once(server, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TOGETHER)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path), f"http://127.0.0.1:{server}"],
        capture_output=True, text=True, timeout=220, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TRACKIO_DIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = tmp_path.rglob("metrics.csv")
    steps = [int(row["step"]) for row in csv.DictReader(metrics.open())]
    assert steps == list(range(4))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    assert [event.step for event in EventAccumulator(str(events)).Reload().Scalars("loss")] == steps
    assert [step for _, step, metrics in trackio_rows(tmp_path) if "loss" in metrics] == steps
    assert len([row for row in wandb_history(wandb_records(tmp_path)) if "loss" in row]) == 4
    client = MLFlowLogger("together", tracking_uri=f"http://127.0.0.1:{server}").experiment
    runs = client.search_runs([client.get_experiment_by_name("together").experiment_id])
    (run,) = [run for run in runs if run.data.params]
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 4
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"epoch=0-step=4", "note.txt"}
