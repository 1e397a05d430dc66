"""The same calls on the loggers of Lightning and of levin: files, folders, columns, events, errors."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.plugins.hparams import plugin_data_pb2

from tests.parity import both

FRAMEWORKS = ["lightning", "levin"]


def framework(name: str) -> SimpleNamespace:
    found = both.lightning() if name == "lightning" else both.levin()
    if name == "lightning":
        from lightning.pytorch import loggers
    else:
        from levin import loggers
    found.loggers = loggers
    return found


def on_both(run, tmp_path):
    results = []
    for name in FRAMEWORKS:
        folder = tmp_path / name
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            old = os.getcwd()
            os.chdir(folder)
            try:
                results.append(run(framework(name)))
            finally:
                os.chdir(old)
    return results


def tree() -> dict[str, object]:
    """Every file below the working directory with its content in a form that can be compared."""
    found: dict[str, object] = {}
    for directory, _, names in os.walk("."):
        for name in names:
            path = os.path.join(directory, name)
            if name.startswith("events.out.tfevents"):
                found.setdefault(os.path.join(directory, "events"), []).append(None)
            elif name == "hparams.yaml":
                found[path] = yaml.safe_load(Path(path).read_text())
            elif name == "metrics.csv":
                found[path] = Path(path).read_bytes()
            else:
                found[path] = None
    for path in list(found):
        if path.endswith("/events"):
            found[path] = len(found[path]), tuple(sorted(scalars(os.path.dirname(path)).items()))
    return found


def scalars(directory: str) -> dict[str, tuple]:
    accumulator = EventAccumulator(directory, size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: tuple((event.step, event.value) for event in accumulator.Scalars(tag))
        for tag in accumulator.Tags()["scalars"]
    }


def hparams(directory: str) -> list:
    """The hyper-parameter records in the event files."""
    found = []
    for name in sorted(os.listdir(directory)):
        if not name.startswith("events"):
            continue
        for event in LegacyEventFileLoader(os.path.join(directory, name)).Load():
            for value in event.summary.value:
                plugin = value.metadata.plugin_data
                if plugin.plugin_name == "hparams":
                    data = plugin_data_pb2.HParamsPluginData.FromString(plugin.content)
                    start = {key: str(item) for key, item in data.session_start_info.hparams.items()}
                    infos = [(info.name, info.type) for info in data.experiment.hparam_infos]
                    metrics = [info.name.tag for info in data.experiment.metric_infos]
                    found.append((value.tag, start, infos, metrics, data.session_end_info.status))
    return found


def names_of(logger) -> list:
    return [getattr(logger, name) for name in ("name", "version", "save_dir", "root_dir", "log_dir", "group_separator")]


PLACES = [
    {}, {"name": ""}, {"name": None}, {"name": "n/m"}, {"version": 3}, {"version": "abc"}, {"prefix": "pre"},
    {"name": "x", "version": ""},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
@pytest.mark.parametrize("kwargs", PLACES, ids=str)
def test_folders_and_files(tmp_path, kind, kwargs):
    def run(f):
        seen = []
        for _ in range(2):
            logger = getattr(f.loggers, kind)("logs", **kwargs)
            seen.append(names_of(logger))
            logger.log_metrics({"loss": 1.5, "acc": torch.tensor(0.5)}, step=1)
            logger.log_hyperparams({"lr": 0.1, "net": {"width": 8}})
            logger.save()
            seen.append(sorted(tree()))
            logger.finalize("success")
        return seen, tree()

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_existing_folders(tmp_path):
    def run(f):
        for name in ("version_x", "version_7_a", "version_9"):
            os.makedirs(f"logs/lightning_logs/{name}")
        Path("logs/lightning_logs/version_12").touch()
        return f.loggers.CSVLogger("logs").version, f.loggers.TensorBoardLogger("logs").version

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs == (10, 10)


ROWS = [
    ({"z": 1, "a": torch.tensor(2.0), "i": 3}, 0),
    ({"b": float("nan"), "a": torch.tensor(2)}, 1),
    ({"b": float("inf"), "c": True}, 5),
    ({"text": 'with "quotes", commas', "none": None, "list": [1, 2]}, 6),
    ({"step": 55, "c": 1e-12}, 8),
    ({}, 9),
]


@pytest.mark.parametrize("save_every", [1, 2, 6])
@pytest.mark.parametrize("flush_every", [1, 3, 100])
def test_csv_files_at_every_moment(tmp_path, save_every, flush_every):
    def run(f):
        logger = f.loggers.CSVLogger("logs", flush_logs_every_n_steps=flush_every)
        seen = []
        for number, (row, step) in enumerate(ROWS):
            logger.log_metrics(dict(row), step=step)
            if (number + 1) % save_every == 0:
                logger.save()
            seen.append(tree())
        logger.finalize("success")
        return [*seen, tree()]

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_csv_rows_without_a_step(tmp_path):
    def run(f):
        logger = f.loggers.CSVLogger("logs")
        for value in range(4):
            logger.log_metrics({"a": value})
        logger.finalize("success")
        return tree()

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_csv_hyperparameters_are_merged(tmp_path):
    def run(f):
        logger = f.loggers.CSVLogger("logs")
        logger.log_hyperparams({"a": 1, "b": [1, 2], "c": {"d": None}})
        logger.save()
        first = tree()
        logger.log_hyperparams({"a": 2})
        logger.log_hyperparams()
        logger.save()
        return first, tree()

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_unused_loggers(tmp_path):
    def run(f):
        f.loggers.CSVLogger("logs").finalize("success")
        return tree(), os.listdir(".")

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_tensorboard_scalars(tmp_path):
    def run(f):
        logger = f.loggers.TensorBoardLogger("logs")
        logger.log_metrics({"a": 1, "b": torch.tensor(2.0), "bool": True, "long": 1 / 3}, step=3)
        logger.log_metrics({"d": {"x": 1.0, "y": torch.tensor(2.0)}}, step=4)
        logger.log_metrics({"n": 1})
        logger.save()
        middle = tree()
        logger.log_metrics({"n": 2}, step=10**6)
        logger.finalize("success")
        return middle, tree()

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize("value", ["text", None])
def test_tensorboard_refuses_texts(tmp_path, value):
    def run(f):
        with pytest.raises(ValueError) as error:
            f.loggers.TensorBoardLogger("logs").log_metrics({"a": value}, step=1)
        return error.type.__name__

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


HPARAMS = [
    {"i": 1, "f": 1.5, "b": True, "s": "q", "n": None},
    {"a": {"b": {"c": 1}}, "l": [1, 2], "t": (1, 2), "ld": [{"a": 1}, {"b": 2}]},
    {"p": Path("x"), "cls": torch.nn.ReLU, "m": torch.nn.ReLU()},
    {"empty": {}},
    {1: 2, "z": {3: 4}},
    {},
]


@pytest.mark.parametrize("params", HPARAMS, ids=str)
def test_tensorboard_hyperparameters(tmp_path, params):
    def run(f):
        logger = f.loggers.TensorBoardLogger("logs")
        logger.log_hyperparams(params)
        logger.finalize("success")
        return hparams(logger.log_dir)

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize(
    "kwargs",
    [
        {"default_hp_metric": False}, {"metrics": {"m": 3.0}}, {"metrics": 5.0, "step": 9}, {"metrics": {"m": 1, "k": 2}, "step": 9},
        {"prefix": "pre"}, {"sub_dir": "sub"}, {"prefix": "pre", "metrics": {"m": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_tensorboard_metrics_of_hyperparameters(tmp_path, kwargs):
    def run(f):
        options = {key: kwargs[key] for key in kwargs if key not in ("metrics", "step")}
        logger = f.loggers.TensorBoardLogger("logs", **options)
        logger.log_hyperparams({"x": 1}, **{key: kwargs[key] for key in kwargs if key in ("metrics", "step")})
        logger.save()
        logger.finalize("success")
        records = hparams(logger.log_dir)
        return {path: value for path, value in tree().items() if value != (1, ())}, records

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_tensorboard_graph(tmp_path):
    def run(f):
        class Net(f.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
                self.example_input_array = torch.zeros(1, 2)

            def forward(self, x):
                return self.layer(x)

        logger = f.loggers.TensorBoardLogger("logs", log_graph=True)
        logger.log_graph(Net())
        logger.finalize("success")
        accumulator = EventAccumulator(logger.log_dir)
        accumulator.Reload()
        return sorted((node.name, node.op) for node in accumulator.Graph().node)

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_dummies():
    def run(logger_module):
        logger = logger_module.DummyLogger()
        names = [getattr(logger, name) for name in ("name", "version", "save_dir", "log_dir", "root_dir")]
        calls = [logger.foo(1, a=2), logger.log_metrics(1, 2, x=3), logger.experiment.x(1), logger[0] is logger]
        return names, calls

    from lightning.pytorch.loggers import logger as theirs

    from levin.loggers import logger as ours

    assert run(ours) == run(theirs)


# ---- with the Trainer ----


def module_of(f, with_hparams: bool):
    class Net(f.LightningModule):
        def __init__(self, lr=0.1, options=None):
            super().__init__()
            if with_hparams:
                self.save_hyperparameters()
            torch.manual_seed(1)
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log("group/plain", loss * 2)
            return loss

        def validation_step(self, batch, batch_idx):
            self.log("val", self.layer(batch[0]).mean())
            self.log("val_step", batch_idx * 1.0, on_step=True)

        def test_step(self, batch, batch_idx):
            self.log("test", self.layer(batch[0]).mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net(options={"a": 1})


def rounded(value):
    if isinstance(value, bytes):
        lines = []
        for line in value.decode().split("\r\n"):
            lines.append(
                [f"{float(cell):.5f}" if cell.replace(".", "").isdigit() else cell for cell in line.split(",")]
            )
        return lines
    if isinstance(value, tuple):
        return tuple(round(item, 5) if isinstance(item, float) else rounded(item) for item in value)
    return value


@pytest.mark.parametrize("with_hparams", [False, True])
@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_a_fit_and_a_test(tmp_path, kind, with_hparams):
    def run(f):
        logger = getattr(f.loggers, kind)("logs")
        trainer = both.quiet(
            f,
            tmp_path,
            logger=logger,
            max_epochs=2,
            log_every_n_steps=2,
            enable_checkpointing=True,
            default_root_dir="root",
        )
        module = module_of(f, with_hparams)
        trainer.fit(module, both.loader(5), both.loader(2, seed=5))
        trainer.test(module, both.loader(2, seed=6), verbose=False)
        return trainer.log_dir, {path: rounded(value) for path, value in tree().items()}

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_two_loggers_and_the_default_one(tmp_path):
    def run(f):
        seen = []
        for logger in ([f.loggers.CSVLogger("a"), f.loggers.TensorBoardLogger("b", version="v")], True, False):
            trainer = both.quiet(
                f,
                tmp_path,
                logger=logger,
                max_epochs=1,
                log_every_n_steps=1,
                enable_checkpointing=True,
                default_root_dir="root",
            )
            trainer.fit(module_of(f, True), both.loader(3), both.loader(2, seed=5))
            seen.append(trainer.log_dir.replace(os.getcwd(), "."))
        return seen, {path: rounded(value) for path, value in tree().items()}

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


def test_a_dry_run_writes_nothing(tmp_path):
    def run(f):
        loggers = [f.loggers.CSVLogger("a"), f.loggers.TensorBoardLogger("b")]
        trainer = both.quiet(f, tmp_path, logger=loggers, fast_dev_run=True, default_root_dir="root")
        trainer.fit(module_of(f, True), both.loader(3), both.loader(2, seed=5))
        return tree(), trainer.log_dir, [type(logger).__name__ for logger in trainer.loggers]

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs


@pytest.mark.parametrize("with_hparams", [False, True])
def test_a_logger_is_told_to_save_after_all_that_it_was_given(tmp_path, with_hparams):
    def run(f):
        calls = []

        class Told(f.Logger):
            name, version = "told", 0

            def log_metrics(self, metrics, step=None):
                calls.append(("metrics", sorted(metrics), step))

            def log_hyperparams(self, params, *args, **kwargs):
                calls.append("hyperparameters")

            def log_graph(self, model, *args, **kwargs):
                calls.append("graph")

            def save(self):
                calls.append("save")

        trainer = both.quiet(f, tmp_path, logger=Told(), max_epochs=2, log_every_n_steps=2, default_root_dir="root")
        trainer.fit(module_of(f, with_hparams), both.loader(5), both.loader(2, seed=5))
        trainer.test(module_of(f, with_hparams), both.loader(2, seed=6), verbose=False)
        return calls

    theirs, ours = on_both(run, tmp_path)
    assert ours == theirs
    assert "save" in ours


class Kept:
    """What each of several loggers got."""

    def __init__(self, lib):
        self.before, self.after = both.Lines(), both.Lines()
        self.first, self.second = both.recording_logger(lib, self.before), both.recording_logger(lib, self.after)


@pytest.mark.parametrize("how", ["from none", "to none", "to another"])
@pytest.mark.parametrize(
    "hook",
    [
        "setup",
        "on_fit_start",
        "on_train_start",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_validation_epoch_start",
    ],
)
def test_loggers_that_a_hook_exchanges_get_what_is_logged_from_then_on(tmp_path, hook, how):
    def run(lib):
        kept = Kept(lib)

        def exchange(self, trainer, *args, **kwargs):
            if trainer.current_epoch == 1 or hook in ("setup", "on_fit_start", "on_train_start"):
                trainer.loggers = [] if how == "to none" else [kept.second]

        exchanger = type("Exchanger", (lib.Callback,), {hook: exchange})()
        trainer = both.quiet(
            lib, tmp_path, max_epochs=3, log_every_n_steps=1, callbacks=[exchanger],
            logger=False if how == "from none" else kept.first,
        )  # fmt: skip
        trainer.fit(both.recording_module(lib, [])[0], both.loader(), both.loader(2))
        return [list(kept.before), list(kept.after)]

    theirs, ours = on_both(run, tmp_path)
    assert sum(map(len, theirs)) > 3 or how == "to none"
    assert ours == theirs
