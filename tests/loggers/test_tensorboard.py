from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import levin
from levin.loggers import TensorBoardLogger

# torch traces the graph with a tool that it calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")


def events(directory: str) -> EventAccumulator:
    accumulator = EventAccumulator(directory, size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(directory: str) -> dict[str, list[tuple[int, float]]]:
    accumulator = events(directory)
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


@pytest.mark.parametrize("value", ["text", None, [1, 2]])
def test_a_metric_that_is_no_number_is_told(tmp_path, value):
    with pytest.raises(
        ValueError, match=r"metrics\['a'\] must be a number, a tensor with one element or a dict of those"
    ):
        TensorBoardLogger(tmp_path).log_metrics({"a": value}, 0)


def test_folders_follow_name_version_and_sub_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SUB", "deep")
    logger = TensorBoardLogger(tmp_path)
    assert (logger.name, logger.version, logger.save_dir, logger.sub_dir) == ("lightning_logs", 0, str(tmp_path), None)
    assert logger.root_dir == str(tmp_path / "lightning_logs")
    assert logger.log_dir == str(tmp_path / "lightning_logs/version_0")
    assert TensorBoardLogger(tmp_path, name="", version="v", sub_dir="$SUB/x").log_dir == str(tmp_path / "v/deep/x")
    assert list(tmp_path.iterdir()) == []


def test_scalars_can_be_read_before_save(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="p")
    logger.log_metrics({"a": 1, "b": torch.tensor(2.5), "c": True, "n": np.float32(3)}, step=7)
    logger.log_metrics({"a": 2.0}, step=8)
    logger.log_metrics({"z": 2.0})
    assert scalars(logger.log_dir) == {
        "p-a": [(7, 1.0), (8, 2.0)], "p-b": [(7, 2.5)], "p-c": [(7, 1.0)], "p-n": [(7, 3.0)], "p-z": [(0, 2.0)],
    }  # fmt: skip
    logger.finalize("success")


def test_a_dict_is_drawn_as_several_lines(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"group": {"x": 1.0, "y": torch.tensor(2.0)}, "a": 3}, step=4)
    logger.save()
    assert scalars(logger.log_dir + "/group_x") == {"group": [(4, 1.0)]}
    assert scalars(logger.log_dir + "/group_y") == {"group": [(4, 2.0)]}
    assert scalars(logger.log_dir) == {"a": [(4, 3.0)]}
    logger.finalize("success")


@pytest.mark.parametrize("value", ["text", None, torch.zeros(2)])
def test_what_is_no_number_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"metrics\['a'\] must be a number"):
        TensorBoardLogger(tmp_path).log_metrics({"a": value}, step=1)


def test_the_experiment_is_a_summary_writer(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    logger = TensorBoardLogger(tmp_path, filename_suffix=".sfx", flush_secs=3, max_queue=5)
    assert isinstance(logger.experiment, SummaryWriter)
    logger.experiment.add_text("note", "hello", 1)
    logger.experiment.add_histogram("weights", torch.arange(10.0), 2)
    logger.experiment.add_image("picture", torch.zeros(3, 64, 64), 3)
    logger.experiment.add_scalar("s", 1.5, 4)
    tags = events(logger.log_dir).Tags()
    assert (
        tags["images"] == ["picture"] and tags["histograms"] == ["weights"] and tags["tensors"] == ["note/text_summary"]
    )
    assert scalars(logger.log_dir) == {"s": [(4, 1.5)]}
    assert all(name.endswith(".sfx") for name in os.listdir(logger.log_dir))
    logger.finalize("success")
    with pytest.raises(TypeError, match="nonsense"):
        TensorBoardLogger(tmp_path, nonsense=1).experiment


def test_purging_hides_later_steps(tmp_path):
    logger = TensorBoardLogger(tmp_path, version=0)
    for step in range(5):
        logger.log_metrics({"a": step}, step=step)
    logger.finalize("failed")
    logger = TensorBoardLogger(tmp_path, version=0, purge_step=3)
    logger.log_metrics({"a": 30}, step=3)
    logger.finalize("success")
    assert scalars(logger.log_dir)["a"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_hyperparameters_come_with_a_metric(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"lr": torch.tensor(0.5), "net": {"width": 8}, "names": ["a"]})
    logger.log_hyperparams(Namespace(seed=1), metrics={"score": 2}, step=3)
    logger.log_hyperparams({}, metrics=4.0)
    assert scalars(logger.log_dir) == {"hp_metric": [(0, -1.0), (0, 4.0)], "score": [(3, 2.0)]}
    logger.save()
    text = Path(logger.log_dir, "hparams.yaml").read_text()
    assert yaml.safe_load(text) == {"lr": 0.5, "net": {"width": 8}, "names": ["a"], "seed": 1}
    plugins = events(logger.log_dir).PluginTagToContent("hparams")
    assert set(plugins) == {"_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"}
    logger.finalize("success")
    quiet = TensorBoardLogger(tmp_path, default_hp_metric=False)
    quiet.log_hyperparams({"lr": 1})
    quiet.finalize("success")
    assert os.listdir(quiet.log_dir) == ["hparams.yaml"]


def test_hparams_file_is_written_when_there_is_news(tmp_path):
    logger = TensorBoardLogger(tmp_path, version="run")
    logger.save()
    path = Path(logger.log_dir, "hparams.yaml")
    assert path.read_text() == "{}\n"
    path.unlink()
    logger.save()
    assert not path.exists()
    logger.log_hyperparams({"a": 1})
    logger.save()
    assert path.read_text() == "a: 1\n"
    logger.finalize("success")
    TensorBoardLogger(tmp_path, version="run").save()
    assert path.read_text() == "a: 1\n"


def test_finalize_of_an_unused_logger_leaves_no_trace(tmp_path):
    TensorBoardLogger(tmp_path).finalize("success")
    assert list(tmp_path.iterdir()) == []


def test_a_logger_goes_on_after_finalize_and_after_pickling(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"a": 0}, step=0)
    logger.finalize("success")
    logger.log_metrics({"a": 1}, step=1)
    logger.finalize("success")
    logger = pickle.loads(pickle.dumps(logger))
    logger.log_metrics({"a": 2}, step=2)
    logger.finalize("success")
    assert scalars(logger.log_dir)["a"] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_killed_process_has_lost_no_event(tmp_path):
    script = """
        import os, signal
        from levin.loggers import TensorBoardLogger
        logger = TensorBoardLogger(".", version="run")
        for step in range(5):
            logger.log_metrics({"a": step}, step=step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [step for step, _ in scalars(str(tmp_path / "lightning_logs/run"))["a"]] == [0, 1, 2, 3, 4]


class Net(levin.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def test_the_graph_is_recorded_when_asked(tmp_path):
    model = Net()
    model.layer.eval()
    off = TensorBoardLogger(tmp_path)
    off.log_graph(model, torch.zeros(1, 2))
    assert list(tmp_path.iterdir()) == []
    logger = TensorBoardLogger(tmp_path, log_graph=True)
    with pytest.warns(UserWarning, match="example_input_array` attribute is not set"):
        logger.log_graph(model)
    with pytest.warns(UserWarning, match="a tensor or a tuple, received dict"):
        logger.log_graph(model, {"x": torch.zeros(1, 2)})
    model.example_input_array = torch.zeros(1, 2)
    logger.log_graph(model)
    assert events(logger.log_dir).Tags()["graph"]
    names = [node.name for node in events(logger.log_dir).Graph().node]
    assert "Net/Linear[layer]/weight/weight" in names
    assert model.training and not model.layer.training
    logger.finalize("success")
    plain = TensorBoardLogger(tmp_path, log_graph=True)
    plain.log_graph(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    assert events(plain.log_dir).Tags()["graph"]
    plain.finalize("success")


def test_a_remote_directory_uses_the_writer_of_tensorboard():
    import fsspec

    logger = TensorBoardLogger("memory://tb")
    logger.log_metrics({"a": 1.0, "b": 2}, step=3)
    logger.log_hyperparams({"lr": 1})
    logger.finalize("success")
    names = [Path(path).name for path in fsspec.filesystem("memory").ls("/tb/lightning_logs/version_0", detail=False)]
    assert "hparams.yaml" in names and any(name.startswith("events.out") for name in names)


def test_tensorboard_must_be_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("levin.loggers.tensorboard.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)


def test_tensorboardx_is_the_second_choice(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr("levin.loggers.tensorboard.find_spec", lambda name: None if name == "tensorboard" else name)
    logger = TensorBoardLogger(tmp_path)
    assert type(logger.experiment).__module__.startswith("tensorboardX")
    logger.log_metrics({"a": 1}, step=1)
    logger.log_hyperparams({"lr": 1})
    logger.finalize("success")
    assert scalars(logger.log_dir) == {"a": [(1, 1.0)], "hp_metric": [(0, -1.0)]}


def test_who_listens_to_torchs_writer_hears_of_the_values(tmp_path, monkeypatch):
    # As ClearML does.
    from torch.utils.tensorboard.writer import FileWriter

    heard, add_event = [], FileWriter.add_event

    def listen(self, event, step=None, walltime=None):
        heard.extend((value.tag, value.simple_value, step) for value in event.summary.value)
        add_event(self, event, step, walltime)

    monkeypatch.setattr(FileWriter, "add_event", listen)
    TensorBoardLogger(tmp_path).log_metrics({"loss": 0.5, "accuracy": 1}, step=3)
    assert heard == [("loss", 0.5, 3), ("accuracy", 1.0, 3)]


def test_who_puts_another_writer_of_files_in_place_hears_of_the_folder(tmp_path, monkeypatch):
    # As W&B does under sync_tensorboard=True.
    from torch.utils.tensorboard import writer

    heard = []

    class Listening(writer.EventFileWriter):
        def __init__(self, logdir, *args, **kwargs):
            heard.append(logdir)
            super().__init__(logdir, *args, **kwargs)

    monkeypatch.setattr(writer, "EventFileWriter", Listening)
    logger = TensorBoardLogger(tmp_path)
    logger.log_metrics({"loss": 0.5}, step=3)
    logger.finalize("success")
    assert heard == [logger.log_dir]
    assert scalars(logger.log_dir)["loss"] == [(3, 0.5)]
