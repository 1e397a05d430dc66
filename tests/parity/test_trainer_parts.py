"""What a Trainer brings along and offers beside its four methods, on both frameworks."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset

from tests.parity import both
from tests.parity.trainer_runs import Watched, listening, plain, recording_data, view_all, without_own_key

CPU = {"accelerator": "cpu", "devices": 1}


def frameworks():
    return both.lightning(), both.levin()


# ---------------------------------------------------------------- callbacks


def made_callbacks(framework, names):
    callbacks = framework.module.callbacks
    makers = {
        "checkpoint": lambda: callbacks.ModelCheckpoint(monitor="val"),
        "second checkpoint": lambda: callbacks.ModelCheckpoint(),
        "own": lambda: type("Own", (framework.Callback,), {})(),
        "early": lambda: callbacks.EarlyStopping("val"),
        "bar": callbacks.TQDMProgressBar,
        "rich bar": callbacks.RichProgressBar,
        "summary": callbacks.ModelSummary,
        "timer": lambda: callbacks.Timer("00:01:00:00"),
        "rate": callbacks.LearningRateMonitor,
    }
    return [makers[name]() for name in names]


@pytest.mark.parametrize(
    "flags",
    [{}, {"max_time": "00:00:01:00"}, {"enable_progress_bar": False, "enable_model_summary": False}, {"barebones": True, "logger": None}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("own",),
        ("checkpoint", "own", "second checkpoint", "early"),
        ("bar", "summary", "timer"),
        ("rich bar", "rate"),
    ],
)
def test_default_callbacks_and_their_order(tmp_path, names, flags):
    results = []
    for framework in frameworks():
        if flags.get("barebones") and names and names != ("own",):
            pytest.skip("barebones refuses them; tested with the arguments")
        settings = {"logger": False, **CPU, "default_root_dir": tmp_path, **flags}
        if "bar" in " ".join(names):
            settings.pop("enable_progress_bar", None)
        with listening():
            trainer = framework.Trainer(callbacks=made_callbacks(framework, names), **settings)
        bar = trainer.progress_bar_callback
        results.append(
            [
                [type(callback).__name__ for callback in trainer.callbacks],
                [type(callback).__name__ for callback in trainer.checkpoint_callbacks],
                type(trainer.checkpoint_callback).__name__, type(trainer.early_stopping_callback).__name__,
                len(trainer.early_stopping_callbacks), type(bar).__name__,
            ]
        )  # fmt: skip
    assert results[0] == results[1]


def test_one_callback_needs_no_list(tmp_path):
    for framework in frameworks():
        own = type("Own", (framework.Callback,), {})()
        assert own in both.quiet(framework, tmp_path, callbacks=own).callbacks


def test_stateful_callbacks_of_one_key_are_refused(tmp_path):
    for framework in frameworks():
        names = {"state_dict": lambda self: {"a": 1}}
        Stateful = type("Stateful", (framework.Callback,), names)
        with listening(), pytest.raises(RuntimeError, match="Found more than one stateful callback"):
            both.quiet(framework, tmp_path, callbacks=[Stateful(), Stateful()])
        Keyed = type("Keyed", (framework.Callback,), {**names, "state_key": property(lambda self: f"k{id(self)}")})
        assert len(both.quiet(framework, tmp_path, callbacks=[Keyed(), Keyed()]).callbacks) == 2


FACTORIES = """
import importlib

def make(module, number):
    Extra = type("Extra", (importlib.import_module(module).Callback,), {})
    return Extra() if number == 1 else [Extra() for _ in range(number)]

def trainer_one(): return make("lightning.pytorch", 1)
def alone_two(): return make("pytorch_lightning", 2)
def fabric_three(): return [object()] * 3
def alone_four(): return [object()] * 4
def both(): return make("lightning.pytorch", 5)
"""
ENTRY_POINTS = """
[lightning.pytorch.callbacks_factory]
a = factories:trainer_one
b = factories:both
[pytorch_lightning.callbacks_factory]
c = factories:alone_two
d = factories:both
[lightning.fabric.callbacks_factory]
e = factories:fabric_three
[lightning_fabric.callbacks_factory]
f = factories:alone_four
"""


@pytest.mark.parametrize(
    ("framework", "of_trainer", "of_fabric"),
    [("lightning", 1 + 5, 3), ("levin", 1 + 2 + 5, 3 + 4)],  # levin is in the place of lightning, and of its two halves
)
def test_installed_packages_add_callbacks(tmp_path, framework, of_trainer, of_fabric):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "extra-1.0.dist-info").mkdir()
    (tmp_path / "extra-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: extra\nVersion: 1.0\n")
    (tmp_path / "extra-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    program = """
        import lightning.pytorch as pl, lightning
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False)
        print(len(trainer.callbacks), len(lightning.Fabric(accelerator="cpu")._callbacks))
    """
    (tmp_path / "program.py").write_text(textwrap.dedent(program))
    command = [sys.executable, *(["-m", "levin"] if framework == "levin" else []), "program.py"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    run = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True, env=env)
    assert run.stdout.split() == [str(of_trainer), str(of_fabric)]


# ---------------------------------------------------------------- parts


def test_a_trainer_can_be_pickled_before_and_after_a_run(tmp_path):
    import levin

    trainer = levin.Trainer(
        **CPU, max_epochs=2, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False
    )
    copy = pickle.loads(pickle.dumps(trainer))
    assert (copy.max_epochs, copy.default_root_dir, copy.state.status) == (2, str(tmp_path), "initializing")
    with listening():
        trainer.fit(Plain(), both.loader(2))
    copy = pickle.loads(pickle.dumps(trainer))
    assert (copy.current_epoch, copy.global_step, copy.state.status) == (2, 4, "finished")
    assert copy.checkpoint_callback.best_model_path == trainer.checkpoint_callback.best_model_path


class Plain(both.levin().LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_init_module_makes_tensors_where_they_will_be(tmp_path, precision):
    results = []
    for framework in frameworks():
        trainer = both.quiet(framework, tmp_path, precision=precision)
        with trainer.init_module():
            layer = torch.nn.Linear(2, 2)
        torch.manual_seed(1)
        with trainer.init_module(empty_init=True):
            torch.nn.Linear(64, 64)
        state = torch.rand(1).item()  # skipped initialization takes no random numbers
        results.append((layer.weight.dtype, layer.weight.device, state, torch.get_default_dtype()))
    assert results[0] == results[1]


def test_print_prints_on_the_first_rank(tmp_path, capsys):
    for framework in frameworks():
        both.quiet(framework, tmp_path).print("hello", 3, sep="-", end="!\n")
        assert capsys.readouterr().out == "hello-3!\n"


def test_printing_leaves_other_ranks_silent(tmp_path, capsys, monkeypatch):
    import levin

    trainer = both.quiet(both.levin(), tmp_path)
    monkeypatch.setattr(levin.Trainer, "local_rank", property(lambda self: 1))
    trainer.print("hello")
    assert capsys.readouterr().out == ""


def test_a_plain_table_goes_on_in_the_next_line_between_rules_of_its_width():
    from levin.trainer.results_table import format_table

    for width, rule in ((80, "-" * 14), (10, "-" * 10)):
        lines = [rule, "title   DataLo", "         ader", rule, " loss    0.5", rule]
        assert list(format_table(["title", "DataLoader"], [["loss", "0.5"]], 6, width)) == lines


@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("num_loaders", [1, 2])
def test_the_table_of_results(tmp_path, capsys, monkeypatch, rich, num_loaders):
    monkeypatch.setenv("COLUMNS", "120")
    # Rich keeps the console that was made first, with the width of that moment.
    monkeypatch.setattr("rich._console", None)
    if not rich:
        import importlib.util

        import levin.trainer.results_table as ours

        find = importlib.util.find_spec
        monkeypatch.setattr(
            ours.importlib.util, "find_spec", lambda name, *args: None if name == "rich" else find(name, *args)
        )
        theirs_loop = pytest.importorskip("lightning.pytorch.loops.evaluation_loop")
        monkeypatch.setattr(theirs_loop, "_RICH_AVAILABLE", False)
    printed = []
    for framework in frameworks():

        class Metrics(framework.LightningModule):
            def test_step(self, batch, batch_idx, dataloader_idx=0):
                self.log("loss", float(dataloader_idx) + 0.5)
                self.log("a_rather_long_name_of_a_metric", 2.0)

        trainer = both.quiet(framework, tmp_path)
        with listening():
            trainer.test(Metrics(), [both.loader(1)] * num_loaders)
            shown = capsys.readouterr().out
            trainer.test(Metrics(), [both.loader(1)] * num_loaders, verbose=False)
        assert capsys.readouterr().out == ""
        printed.append(
            [
                [cell.strip() for cell in line.replace("│", " ").split("  ") if cell.strip()]
                for line in shown.splitlines()
                if any(char.isalnum() for char in line)
            ]
        )
    assert printed[0] == printed[1]


@pytest.mark.parametrize("width", [21, 32, 53, 80])
def test_a_table_of_results_that_does_not_fit_fills_the_terminal(capsys, monkeypatch, width):
    from levin.trainer.results_table import print_results

    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("rich._console", None)
    print_results([{"a_name" * 20: 0.5}, {"a_name" * 20: 1.5}], "test")
    # One border more than columns, which are all of one width.
    assert max(map(len, capsys.readouterr().out.splitlines())) == (width if width % 2 else width - 1)


def test_brackets_in_names_of_results_are_printed(capsys, monkeypatch):
    from levin.trainer.results_table import print_results

    monkeypatch.setattr("rich._console", None)
    print_results([{"accuracy [bold] of all": 0.5}], "test")
    assert "accuracy [bold] of all" in capsys.readouterr().out


ESTIMATES = [
    {"max_epochs": 3}, {"max_epochs": -1}, {"max_epochs": -1, "max_steps": 5}, {"max_epochs": 3, "max_steps": 5}, {"max_epochs": 0},
    {"max_epochs": 3, "accumulate_grad_batches": 3}, {"max_epochs": 2, "limit_train_batches": 0.5}, {"max_epochs": 2, "limit_train_batches": 1},
    {"fast_dev_run": 2}, {"max_epochs": 2, "overfit_batches": 1}, {},
]  # fmt: skip


@pytest.mark.parametrize("flags", ESTIMATES, ids=str)
def test_estimated_stepping_batches(tmp_path, flags):
    results = []
    for framework in frameworks():
        calls: list = []
        module, _ = both.recording_module(framework, [])
        seen = []

        def configure_optimizers(module=module, seen=seen):
            seen.append(module.trainer.estimated_stepping_batches)
            return torch.optim.SGD(module.parameters(), 0.1)

        module.configure_optimizers = configure_optimizers
        trainer = both.quiet(framework, tmp_path, **flags)
        module.on_train_batch_end = lambda *args, trainer=trainer: setattr(trainer, "should_stop", True)
        with listening():
            trainer.fit(module, datamodule=recording_data(framework, calls))
        results.append((seen, trainer.estimated_stepping_batches, calls))
    assert results[0] == results[1]


def test_estimated_stepping_batches_without_a_length(tmp_path):
    class Few(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([torch.ones(4)] * 3)

    for flags, expected in (
        ({"max_epochs": 2}, -1),
        ({"max_epochs": 2, "max_steps": 4}, 4),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
    ):
        results = []
        for framework in frameworks():
            seen: list = []
            module, _ = both.recording_module(framework, [], log=False)
            module.training_step = lambda batch, batch_idx, module=module: module.layer(batch).mean()
            module.on_train_start = lambda module=module, seen=seen: seen.append(
                module.trainer.estimated_stepping_batches
            )
            with listening():
                both.quiet(framework, tmp_path, **flags).fit(module, DataLoader(Few()))
            results.append(seen)
        assert results[0] == results[1] == [expected]


def test_setters(tmp_path):
    results = []
    for framework in frameworks():
        trainer = both.quiet(framework, tmp_path)
        seen = []
        for stage in ("training", "validating", "testing", "predicting", "sanity_checking"):
            setattr(trainer, stage, True)
            seen.append(
                (
                    [
                        getattr(trainer, name)
                        for name in ("training", "validating", "testing", "predicting", "sanity_checking", "evaluating")
                    ],
                    trainer.state.stage.value,
                )
            )
            setattr(trainer, stage, False)
            seen.append(trainer.state.stage)
        logger = both.recording_logger(framework, both.Lines())
        trainer.logger = logger
        assert trainer.loggers == [logger]
        trainer.loggers = [logger, logger]
        assert trainer.logger is logger
        trainer.optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)]
        seen.append(len(trainer.optimizers))
        trainer.should_stop = True
        results.append(seen)
    assert results[0] == results[1]


# ---------------------------------------------------------------- data


def shuffled(seed: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    data = TensorDataset(torch.randn(8, 4, generator=generator))
    return DataLoader(data, batch_size=2, shuffle=True)


@pytest.mark.parametrize("flags", [{"overfit_batches": 2}, {"overfit_batches": 0.5}, {}], ids=str)
def test_overfitting_reads_the_same_batches_in_order(tmp_path, flags):
    results = []
    for framework in frameworks():
        module, _ = both.recording_module(framework, [])
        seen = []
        module.on_train_batch_start = lambda batch, batch_idx, seen=seen: seen.append(("train", batch[0].sum().item()))
        module.on_validation_batch_start = lambda batch, batch_idx, *rest, seen=seen: seen.append(
            ("val", batch[0].sum().item())
        )
        module.on_test_batch_start = lambda batch, batch_idx, *rest, seen=seen: seen.append(
            ("test", batch[0].sum().item())
        )
        trainer = both.quiet(framework, tmp_path, max_epochs=2, **flags)
        with listening() as heard:
            torch.manual_seed(7)
            trainer.fit(module, shuffled(1), shuffled(2))
            samplers = [type(loader.sampler) for loader in (trainer.train_dataloader, trainer.val_dataloaders)]
            trainer.test(module, shuffled(3))
            samplers.append(type(trainer.test_dataloaders.sampler))
        warned = sum("overfit" in line.lower() for line in heard["warnings"])
        results.append((seen, samplers, warned, view_all(trainer)))
    assert results[0] == results[1]
    sampler = SequentialSampler if flags else RandomSampler
    assert results[1][1] == [sampler, sampler, RandomSampler]


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_when_loaders_are_asked_for_again(tmp_path, n):
    results = []
    for framework in frameworks():
        calls: list = []
        module, callback = both.recording_module(framework, calls)
        trainer = both.quiet(
            framework,
            tmp_path,
            max_epochs=5,
            callbacks=[callback],
            reload_dataloaders_every_n_epochs=n,
            check_val_every_n_epoch=2,
            num_sanity_val_steps=0,
        )
        with listening():
            trainer.fit(module, datamodule=recording_data(framework, calls))
        results.append(calls)
    assert results[0] == results[1]


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("steps", [1, 2, -1])
def test_the_sanity_check_leaves_nothing_behind(tmp_path, steps):
    results = []
    for framework in frameworks():
        states: dict[int, list] = {0: [], steps: []}
        for count in (0, steps):

            def act(number, call, at_start=states[count]):
                if call[1] == "validation_step":
                    random.random(), np.random.rand(), torch.rand(1)
                if call[:2] == ("C", "on_train_start"):
                    at_start.append(random_states())

            lines = both.Lines()
            calls = Watched(act)
            module, callback = both.recording_module(framework, calls)
            during: list = []

            def look(module=module, during=during):
                trainer = module.trainer
                during.append(
                    [
                        plain(dict(trainer.callback_metrics)),
                        trainer.sanity_checking,
                        plain(dict(trainer.logged_metrics)),
                    ]
                )

            module.on_validation_end = look
            module.on_train_start = look
            checkpoint = framework.module.callbacks.ModelCheckpoint(
                monitor="val", filename="{epoch}-{step}-" + str(count)
            )
            trainer = both.quiet(
                framework, tmp_path, max_epochs=1, num_sanity_val_steps=count, callbacks=[callback, checkpoint],
                logger=both.recording_logger(framework, lines), log_every_n_steps=1, enable_checkpointing=True,
            )  # fmt: skip
            random.seed(3), np.random.seed(3), torch.manual_seed(3)
            with listening():
                trainer.fit(module, both.loader(2), both.loader(4, seed=5))
        assert states[0][0][:2] == states[steps][0][:2]
        if framework.name == "levin":
            assert states[0] == states[steps]
        results.append((without_own_key(calls), list(lines), during, trainer.num_sanity_val_batches, view_all(trainer)))
    for theirs, ours in zip(*results):
        assert ours == theirs


# ---------------------------------------------------------------- torch.compile


@pytest.mark.filterwarnings("ignore")
class Batches:
    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        return iter([torch.ones(size, 4) for size in self.sizes])


@pytest.mark.parametrize("options", [{}, {"dynamic": False}, {"dynamic": True}, {"fullgraph": True}], ids=str)
def test_a_compiled_module_runs_compiled_as_the_user_asked(tmp_path, options):
    seen = []
    for framework in frameworks():

        class Compiled(framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).sum()

            def validation_step(self, batch, batch_idx):
                self.layer(batch).sum()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.1)

        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append([tuple(each.shape) if isinstance(each, torch.Tensor) else "any size" for each in inputs])
            return graph.forward

        torch._dynamo.reset()
        module = Compiled()
        trainer = both.quiet(framework, tmp_path, max_epochs=1)
        with listening():
            trainer.fit(torch.compile(module, backend=backend, **options), Batches(4, 4, 2), Batches(4, 3))
        assert trainer.lightning_module is module
        assert trainer.global_step == 3
        seen.append(graphs)
    assert seen[0] == seen[1] and seen[0]
    assert ("any size" in sum(seen[1], [])) is (options.get("dynamic") is not False)


def test_a_full_graph_that_cannot_be_is_an_error(tmp_path):
    class Broken(both.levin().LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            torch._dynamo.graph_break()
            return self.layer(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    for options in ({}, {"fullgraph": True}):
        torch._dynamo.reset()
        problem = pytest.raises(torch._dynamo.exc.Unsupported) if options else contextlib.nullcontext()
        with listening(), problem:
            compiled = torch.compile(Broken(), backend="eager", **options)
            both.quiet(both.levin(), tmp_path, max_epochs=1).fit(compiled, Batches(2))


def test_a_step_that_was_set_on_a_compiled_module_is_there_afterwards(tmp_path):
    from levin.trainer.compiled import to_uncompiled

    module = Plain()
    module.validation_step = own = lambda batch, batch_idx: None
    with listening():
        compiled = torch.compile(module, backend="eager")
        trainer = both.quiet(both.levin(), tmp_path, max_epochs=1)
        trainer.fit(compiled, both.loader(2))
        trainer.fit(compiled, both.loader(2))
    assert vars(module)["validation_step"] is not own
    assert to_uncompiled(module) is module
    assert vars(module)["validation_step"] is own and "training_step" not in vars(module)


def test_a_compiled_module_needs_a_strategy_that_knows_how():
    from levin.strategies import Strategy
    from levin.trainer.entry import _uncompiled

    class Elsewhere(Strategy):
        def __init__(self) -> None:
            """Nothing of it is used."""

    Elsewhere.__abstractmethods__ = frozenset()
    with pytest.raises(RuntimeError, match="received Elsewhere"):
        _uncompiled(torch.compile(Plain(), backend="eager"), Elsewhere())


def test_a_module_of_another_kind_is_refused(tmp_path):
    for framework in frameworks():
        with listening(), pytest.raises(TypeError, match="must be a `LightningModule`"):
            both.quiet(framework, tmp_path).fit(torch.nn.Linear(1, 1), both.loader(1))


class Numbers(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.full((4,), float(index))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 2}, {"batch_size": 2, "shuffle": True}, {"batch_size": 4, "drop_last": True}, {"batch_size": None}],
    ids=str,
)
def test_loaders_to_predict_on_keep_every_example_in_their_order(tmp_path, options):
    results = []
    for framework in frameworks():
        module, _ = both.recording_module(framework, [])
        module.predict_step = lambda batch, batch_idx: batch
        trainer = both.quiet(framework, tmp_path)
        with listening():
            torch.manual_seed(5)
            predictions = trainer.predict(module, DataLoader(Numbers(), **options))
        loader = trainer.predict_dataloaders
        results.append(
            (
                plain(predictions),
                type(loader.sampler).__name__,
                type(loader.batch_sampler).__name__.strip("_"),
                loader.drop_last,
            )
        )
    assert [result[0] for result in results] == [results[0][0]] * 2
    assert results[0][1] == results[1][1] and results[0][3] == results[1][3]


def fit_that_asks(framework, tmp_path, ask, where, with_val=True):
    """Ask for something of the trainer in a hook; return what happened in which order."""
    seen: list = []

    class Asks(framework.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def hears(self, name):
            seen.append(name)
            if name == where:
                seen.append(ask(self.trainer))

        def setup(self, stage):
            self.hears("setup")

        def on_fit_start(self):
            self.hears("on_fit_start")

        def on_train_start(self):
            self.hears("on_train_start")

        def on_train_batch_start(self, batch, batch_idx):
            self.hears(f"batch {batch_idx}")

        def on_validation_start(self):
            self.hears("validation")

        def train_dataloader(self):
            seen.append("train_dataloader")
            return both.loader(5)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).mean()

        def configure_optimizers(self):
            self.hears("configure_optimizers")
            return torch.optim.SGD(self.parameters(), lr=0.1)

    if with_val:
        Asks.val_dataloader = lambda self: (seen.append("val_dataloader"), both.loader(3))[1]
        Asks.validation_step = lambda self, batch, batch_idx: None
    trainer = both.quiet(framework, tmp_path, max_epochs=2, num_sanity_val_steps=0)
    with listening():
        trainer.fit(Asks())
    return seen


@pytest.mark.parametrize(("stage", "with_val"), [("train", True), ("train", False), ("val", True)])
@pytest.mark.parametrize("where", ["setup", "configure_optimizers", "on_fit_start", "on_train_start"])
def test_data_are_loaded_when_a_hook_asks_for_them(tmp_path, where, stage, with_val):
    def ask(trainer):
        loop = trainer.fit_loop if stage == "train" else trainer.fit_loop.epoch_loop.val_loop
        answer = loop.setup_data()
        loaders = (trainer.train_dataloader, trainer.val_dataloaders)
        return answer, trainer.num_training_batches, trainer.num_val_batches, [type(each).__name__ for each in loaders]

    theirs, ours = (fit_that_asks(framework, tmp_path, ask, where, with_val) for framework in frameworks())
    assert ours == theirs
    assert ours.count("train_dataloader") == 1


def test_the_loader_that_a_module_gives_can_be_asked_for_before_it_is_due(tmp_path):
    """Opacus makes it a private one together with the optimizer."""

    def ask(trainer):
        return [len(batch[0]) for batch in trainer.fit_loop._data_source.dataloader()]

    theirs, ours = (fit_that_asks(framework, tmp_path, ask, "configure_optimizers") for framework in frameworks())
    assert ours == theirs and [2] * 5 in ours


def test_data_that_are_not_there_are_not_loaded(tmp_path):
    """Lightning ends in an AttributeError."""
    seen = fit_that_asks(both.levin(), tmp_path, lambda t: t.fit_loop.epoch_loop.val_loop.setup_data(), "setup", False)
    assert seen[:3] == ["setup", None, "configure_optimizers"]


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_data_of_other_methods_are_loaded_when_a_hook_asks_for_them(tmp_path, method):
    results = []
    for framework in frameworks():
        module, calls = both.recording_module(framework, [])
        trainer = both.quiet(framework, tmp_path)
        asked = []

        def setup(stage, trainer=trainer, asked=asked):
            loop = getattr(trainer, f"{method}_loop")
            asked.append((loop.setup_data(), list(loop.max_batches)))

        module.setup = setup
        with listening():
            trainer.validate_loop.setup_data()  # there is nothing yet
            getattr(trainer, method)(module, both.loader(3))
        results.append(asked)
    assert results == [[(None, [3])]] * 2


@pytest.mark.parametrize("every", [1, 2, 3, 5])
@pytest.mark.parametrize("where", ["on_train_start", "batch 0", "batch 1"])
def test_how_often_validation_runs_may_be_set_while_it_trains(tmp_path, where, every):
    def ask(trainer):
        trainer.val_check_batch = every

    theirs, ours = (fit_that_asks(framework, tmp_path, ask, where) for framework in frameworks())
    assert ours == theirs
    assert ours.count("validation") == 2 * (5 // every) - (where == "batch 1" and every == 1)
