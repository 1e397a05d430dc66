"""Private helpers that packages import: they do what those of the installed Lightning do."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.machinery
import os
import subprocess
import sys
import types
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from levin import LightningModule
from levin.checkpoint import TorchCheckpointIO
from levin.compat import private
from levin.compat.table import names_in
from tests.compat import programs
from tests.parity import both as parity


def theirs(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"lightning.{module}"), name)


def ours(module: str, name: str) -> Any:
    home, found = names_in(module)[name]
    return getattr(importlib.import_module(home), found)


def both(module: str, name: str) -> tuple[Any, Any]:
    return theirs(module, name), ours(module, name)


PARAMS = [{"a": {"b": 1, "c": [{"d": 2}]}, "e": Namespace(f=3)}, {}, {"x": {"y": {"z": "w"}}, "n": None}]


@pytest.mark.parametrize("delimiter", ["/", "."])
@pytest.mark.parametrize("parent", ["", "top"])
@pytest.mark.parametrize("params", [PARAMS[1], PARAMS[2]], ids=["empty", "nested"])
@pytest.mark.parametrize("module", ["fabric.utilities.logger", "pytorch.loggers.mlflow"])
def test_flattened_parameters(module, params, delimiter, parent):
    left, right = both(module, "_flatten_dict")
    assert right(params, delimiter=delimiter, parent_key=parent) == left(params, delimiter=delimiter, parent_key=parent)


@pytest.mark.parametrize("params", [None, Namespace(a=1), {"a": 1}], ids=str)
def test_converted_parameters(params):
    left, right = both("fabric.utilities.logger", "_convert_params")
    assert right(params) == left(params)


class NoName:
    def __call__(self, needed):
        raise AssertionError


def test_functions_among_parameters_are_called_or_named():
    left, right = both("fabric.utilities.logger", "_sanitize_callable_params")
    params = {"a": lambda: 3, "c": lambda: lambda: 1, "d": torch.nn.Linear, "e": 1, "f": lambda x: 1, "g": NoName()}
    assert right(params) == {**left({key: value for key, value in params.items() if key != "g"}), "g": "NoName"}


class Hooks:
    def named(self, a, dataloader_iter):
        pass

    def any(self, *args):
        pass

    def keyword(self, *, dataloader_iter):
        pass

    def rest(self, a, **kwargs):
        pass


@functools.wraps(Hooks.named)
def wrapped(*args, **kwargs):
    pass


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("min_args", [None, 1, 2, 3])
@pytest.mark.parametrize("name", ["named", "any", "keyword", "rest"])
def test_whether_a_hook_takes_an_argument(name, min_args, explicit):
    left, right = both("pytorch.utilities.signature_utils", "is_param_in_hook_signature")
    hook = getattr(Hooks(), name)
    for param in ("dataloader_iter", "a", "kwargs"):
        assert right(hook, param) == left(hook, param)
        arguments = {"explicit": explicit, "min_args": min_args}
        assert right(hook, param, **arguments) == left(hook, param, **arguments)
    assert right(wrapped, "dataloader_iter", explicit=True) == left(wrapped, "dataloader_iter", explicit=True)


def test_folders(tmp_path):
    left, right = both("fabric.utilities.cloud_io", "_is_dir")
    (tmp_path / "file").write_text("")
    local = fsspec.filesystem("file")
    for path in (tmp_path, tmp_path / "file", tmp_path / "none"):
        assert right(local, path) == left(local, path)
        assert right(local, path, strict=True) == left(local, path, strict=True)


def test_numbers_with_a_point_change_their_format():
    left, right = both("fabric.plugins.precision.utils", "_convert_fp_tensor")
    for dtype in (torch.float32, torch.int32, torch.float64, torch.bool):
        tensor = torch.ones(2, dtype=dtype)
        assert right(tensor, torch.float16).dtype == left(tensor, torch.float16).dtype


def test_the_time_that_groups_wait():
    left, right = both("fabric.plugins.collectives.torch_collective", "default_pg_timeout")
    assert right == left
    assert isinstance(right, timedelta)


class Model(LightningModule):
    pass


def test_a_module_is_taken_out_of_its_compiled_form():
    model = Model()
    assert private._maybe_unwrap_optimized(model) is model
    assert private._maybe_unwrap_optimized(torch.compile(model, backend="eager")) is model
    with pytest.raises(TypeError, match="received Linear"):
        private._maybe_unwrap_optimized(torch.nn.Linear(1, 1))
    with private._jit_is_scripting():
        assert model.training


def test_a_wrapper_of_a_checkpoint_io_hands_everything_on(tmp_path):
    class Counting(private._WrappingCheckpointIO):
        saved = 0

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            self.saved += 1
            super().save_checkpoint(checkpoint, path, storage_options)

    io = Counting()
    assert isinstance(io.checkpoint_io, TorchCheckpointIO)
    io.save_checkpoint({"a": torch.ones(1)}, tmp_path / "x.ckpt")
    assert io.load_checkpoint(tmp_path / "x.ckpt") == {"a": torch.ones(1)}
    assert io.saved == 1
    io.remove_checkpoint(tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


def test_weights_are_read_from_a_file_when_they_are_used(tmp_path):
    torch.save({"model": {"w": torch.arange(4.0)}}, tmp_path / "x.pth")
    loaded = private._lazy_load(tmp_path / "x.pth")
    assert loaded["model"]["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert not isinstance(loaded["model"]["w"], private._NotYetLoadedTensor)


def test_what_has_no_memory_gets_some():
    with torch.device("meta"):
        layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    private._materialize_meta_tensors(layer, torch.device("cpu"))
    assert layer[1].weight.tolist() == [1.0] * 4
    assert layer(torch.ones(2, 4)).isfinite().all()


@pytest.mark.parametrize(
    "asked",
    [
        {}, {"min_cuda_gpus": 1000}, {"min_torch": "99.0"}, {"max_torch": "1.0"}, {"min_python": "3.99"}, {"tpu": True},
        {"skip_windows": True}, {"standalone": True}, {"dynamo": True}, {"linux_only": True}, {"mps": False},
        {"min_cuda_gpus": 1000, "min_torch": "99", "standalone": True}, {"min_torch": "2.0", "max_torch": "99.0"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("module", ["fabric.utilities.testing", "pytorch.utilities.testing"])
def test_what_a_machine_lacks_for_a_test(module, asked):
    left, right = both(module, "_runif_reasons")
    assert right(**asked) == left(**asked)


def test_a_model_of_torchvision_by_its_name(monkeypatch):
    function = getattr(
        importlib.import_module(names_in("pytorch.utilities.model_helpers")["get_torchvision_model"][0]),
        "get_torchvision_model",
    )
    models = types.ModuleType("torchvision.models")
    models.get_model = lambda name, **options: (name, options)
    for name, module in (("torchvision", types.ModuleType("torchvision")), ("torchvision.models", models)):
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    assert function("resnet18", weights=None) == ("resnet18", {"weights": None})
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="get_torchvision_model.*torchvision"):
        function("resnet18")


def test_messages_of_levin_reach_the_logger_that_nemo_listens_to():
    left, right = both("pytorch", "_logger")
    assert left is right
    program = (
        "from levin.compat import install; install()\n"
        "import lightning.pytorch as pl, logging, sys\n"
        "pl._logger.addHandler(logging.StreamHandler(sys.stdout))\n"
        "pl.utilities.rank_zero_info('heard')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "heard\n"


def test_a_hook_of_the_module_is_called_by_its_name():
    class Model(LightningModule):
        def on_load_checkpoint(self, checkpoint, more=None):
            return self, checkpoint, more

    first, second = Model(), Model()
    _, call = both("pytorch.trainer.call", "_call_lightning_module_hook")
    trainer = types.SimpleNamespace(lightning_module=first)
    assert call(trainer, "on_load_checkpoint", {"a": 1}) == (first, {"a": 1}, None)
    assert call(trainer, "on_load_checkpoint", {}, pl_module=second, more=2) == (second, {}, 2)
    assert call(trainer, "unknown") is None


def test_classes_of_a_module_enter_a_registry():
    class Parent:
        @classmethod
        def enter(cls, registry):
            registry.append(cls)

    class Silent(Parent):
        pass

    class Child(Parent):
        @classmethod
        def enter(cls, registry):
            super().enter(registry)

    module = types.ModuleType("classes")
    vars(module).update(
        Parent=Parent, Silent=Silent, Child=Child, Grandchild=type("Grandchild", (Child,), {}), other=int
    )
    for function in both("fabric.utilities.registry", "_register_classes"):
        registry: list[type] = []
        function(registry, "enter", module, Parent)
        assert registry == [Child, module.Grandchild]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*num_workers")
@pytest.mark.parametrize("verbose", [True, False])
def test_a_loop_that_is_put_in_the_place_of_that_of_the_test_shows_the_results(tmp_path, verbose):
    shown = []
    loops = both("pytorch.loops.evaluation_loop", "_EvaluationLoop")
    stages = [both("pytorch.trainer.states", name) for name in ("TrainerFn", "RunningStage")]
    for framework, parent, fn, stage in zip((parity.lightning(), parity.levin()), loops, *stages):

        class Telling(parent):
            @staticmethod
            def _print_results(results, stage):
                seen.append(([{name: value.item() for name, value in each.items()} for each in results], str(stage)))

        class Model(framework.LightningModule):
            def test_step(self, batch, batch_idx):
                self.log("acc", 0.5)

        seen: list[Any] = []
        trainer = parity.quiet(framework, tmp_path)
        trainer.test_loop = Telling(trainer, fn.TESTING, stage.TESTING, verbose=verbose, inference_mode=True)
        seen.append(trainer.test(Model(), parity.loader(1)))
        seen.append(trainer.test(Model(), parity.loader(1), verbose=False))
        assert isinstance(trainer.validate_loop, parent) and not isinstance(3, parent)
        assert not isinstance(trainer.validate_loop, Telling)
        shown.append(seen)
    assert shown[0] == shown[1]
    assert len(shown[1]) == 3


def restored_in_the_middle(framework: types.SimpleNamespace, folder: Any) -> Any:
    """Train, and put module, data module, optimizer and scheduler back to an earlier file, as finetuning-scheduler does."""
    seen: list[Any] = []

    class Data(framework.DataModule):
        place = 0

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.arange(18.0).view(6, 3), batch_size=2)

        def state_dict(self):
            return {"place": self.place}

        def load_state_dict(self, state):
            seen.append(state)

    class Scaled(framework.Precision):
        scale = 1

        def state_dict(self):
            return {"scale": self.scale}

        def load_state_dict(self, state):
            seen.append(state)

    class Model(framework.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).pow(2).mean()

        def configure_optimizers(self):
            optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

        def on_load_checkpoint(self, checkpoint):
            seen.append(sorted(checkpoint["optimizer_states"][0]))

        def told(self):
            (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
            moments = [optimizer.state[p]["exp_avg"].flatten().tolist() for p in self.parameters()]
            seen.append((self.layer.weight.flatten().tolist(), moments, config.scheduler.last_epoch))

        def on_train_epoch_start(self):
            connector, epoch = self.trainer._checkpoint_connector, self.current_epoch
            if epoch == 1:
                self.told()
                self.trainer.save_checkpoint(folder / f"{framework.name}.ckpt")
                self.trainer.datamodule.place = 1
            if epoch == 2:
                connector.resume_start(checkpoint_path=folder / f"{framework.name}.ckpt")
                seen.append(sorted(connector._loaded_checkpoint)[:3])
                for part in ("datamodule", "model", "precision_plugin_state", "optimizers_and_schedulers"):
                    getattr(connector, f"restore_{part}")()
                connector.resume_end()
                seen.append(bool(connector._loaded_checkpoint))
                self.told()

    trainer = parity.quiet(framework, folder, max_epochs=3, plugins=[Scaled()])
    model = Model()
    trainer.fit(model, datamodule=Data())
    seen.append((model.layer.weight.flatten().tolist(), trainer.global_step, trainer.current_epoch))
    return seen


def test_a_checkpoint_is_restored_part_by_part_in_the_middle_of_a_fit(tmp_path):
    theirs, ours = (restored_in_the_middle(framework(), tmp_path) for framework in (parity.lightning, parity.levin))
    assert ours == theirs
    assert ours[0] == ours[-2]  # as it was when the file was saved


@pytest.mark.parametrize("given", [None, "kept"])
@pytest.mark.parametrize("has_logger", [False, True])
def test_where_checkpoints_will_be_is_known_before_a_fit(tmp_path, given, has_logger):
    def folder(name: str) -> str:
        pl = importlib.import_module(name)
        logger = importlib.import_module(f"{name}.loggers").CSVLogger(tmp_path) if has_logger else False
        trainer = pl.Trainer(default_root_dir=tmp_path, logger=logger, accelerator="cpu", enable_progress_bar=False)
        callback = importlib.import_module(f"{name}.callbacks").ModelCheckpoint(given and tmp_path / given)
        return str(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))

    assert folder("levin") == folder("lightning.pytorch")


def test_what_a_logger_has_not_sent_of_the_checkpoints(tmp_path):
    paths = [str(tmp_path / name) for name in ("latest", "best", "second", "gone")]
    for index, path in enumerate(paths[:3]):
        Path(path).touch()
        os.utime(path, (100 + index, 100 + index))
    scan_theirs, scan_ours = both("pytorch.loggers.utilities", "_scan_checkpoints")
    for module, scan in (("lightning.pytorch.callbacks", scan_theirs), ("levin.callbacks", scan_ours)):
        callback = importlib.import_module(module).ModelCheckpoint()
        callback.best_k_models = {path: torch.tensor(float(score)) for score, path in enumerate(paths[1:])}
        callback.best_model_path, callback.best_model_score = paths[1], torch.tensor(0.0)
        callback.last_model_path, callback.current_score = paths[0], torch.tensor(3.0)
        latest, best, second = (
            (100.0, paths[0], 3.0, "latest"),
            (101.0, paths[1], 0.0, "best_k"),
            (102.0, paths[2], 1.0, "best_k"),
        )
        assert scan(callback, {}) == [latest, best, second]
        assert scan(callback, {paths[1]: 101.0, paths[2]: 50.0}) == [latest, second]
        callback.last_model_path = paths[1]
        assert scan(callback, {paths[2]: 102.0}) == [best]


@pytest.mark.filterwarnings("ignore:.*newer than your current")
@pytest.mark.parametrize("target", [None, "1.6.0", "2.0.0"])
@pytest.mark.parametrize("version", ["1.3.0", "1.6.2", "2.3.0", "2.6.6", "2.9.0"])
def test_a_checkpoint_of_an_older_version_is_brought_to_the_present_layout(version, target):
    counters = {"current": {"completed": 3}, "total": {"completed": 7}}
    modern = {
        "fit_loop": {"epoch_loop.state_dict": {}, "epoch_loop.batch_loop.state_dict": {}, "epoch_progress": counters}
    }
    found = []
    for migrate in both("pytorch.utilities.migration", "migrate_checkpoint"):
        old = {"pytorch-lightning_version": version, "state_dict": {}, "epoch": 3, "global_step": 7, "callbacks": {}}
        if version != "1.3.0":
            old["loops"] = copy.deepcopy(modern)
        new, done = migrate(old, target)
        assert new is old
        found.append((new["pytorch-lightning_version"], new.get("legacy_pytorch-lightning_version"), list(done)))
    assert found[1] == found[0]
    if version == "1.3.0":
        assert new["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 3


@pytest.mark.parametrize("added", [{"b": 2}, Namespace(b=2), {"a": 5}])
def test_hyper_parameters_that_are_added_later(added):
    found = []
    for framework in parity.lightning(), parity.levin():

        class Model(framework.LightningModule):
            def __init__(self, a=1):
                super().__init__()
                self.save_hyperparameters()

        model = Model()
        model._set_hparams(added)
        with pytest.raises(ValueError):
            model._set_hparams("b")
        found.append((dict(model.hparams), dict(model.hparams_initial)))
    assert found[1] == found[0]
    assert found[1][1] == {"a": 1}


def test_a_strategy_starts_its_processes_in_a_way_of_its_own(tmp_path):
    found = []
    for framework in parity.lightning(), parity.levin():
        module = "lightning.pytorch.strategies" if framework.name == "lightning" else "levin.strategies"
        launcher = theirs if framework.name == "lightning" else ours
        calls = []

        class Launcher(launcher("pytorch.strategies.launchers.launcher", "_Launcher")):
            is_interactive_compatible = True

            def kill(self, signum):
                raise AssertionError("nothing was started")

            def launch(self, function, *args, trainer=None, **kwargs):
                calls.append((trainer is not None, callable(function)))
                return function(*args, **kwargs)

        class Strategy(importlib.import_module(module).SingleDeviceStrategy):
            def _configure_launcher(self):
                self._launcher = Launcher()

        trainer = parity.quiet(framework, tmp_path, strategy=Strategy(), max_steps=2)
        trainer.fit(parity.recording_module(framework, [])[0], parity.loader(), parity.loader())
        found.append((calls, type(trainer.strategy.launcher).__name__, trainer.global_step))
    assert found[1] == found[0] == ([(True, True)], "Launcher", 2)


OWN_LAUNCHERS = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, launchers
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch.utils.data import DataLoader


class AtThePrompt(_MultiProcessingLauncher):
    @property
    def is_interactive_compatible(self):
        return True


class Own(DDPStrategy):
    def _configure_launcher(self):
        if self._start_method == "popen":
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)
        elif self._start_method == "spawn":
            self._launcher = AtThePrompt(self, start_method="spawn")
        else:
            self._launcher = _MultiProcessingLauncher(strategy=self, start_method=self._start_method)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


if __name__ == "__main__":
    for strategy in ("ddp" if sys.argv[1] == "popen" else f"ddp_{sys.argv[1]}", Own(start_method=sys.argv[1])):
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )
        kinds = [AtThePrompt, _MultiProcessingLauncher, _SubprocessScriptLauncher, launchers.launcher._Launcher]
        found = [isinstance(trainer.strategy.launcher, kind) for kind in kinds]
        if trainer.is_global_zero:
            print(found, trainer.strategy.launcher.is_interactive_compatible)
    model = Net()
    trainer.fit(model, DataLoader(torch.arange(8.0).reshape(8, 1), batch_size=2))
    if trainer.is_global_zero:
        print(model.layer.weight.item())
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["popen", "spawn", "fork"])
def test_a_strategy_makes_a_launcher_of_lightnings(tmp_path, start_method):
    """As RF-DETR does for notebooks, and lightning-habana for its devices."""
    program = tmp_path / "program.py"
    program.write_text(OWN_LAUNCHERS)
    found = []
    for words in ([], ["-m", "levin"]):
        done = programs.run([*words, str(program), start_method])
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.splitlines())
    assert found[0] == found[1] and len(found[0]) == 3


def test_the_loop_under_way_and_the_one_that_evaluates(tmp_path):
    found = []
    for framework in parity.lightning(), parity.levin():
        seen = []

        def look(where, trainer, seen=seen):
            fit = trainer.fit_loop
            names = {
                "fit": fit, "fit.val": fit.epoch_loop.val_loop, "validate": trainer.validate_loop, "test": trainer.test_loop,
                "predict": trainer.predict_loop, "none": None,
            }  # fmt: skip
            for name in ("_active_loop", "_evaluation_loop"):
                try:
                    loop = getattr(trainer, name)
                except RuntimeError:
                    seen.append((where, name, "refused"))
                    continue
                (called,) = (key for key, each in names.items() if each is loop)
                seen.append(
                    (
                        where,
                        name,
                        called,
                        getattr(loop, "verbose", None) if "val" in called or called == "test" else None,
                    )
                )

        hooks = [f"on_{stage}_batch_start" for stage in ("train", "validation", "test", "predict")]
        looking = {hook: lambda self, trainer, *_, hook=hook, look=look: look(hook, trainer) for hook in hooks}
        trainer = parity.quiet(
            framework, tmp_path, max_epochs=1, callbacks=[type("Looking", (framework.Callback,), looking)()]
        )
        look("before", trainer)
        module, data = parity.recording_module(framework, [])[0], parity.loader(2)
        trainer.fit(module, data, data)
        trainer.validate(module, data)
        trainer.test(module, data, verbose=False)
        trainer.predict(module, data)
        found.append(seen)
    assert found[1] == found[0]
    assert {called for _, _, called, *_ in found[1]} == {
        "fit",
        "fit.val",
        "validate",
        "test",
        "predict",
        "none",
        "refused",
    }


@pytest.mark.parametrize("method", ["validate", "test"])
@pytest.mark.parametrize("is_silenced", [True, False])
def test_a_module_shows_the_results_in_a_way_of_its_own(tmp_path, capsys, method, is_silenced):
    for framework in parity.lightning(), parity.levin():

        class Model(framework.LightningModule):
            def validation_step(self, batch, batch_idx):
                self.log("value", 1.0)

            test_step = validation_step

            def on_validation_start(self):
                if is_silenced:
                    self.trainer._evaluation_loop._print_results = lambda *args, **kwargs: print("mine")

            on_test_start = on_validation_start

        getattr(parity.quiet(framework, tmp_path), method)(Model(), parity.loader(1))
        shown = capsys.readouterr().out
        assert ("mine" in shown, "value" in shown) == (is_silenced, not is_silenced)


class Described:
    """One line
    goes on.

    And more.
    """


class OfDescribed(Described):
    pass


def described_below():
    """
    First.

    Second."""


@pytest.mark.parametrize("component", [Described, OfDescribed, described_below, NoName], ids=lambda each: each.__name__)
def test_short_descriptions(component):
    their_version, our_version = both("pytorch.cli", "_get_short_description")
    assert our_version(component) == their_version(component)


def test_a_module_knows_that_a_rate_is_searched_for(tmp_path):
    found = []
    for framework in parity.lightning(), parity.levin():
        searching = dict(zip(("lightning", "levin"), both("pytorch.tuner.lr_finder", "_LRCallback"), strict=True))[
            framework.name
        ]
        package = "lightning.pytorch" if framework.name == "lightning" else "levin"
        steps = []

        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.lr = 0.1
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx, steps=steps, searching=searching):
                steps.extend(each.num_training for each in self.trainer.callbacks if type(each) is searching)
                return self.layer(batch[0]).pow(2).mean()

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), self.lr)

        trainer = parity.quiet(framework, tmp_path, max_epochs=1)
        model, data = Model(), parity.loader(50)
        importlib.import_module(f"{package}.tuner").Tuner(trainer).lr_find(
            model, data, num_training=40, early_stop_threshold=None
        )
        trainer.fit(model, data)
        found.append(steps)
    assert found[1] == found[0] == [40] * 40


def test_what_gives_the_loaders_is_exchanged_for_the_next_epoch(tmp_path):
    found = []
    for framework in parity.lightning(), parity.levin():
        sizes = []

        class Model(framework.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch[0]).sum()

            def on_train_epoch_end(self, sizes=sizes):
                source = self.trainer.fit_loop._data_source
                sizes.append((type(source.instance).__name__, self.trainer.num_training_batches))
                if self.current_epoch == 0:
                    source.instance = parity.loader(1)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), 0.01)

        trainer = parity.quiet(framework, tmp_path, max_epochs=2, reload_dataloaders_every_n_epochs=1)
        trainer.fit(Model(), parity.loader(2))
        found.append((sizes, trainer.global_step))
    assert found[1] == found[0]
    assert found[1][1] == 3
