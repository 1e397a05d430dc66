"""What levin's command line does beyond Lightning's."""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

import levin
from levin.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, instantiate_module
from levin.cli.class_paths import to_levin, to_lightning
from levin.cli.instantiate import instantiate_class
from levin.cli.parser import OWN_ARGUMENTS, OWN_ARGUMENTS_OF, nearest

QUIET = ["--seed_everything=1", "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false"]  # fmt: skip


class Net(levin.LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(4, 1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program"])


@pytest.mark.parametrize(
    "words, meant",
    [
        (["--trainer.max_epochz=2"], "trainer.max_epochs"),
        (["--modl.lr=2"], "model.lr"),
        (["--model.widht=2"], "model.width"),
        (["--optimizer=SGD", "--optimizer.momentun=2"], "momentum"),
        (["--trainer.callbacks=EarlyStoping"], "EarlyStopping"),
        (["--optimizer=Adamm"], "Adam"),
        (["--config=FILE:trainer: {max_epoch: 3}"], "trainer.max_epochs"),
        (["--config=FILE:model: {lrr: 3}"], "model.lr"),
        (["--config=FILE:modell: {lr: 3}"], "model.lr"),
    ],
)
def test_what_was_mistyped_is_answered_with_the_nearest_that_there_is(tmp_path, capsys, words, meant):
    file = tmp_path / "config.yaml"
    if "FILE:" in words[0]:
        file.write_text(words[0].split("FILE:")[1])
        words = [f"--config={file}"]
    with pytest.raises(SystemExit):
        LightningCLI(Net, args=words, run=False)
    message = capsys.readouterr().err
    assert f"Did you mean {meant}?" in message or f"Did you mean --{meant}?" in message


@pytest.mark.parametrize(("args", "words", "is_told"), [(None, QUIET, False), (QUIET, QUIET, True), (QUIET, [], False)])
def test_arguments_in_two_places_are_told(args, words, is_told, monkeypatch, recwarn):
    monkeypatch.setattr(sys, "argv", ["program", *words])
    LightningCLI(Net, args=args, run=False)
    told = f"it is not recommended to provide both args and command line arguments, got: sys.argv[1:]={words}, args={args}."
    assert [str(each.message).endswith(told) for each in recwarn].count(True) == is_told


@pytest.mark.parametrize("seed", ["1", "true"])
def test_workers_draw_from_the_seed_of_the_command_line(seed, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    cli = LightningCLI(Net, args=[f"--seed_everything={seed}", *QUIET[1:]], run=False)
    assert (os.environ["PL_GLOBAL_SEED"], os.environ["PL_SEED_WORKERS"]) == (str(cli.config.seed_everything), "1")


def test_nothing_near_is_not_guessed_at():
    assert nearest("unrecognized arguments: --something.else=1", ["trainer.max_epochs", "model.lr"]) == ""
    assert nearest("another error with trainer.max_epoch", ["trainer.max_epochs"]) == ""


def test_class_paths_are_translated_whole_and_alone():
    given = "see lightning.pytorch.callbacks.EarlyStopping.thing, /lightning.pytorch.callbacks.EarlyStopping/x"
    assert to_levin(given) == given
    assert to_levin(["pytorch_lightning.loggers.CSVLogger", 3]) == ["levin.loggers.CSVLogger", 3]
    assert to_levin(("lightning.pytorch.Trainer", {"a": "levin"})) == ("levin.Trainer", {"a": "levin"})
    # Where Lightning has a name in several places, the shortest of its path of today.
    assert to_lightning("levin.Trainer levin.callbacks.Timer levin.strategies.DDPStrategy levin.fabric.Fabric") == (
        "lightning.pytorch.Trainer lightning.pytorch.callbacks.Timer lightning.pytorch.strategies.DDPStrategy lightning.fabric.Fabric"
    )
    assert to_levin("lightning.pytorch.loggers.NoSuchLogger") == "lightning.pytorch.loggers.NoSuchLogger"
    assert to_lightning("a: levin.callbacks.BadStepGuard") == "a: levin.callbacks.BadStepGuard"
    assert to_levin(to_lightning("- levin.cli.ReduceLROnPlateau")) == "- levin.cli.ReduceLROnPlateau"


def test_the_optimizer_of_the_command_line_is_new_in_each_fit():
    cli = LightningCLI(Net, args=[*QUIET, "--optimizer=SGD", "--optimizer.lr=0.5"], run=False)
    first, second = cli.model.configure_optimizers(), cli.model.configure_optimizers()
    assert first is not second and first.defaults["lr"] == 0.5


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_optimizer_of_the_command_line_goes_with_the_module(way):
    model = LightningCLI(Net, args=[*QUIET, "--optimizer=SGD", "--optimizer.lr=0.5"], run=False).model
    copied = way(model)
    optimizer = copied.configure_optimizers()
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert [id(value) for value in optimizer.param_groups[0]["params"]] == [id(value) for value in copied.parameters()]
    assert copied.layer.weight is not model.layer.weight


def test_the_optimizer_of_the_command_line_sees_parameters_that_configure_model_makes():
    class Late(Net):
        def configure_model(self):
            self.late = torch.nn.Linear(4, 4)

    cli = LightningCLI(
        Late, args=[*QUIET, "--optimizer=SGD", "--trainer.max_epochs=1"], run=False, save_config_callback=None
    )
    cli.trainer.fit(cli.model)
    assert any(
        group_param is cli.model.late.weight
        for group in cli.trainer.optimizers[0].param_groups
        for group_param in group["params"]
    )


def test_a_checkpoint_of_a_subclass_is_built_as_that_subclass(tmp_path):
    cli = LightningCLI(Net, args=[*QUIET, "--model=tests.cli.test_lightning_cli.Wider", "--model.depth=3", "--optimizer=SGD", "--trainer.max_epochs=1"],
                       run=False, subclass_mode_model=True, save_config_callback=None)  # fmt: skip
    cli.trainer.fit(cli.model)
    cli.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert type(loaded).__name__ == "Wider" and loaded.hparams.depth == 3


def test_a_checkpoint_holds_arguments_that_nobody_declared(tmp_path):
    words = ["--model=tests.cli.test_lightning_cli.Open", "--model.dict_kwargs.extra=5", "--optimizer=SGD"]
    cli = LightningCLI(
        Net,
        args=[*QUIET, *words, "--trainer.max_epochs=1"],
        run=False,
        subclass_mode_model=True,
        save_config_callback=None,
    )
    cli.trainer.fit(cli.model)
    cli.trainer.save_checkpoint(tmp_path / "saved.ckpt")
    assert Net.load_from_checkpoint(tmp_path / "saved.ckpt").unknown == cli.model.unknown == {"extra": 5}


class Open(Net):
    def __init__(self, depth: int = 1, **unknown):
        super().__init__()
        self.save_hyperparameters()
        self.unknown = unknown


class Wider(Net):
    def __init__(self, depth: int = 1, **kwargs):
        super().__init__(**kwargs)
        self.save_hyperparameters()


class Untyped(Net):
    def __init__(self, sizes, lr: float = 0.1):
        super().__init__(lr)
        self.sizes = sizes


@pytest.mark.parametrize(("kind", "more"), [(Untyped, {}), (Net, {"_class_path": f"{__name__}.Untyped"})])
def test_arguments_without_a_type_are_those_of_the_checkpoint(kind, more):
    built = instantiate_module(
        kind, {"sizes": [1, 2], "lr": 0.5, "_instantiator": "levin.cli.instantiate_module", **more}
    )
    assert type(built) is Untyped and built.sizes == [1, 2] and built.hparams["lr"] == 0.5


def test_saving_nothing_at_all_is_refused():
    parser = LightningArgumentParser()
    with pytest.raises(ValueError, match="save_config"):
        SaveConfigCallback(parser, parser.parse_args([]), save_to_log_dir=False)


def test_objects_are_made_by_their_class_path():
    made = instantiate_class((3, 4), {"class_path": "torch.nn.Linear"})
    assert (made.in_features, made.out_features) == (3, 4)
    with pytest.raises(ValueError, match="class_path must be an import path, received 'Adam'"):
        instantiate_class(3, {"class_path": "Adam"})


PROGRAM = """
import sys
import torch
{imports}

class Net(pl.LightningModule):
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).pow(2).mean()

if __name__ == "__main__":
    LightningCLI(Net, trainer_defaults=dict(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False))
"""


def run_program(folder: Path, imports: str, *words: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    script = folder / "program.py"
    script.write_text(textwrap.dedent(PROGRAM).replace("{imports}", imports))
    command = [sys.executable, *before, str(script), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


THEIRS = "import lightning.pytorch as pl\nfrom lightning.pytorch.cli import LightningCLI"
OURS = "import levin as pl\nfrom levin.cli import LightningCLI"
WORDS = [
    "--optimizer=SGD",
    "--trainer.callbacks=Timer",
    "--trainer.callbacks.duration=00:01:00:00",
    "--lr_scheduler=ReduceLROnPlateau",
    "--lr_scheduler.monitor=x",
]


@pytest.mark.slow
def test_a_program_for_lightning_writes_a_configuration_that_both_frameworks_read(tmp_path):
    words = ["fit", *WORDS[:1], "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=x", "--print_config"]
    on_levin = run_program(tmp_path, THEIRS, *words, before=("-m", "levin"))
    assert on_levin.returncode == 0, on_levin.stderr
    assert "class_path: lightning.pytorch.callbacks.EarlyStopping" in on_levin.stdout
    (tmp_path / "config.yaml").write_text(on_levin.stdout)
    for imports in (THEIRS, OURS):
        again = run_program(tmp_path, imports, "fit", "--config=config.yaml", "--print_config")
        assert again.returncode == 0, again.stderr
        assert "monitor: x" in again.stdout


def test_objects_with_more_arguments_than_lightnings_are_written_so_that_it_reads_them(tmp_path):
    words = ["fit", "--optimizer=SGD", "--trainer.strategy=DDPStrategy"]
    for callback in ("DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint"):
        words.append(f"--trainer.callbacks+={callback}")
    on_levin = run_program(tmp_path, THEIRS, *words, "--print_config", before=("-m", "levin"))
    assert on_levin.returncode == 0, on_levin.stderr
    (tmp_path / "config.yaml").write_text(on_levin.stdout)
    for imports in (THEIRS, OURS):
        again = run_program(tmp_path, imports, "fit", "--config=config.yaml", "--print_config")
        assert again.returncode == 0, again.stderr
    words += ["--trainer.callbacks.async_save=true", "--trainer.strategy.uneven=error", "--print_config"]
    given = yaml.safe_load(run_program(tmp_path, THEIRS, *words, before=("-m", "levin")).stdout)["trainer"]
    assert (
        given["callbacks"][-1]["init_args"]["async_save"] is True
        and given["strategy"]["init_args"]["uneven"] == "error"
    )


@pytest.mark.parametrize("room", ["callbacks", "loggers", "profilers", "strategies"])
def test_arguments_that_lightning_lacks_are_those_that_configurations_leave_out(room):

    theirs, ours = importlib.import_module(f"lightning.pytorch.{room}"), importlib.import_module(f"levin.{room}")
    for name in theirs.__all__:
        pair = [getattr(module, name, None) for module in (ours, theirs)]
        if all(map(inspect.isclass, pair)) and not inspect.isabstract(pair[0]) and name != "ParallelStrategy":
            more = set.difference(*(set(inspect.signature(kind.__init__).parameters) for kind in pair))
            own = {each for kind in pair[0].__mro__ for each in OWN_ARGUMENTS_OF.get(kind.__name__, ())}
            assert more - {"args", "kwargs"} <= own, name


def test_arguments_of_the_trainer_that_lightning_lacks_are_those_that_configurations_leave_out():
    import lightning.pytorch

    ours, theirs = (set(inspect.signature(kind).parameters) for kind in (levin.Trainer, lightning.pytorch.Trainer))
    # `suggest_integrations` is no argument of the command line.
    assert ours - theirs - {"suggest_integrations"} == set(OWN_ARGUMENTS)


@pytest.mark.parametrize("own", [{}, {"compile": "blocks"}, {"compile": None}])
def test_own_arguments_of_the_trainer_are_in_a_configuration_where_they_were_given(tmp_path, own):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"max_epochs": 2, **own}}))
    cli = LightningCLI(Net, args=[*QUIET, "--optimizer=SGD", f"--config={file}"], run=False)
    written = yaml.safe_load(cli.parser.dump(cli.config, skip_unset=False))["trainer"]
    assert written["max_epochs"] == 2
    assert {name: value for name, value in written.items() if name in OWN_ARGUMENTS} == own
    assert bool(cli.trainer.settings.compile) == bool(own.get("compile"))


def test_classes_of_fabric_for_the_alias_make_no_short_name_ambiguous():
    for room in ("loggers", "strategies"):
        importlib.import_module(f"levin.compat._fabric_{room}")
    words = [
        *QUIET,
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.strategy=FSDPStrategy",
        "--print_config",
    ]
    with pytest.raises(SystemExit) as ended:
        levin.cli.LightningCLI(Net, args=words, run=False)
    assert ended.value.code == 0


def test_the_configuration_is_saved_where_the_ranks_are_spawned(tmp_path):
    words = ["fit", "--optimizer=SGD", "--trainer.strategy=ddp_spawn", "--trainer.devices=2", "--trainer.max_epochs=1"]
    done = run_program(tmp_path, OURS, *words, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs")
    assert done.returncode == 0, done.stderr
    saved = list(tmp_path.rglob("config.yaml"))
    assert len(saved) == 1 and "strategy: ddp_spawn" in saved[0].read_text()


def test_a_configuration_is_read_from_a_remote_file():
    import fsspec

    with fsspec.open("memory://runs/config.yaml", "w") as file:
        file.write("model: {lr: 0.7}\ntrainer: {max_epochs: 4}\n")
    cli = LightningCLI(Net, args=["--config=memory://runs/config.yaml", "--model.width=8", *QUIET], run=False)
    assert (cli.model.hparams.lr, cli.model.hparams.width, cli.trainer.max_epochs) == (0.7, 8, 4)


def test_a_configuration_in_jsonnet(tmp_path):
    pytest.importorskip("_jsonnet")
    (tmp_path / "config.jsonnet").write_text("local lr = 0.25; {model: {lr: 2 * lr}, trainer: {max_epochs: 1 + 2}}")
    words = [f"--config={tmp_path / 'config.jsonnet'}", *QUIET]
    cli = LightningCLI(Net, args=words, run=False, parser_kwargs={"parser_mode": "jsonnet"})
    assert (cli.model.hparams.lr, cli.trainer.max_epochs) == (0.5, 3)


def test_optimizer_and_scheduler_that_were_defaults_are_in_the_saved_configuration(tmp_path):
    class CLI(LightningCLI):
        def add_arguments_to_parser(self, parser):
            parser.add_optimizer_args(torch.optim.Adam)
            parser.add_lr_scheduler_args(torch.optim.lr_scheduler.StepLR)
            parser.set_defaults({"optimizer.lr": 0.2, "lr_scheduler.step_size": 3})

    CLI(Net, args=["fit", *QUIET, "--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path}"])
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved["optimizer"]["lr"] == 0.2 and saved["optimizer"]["eps"] == 1e-8
    assert saved["lr_scheduler"]["step_size"] == 3 and saved["lr_scheduler"]["gamma"] == 0.1


@pytest.mark.parametrize("form", ["=", "+=", "config"])
@pytest.mark.parametrize(
    "name, arguments",
    [
        ("AsyncCheckpointIO", {}),
        ("DoublePrecision", {}),
        ("MixedPrecision", {"precision": "bf16-mixed", "device": "cpu"}),
        ("LightningEnvironment", {}),
        ("TorchSyncBatchNorm", {}),
    ],
)
def test_plugins_are_built_from_the_command_line(name, arguments, form, tmp_path):
    words = [f"--trainer.plugins{form}{name}", *(f"--trainer.plugins.{key}={arguments[key]}" for key in arguments)]
    if form == "config":
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"trainer": {"plugins": [{"class_path": name, "init_args": arguments}]}}))
        words = [f"--config={file}"]
    cli = LightningCLI(Net, args=[*QUIET, *words], run=False)
    parts = vars(cli.trainer.strategy).values()
    built = cli.config_init.trainer.plugins
    (plugin,) = built if isinstance(built, list) else [built]
    assert type(plugin).__name__ == name
    assert name == "LightningEnvironment" or any(part is plugin for part in parts)


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.strategy=FSDPStrategy", "--trainer.strategy.state_dict_type=sharded"],
        ["--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.data_parallel_size=1"],
        ["--trainer.strategy=DeepSpeedStrategy", "--trainer.strategy.stage=2"],
        ["--trainer.strategy=SingleDeviceXLAStrategy", "--trainer.strategy.device=0"],
        ["--trainer.callbacks=ThroughputMonitor", "--trainer.callbacks.batch_size_fn=builtins.len",
         "--trainer.callbacks.window_size=4", "--trainer.callbacks.available_flops=2"],
    ],
)  # fmt: skip
def test_classes_are_known_by_their_name_in_a_fresh_process(words, tmp_path):
    program = (
        "import sys, levin; from levin.cli import *; LightningCLI(levin.LightningModule, args=sys.argv[1:], run=False)"
    )
    command = [sys.executable, "-c", program, *words, "--print_config"]
    env = {**os.environ, "PYTHONPATH": str(Path(levin.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{words[-1].rpartition('.')[2].split('=')[0]}:" in done.stdout
