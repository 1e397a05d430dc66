"""The same program with a command line on Lightning and on levin: same arguments in, same objects and files out."""

from __future__ import annotations

import copy
import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.parity.cli_program import run

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
         "--trainer.enable_model_summary=false", "--trainer.enable_checkpointing=false"]  # fmt: skip


def both(folder: Any, build: Any) -> Any:
    theirs, ours = run("lightning", folder, build), run("levin", folder, build)
    assert ours == theirs
    return ours


def objects(
    args: list[str],
    cls: str = "LightningCLI",
    model: str | None = "OwnOptimizer",
    data: str | None = "Data",
    **kwargs: Any,
) -> Any:
    def build(own: Any) -> Any:
        args_ = [arg.replace("PROGRAM", own.__name__) for arg in args]
        return getattr(own, cls)(
            None if model is None else getattr(own, model),
            None if data is None else getattr(own, data),
            args=[*QUIET, *args_], run=False, **kwargs,
        )  # fmt: skip

    return build


NET = ["--model.net=Net", "--model.net=PROGRAM.Deep", "--model.net=Deep --model.net.depth=5", "--model.net=Free --model.net.dict_kwargs.x=3",
       '--model.net={"class_path":"PROGRAM.Deep","init_args":{"depth":4,"width":9}}', "--model.net=null"]  # fmt: skip
POOL = [
    ["--model.lr=0.25"], ["--model.lr=1e-3"], ["--model.sizes=[3,4,5]"], *([net.split()] for net in []),
    ["--data.batch_size=2"], ["--data.folder=x"],
    ["--trainer.max_epochs=3"], ["--trainer.max_steps=7"], ["--trainer.accumulate_grad_batches=2"],
    ["--trainer.limit_train_batches=0.5"], ["--trainer.limit_train_batches=3"], ["--trainer.gradient_clip_val=0.5"],
    ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val", "--trainer.callbacks.patience=5"],
    ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val"],
    ["--trainer.callbacks+=PROGRAM.Noted", "--trainer.callbacks.note=z"],
    ['--trainer.callbacks=[{"class_path":"Noted","init_args":{"count":4}}]'],
    ["--optimizer=Adam"], ["--optimizer=SGD", "--optimizer.lr=0.3", "--optimizer.momentum=0.1"],
    ["--optimizer=torch.optim.AdamW", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"],
    ["--optimizer=SGD", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=val"],
    ["--model.optimizer=Adam", "--model.optimizer.lr=0.7"],
    ["--model.scheduler=ExponentialLR", "--model.scheduler.gamma=0.5"],
    ["--seed_everything=5"], ["--seed_everything=false"],
]  # fmt: skip


@pytest.fixture(scope="module")
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: a short name stands for any class of that name that the process knows, so that those which
    other tests have defined would make it mean two.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


def run_both(folder: Path, choose: Callable[[random.Random], Any], seed: int) -> tuple[Any, Any]:
    build = choose(random.Random(seed))
    return run("lightning", folder, build), run("levin", folder, build)


@pytest.mark.parametrize("seed", range(24))
def test_random_arguments_make_the_same_objects(tmp_path, seed, fresh_process):
    theirs, ours = fresh_process.submit(run_both, tmp_path, random_arguments, seed).result()
    assert ours == theirs


def random_arguments(drawn: random.Random) -> Any:
    args = [word for words in drawn.sample(POOL, drawn.randint(1, 5)) for word in words]
    if drawn.random() < 0.6:
        args += drawn.choice(NET).split()
    return objects(args)


@pytest.mark.parametrize("seed", range(100, 108))
def test_random_arguments_of_chosen_subclasses_make_the_same_objects(tmp_path, seed, fresh_process):
    theirs, ours = fresh_process.submit(run_both, tmp_path, random_subclasses, seed).result()
    assert ours == theirs


def random_subclasses(drawn: random.Random) -> Any:
    args = [drawn.choice(["--model=Wide", "--model=PROGRAM.Wide", "--model=OwnOptimizer"])]
    args += drawn.choice([[], ["--data=OtherData", "--data.kind=b"], ["--data=PROGRAM.Data", "--data.batch_size=1"]])
    args += [word for words in drawn.sample(POOL, 3) for word in words if not word.startswith("--data")]
    mode = drawn.choice([dict(model=None, data=None), dict(model="Model", data=None, subclass_mode_model=True)])
    return objects(args, **mode)


ODD: dict[str, list[str]] = {
    "null": ["--optimizer=null", "--trainer.callbacks=null", "--trainer.logger=null", "--seed_everything=false"],
    "no seed": ["--seed_everything=false"],
    "any seed": ["--seed_everything=true"],
    "callbacks one after the other": [
        "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=a", "--trainer.callbacks+=Noted",
        "--trainer.callbacks.note=x", "--trainer.callbacks+=Noted", "--trainer.callbacks.count=2",
    ],
    "a class in place of another": ["--model.net=Deep", "--model.net.depth=4", "--model.net=Net"],
    "an argument before its class": ["--model.net.depth=4", "--model.net=Deep"],
    "a group as a whole": ['--trainer={"max_epochs": 4}', '--model={"lr": 0.6}'],
    "a configuration as a word": ["-c", '{"model": {"lr": 0.7}}'],
    "an abbreviation": ["--trainer.max_ep=3"],
    "a scheduler alone": ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=2"],
    "a scheduler without its arguments": ["--optimizer=SGD", "--lr_scheduler=StepLR"],
    "no optimizer": ["--optimizer=Linear"],
    "a short precision": ["--trainer.precision=32"],
    "a wrong precision": ["--trainer.precision=31"],
    "a wrong seed": ["--seed_everything=abc"],
    "a file that is not there": ["-c", "absent.yaml"],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_make_the_same_objects(tmp_path, name, fresh_process):
    theirs, ours = fresh_process.submit(run_odd, tmp_path, name).result()
    for result in (theirs, ours):
        result["err"] = [line.partition(" File does not exist")[0] for line in result.get("err", [])]
    assert ours == theirs


def run_odd(folder: Path, name: str) -> tuple[Any, Any]:
    build = objects(ODD[name])
    return run("lightning", folder, build), run("levin", folder, build)


def test_the_names_of_added_arguments_come_back(tmp_path):
    added: list[tuple[str, ...]] = []

    def add(own: Any, parser: Any) -> None:
        added.append(tuple(parser.add_lightning_class_args(own.Noted, "noted")))

    both(tmp_path, custom(add, []))
    theirs, ours = added
    assert ours == theirs and "noted.note" in ours


def test_callbacks_of_the_program_follow_those_of_the_command_line(tmp_path):
    def add(own: Any, parser: Any) -> None:
        parser.add_lightning_class_args(own.Noted, "noted")

    words = ["--trainer.callbacks=Noted", "--trainer.callbacks.note=configured", "--noted.note=forced"]
    assert both(tmp_path, custom(add, words))["notes"] == [("configured", 1), ("forced", 1)]


# ---------------------------------------------------------------------------------------------- subcommands and hooks


@pytest.mark.parametrize(
    "words",
    [
        ["fit"], ["fit", "--ckpt_path=a.ckpt", "--weights_only=true"], ["predict", "--return_predictions=false"],
        ["explore"], ["fit", "--trainer.fast_dev_run=true"], ["fit", "--trainer.unknown=1"], ["fit", "--model.lr=x"], [],
        ["fit", "--help"], ["--help"],
    ],
)  # fmt: skip
def test_the_subcommand_is_run_with_the_hooks_around_it(tmp_path, words):
    def build(own: Any) -> Any:
        return own.Hooked(
            own.OwnOptimizer, own.Data, trainer_class=own.Fake, args=[*words[:1], *QUIET[: 5 * len(words)], *words[1:]]
        )

    theirs, ours = run("lightning", tmp_path, build), run("levin", tmp_path, build)
    for result in (theirs, ours):
        result.pop("out", None)  # the texts of help are each one's own
        result["err"] = [line.split("\n")[0] for line in result.get("err", [])]
    assert ours == theirs


@pytest.mark.parametrize(
    "words", [["explore", "--depth=3"], ["explore", "--name=x"], ["explore"], ["fit", "--trainer.max_epochs=1"]]
)
def test_a_subcommand_of_ones_own(tmp_path, words):
    def build(own: Any) -> Any:
        class Own(own.LightningCLI):
            @staticmethod
            def subcommands():
                return {**own.LightningCLI.subcommands(), "explore": {"model", "datamodule"}}

            def before_explore(self):
                own.calls.append("before_explore")

        return Own(own.OwnOptimizer, own.Data, trainer_class=own.MyTrainer, args=[words[0], *QUIET, *words[1:]])

    both(tmp_path, build)


def test_a_fit_writes_the_configuration_beside_the_logs(tmp_path):
    words = [
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=logs",
        "--trainer.max_epochs=1",
        "--seed_everything=3",
    ]
    result = both(tmp_path, lambda own: own.LightningCLI(own.OwnOptimizer, own.Data, args=["fit", *QUIET, *words]))
    assert list(result["files"]) == ["logs/lightning_logs/version_0/config.yaml"]
    dry = ["--trainer.fast_dev_run=true"]
    result = both(
        tmp_path / "dry", lambda own: own.LightningCLI(own.OwnOptimizer, own.Data, args=["fit", *QUIET, *dry])
    )
    assert not result["files"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_configuration_that_is_there_already(tmp_path, overwrite, command):
    def build(own: Any) -> Any:
        from pathlib import Path

        Path("config.yaml").write_text("there: already")
        return own.LightningCLI(
            own.OwnOptimizer, own.Data, args=[command, *QUIET, "--trainer.max_epochs=1"],
            save_config_kwargs={"overwrite": overwrite, "config_filename": "config.yaml"},
        )  # fmt: skip

    both(tmp_path, build)


def test_saving_the_configuration_in_ones_own_way(tmp_path):
    def build(own: Any) -> Any:
        class Own(own.SaveConfigCallback):
            def save_config(self, trainer, pl_module, stage):
                own.calls.append((stage, self.config.model.lr, "lr: 0.4" in self.parser.dump(self.config)))

        return own.LightningCLI(
            own.OwnOptimizer, own.Data, args=["fit", *QUIET, "--trainer.max_epochs=1", "--model.lr=0.4"],
            save_config_callback=Own, save_config_kwargs={"save_to_log_dir": False},
        )  # fmt: skip

    assert both(tmp_path, build)["calls"] == [("fit", 0.4, True)]


# ---------------------------------------------------------------------------------------------- files, environment, Python


CONFIG = """
seed_everything: 4
trainer:
  max_epochs: 5
  callbacks:
  - class_path: lightning.pytorch.callbacks.EarlyStopping
    init_args: {monitor: val, patience: 9}
  - class_path: lightning.pytorch.callbacks.ModelSummary
    init_args: {max_depth: 2}
model:
  lr: 0.3
  net: {class_path: Deep, init_args: {depth: 6}}
data:
  batch_size: 1
optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.9}}
lr_scheduler: {class_path: lightning.pytorch.cli.ReduceLROnPlateau, init_args: {monitor: val}}
"""


def written(text: str, name: str = "config.yaml") -> str:
    from pathlib import Path

    Path(name).write_text(text)
    return name


def test_a_configuration_written_for_lightning_is_accepted_as_it_is(tmp_path):
    result = both(
        tmp_path,
        lambda own: own.LightningCLI(
            own.OwnOptimizer, own.Data, run=False, args=["--config", written(CONFIG), *QUIET, "--model.lr=0.6"]
        ),
    )
    assert result["config"]["model"]["lr"] == 0.6 and result["stop"] == [9]


def test_several_files_and_files_for_parts(tmp_path):
    def build(own: Any) -> Any:
        words = ["-c", written(CONFIG), "-c", written("trainer: {max_epochs: 8}\nmodel: {lr: 0.8}\n", "b.yaml")]
        words += ["--data", written("batch_size: 6\nfolder: y\n", "data.yaml"), "--trainer.max_steps=3"]
        words += ["--trainer.callbacks", written("- class_path: Noted\n  init_args: {note: f}\n", "calls.yaml")]
        return own.LightningCLI(own.OwnOptimizer, own.Data, run=False, args=[*words, *QUIET])

    both(tmp_path, build)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_file_before_and_after_the_subcommand(tmp_path, place):
    def build(own: Any) -> Any:
        if place == "after":
            words = ["fit", "--config", written(CONFIG)]
        else:
            text = "fit:" + CONFIG.replace("\n", "\n  ") + "\npredict:\n  return_predictions: false\n"
            words = ["--config", written(text), "fit"]
        return own.LightningCLI(own.OwnOptimizer, own.Data, trainer_class=own.Fake, args=[*words, *QUIET])

    both(tmp_path, build)


def test_defaults_from_a_file_and_arguments_of_each_parser(tmp_path):
    def build(own: Any) -> Any:
        kwargs = {"fit": {"default_config_files": [written("model: {lr: 0.77}\n", "defaults.yaml")]}}
        return own.LightningCLI(
            own.OwnOptimizer, own.Data, trainer_class=own.Fake, args=["fit", *QUIET], parser_kwargs=kwargs
        )

    assert both(tmp_path, build)["config"]["fit"]["model"]["lr"] == 0.77


def test_the_environment_counts_when_asked_to(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_EPOCHS", "6")
    monkeypatch.setenv("PL_FIT__MODEL__LR", "0.125")
    for kwargs in ({"default_env": True}, {}):
        both(
            tmp_path,
            lambda own: own.LightningCLI(
                own.OwnOptimizer, own.Data, trainer_class=own.Fake, args=["fit", *QUIET], parser_kwargs=kwargs
            ),  # noqa: B023
        )


@pytest.mark.parametrize("as_namespace", [False, True])
def test_a_configuration_from_python(tmp_path, as_namespace):
    import jsonargparse

    trainer = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_checkpointing": False}
    flat: dict[str, Any] = {"trainer": trainer, "model": {"lr": 0.2, "net": {"class_path": "Deep"}}}

    def given(args: dict) -> Any:  # parsing writes into it
        return jsonargparse.Namespace(copy.deepcopy(args)) if as_namespace else copy.deepcopy(args)

    for args in (flat, {"subcommand": "fit", "fit": flat}):
        result = both(
            tmp_path,
            lambda own: own.LightningCLI(
                own.OwnOptimizer,
                own.Data,
                trainer_class=own.Fake,
                args=given(args),
                run="subcommand" in args,  # noqa: B023
            ),
        )
        assert "raised" not in result and "exit" not in result


@pytest.mark.parametrize("flags", ["", "=skip_default", "=skip_unset"])
def test_print_config_prints_what_a_file_would_hold(tmp_path, flags):
    words = ["fit", *QUIET, "--optimizer=Adam", "--lr_scheduler=ReduceLROnPlateau", "--lr_scheduler.monitor=x",
             "--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=v", f"--print_config{flags}"]  # fmt: skip
    result = both(tmp_path, lambda own: own.LightningCLI(own.Model, own.Data, args=words))
    assert result["exit"] == 0 and "class_path: levin.callbacks.EarlyStopping" in result["out"]


# ---------------------------------------------------------------------------------------------- subclasses, as packages write them


def custom(add: Any, words: list[str], model: str = "OwnOptimizer", **kwargs: Any) -> Any:
    def build(own: Any) -> Any:
        class Own(own.LightningCLI):
            def add_arguments_to_parser(self, parser):
                add(own, parser)

        return Own(getattr(own, model), own.Data, run=False, args=[*QUIET, *words], **kwargs)

    return build


CUSTOM = {
    "link on parse": (lambda own, parser: parser.link_arguments("data.batch_size", "model.num_classes"), ["--data.batch_size=9"]),
    "link with a function": (
        lambda own, parser: parser.link_arguments(("data.batch_size", "model.lr"), "model.num_classes", compute_fn=lambda a, b: int(a * 10 * b)), [],
    ),
    "link on instantiate": (lambda own, parser: parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate"), []),
    "link of an object": (
        lambda own, parser: parser.link_arguments("data", "model.num_classes", compute_fn=lambda data: data.batch_size, apply_on="instantiate"),
        ["--data.batch_size=5"],
    ),
    "forced callback": (
        lambda own, parser: (parser.add_lightning_class_args(own.Noted, "noted"), parser.set_defaults({"noted.count": 3})), ["--noted.note=q"],
    ),
    "defaults": (lambda own, parser: parser.set_defaults({"model.lr": 0.9, "trainer.max_epochs": 4}), ["--trainer.max_epochs=2"]),
    "argument": (lambda own, parser: parser.add_argument("--notes", type=str, default="a"), ["--notes=b"]),
    "optimizer of one class": (lambda own, parser: parser.add_optimizer_args(own.torch.optim.Adam), ["--optimizer.lr=0.7"]),
    "scheduler of one class": (
        lambda own, parser: (
            parser.add_optimizer_args(own.torch.optim.Adam),
            parser.add_lr_scheduler_args(own.torch.optim.lr_scheduler.ExponentialLR), parser.set_defaults({"lr_scheduler.gamma": 0.3}),
        ), [],
    ),
    "choice of optimizers": (
        lambda own, parser: parser.add_optimizer_args((own.torch.optim.Adam, own.torch.optim.SGD)), ["--optimizer=SGD", "--optimizer.lr=0.1"],
    ),
    "linked optimizer": (
        lambda own, parser: parser.add_optimizer_args(own.torch.optim.Adam, "opt", "model.optimizer_init"), ["--opt.lr=0.2"],
    ),
    "linked optimizers and scheduler": (
        lambda own, parser: (
            parser.add_optimizer_args(nested_key="opt", link_to="model.optimizer_init"),
            parser.add_lr_scheduler_args(own.torch.optim.lr_scheduler.StepLR, "sched", "model.scheduler_init"),
        ), ["--opt=AdamW", "--sched.step_size=2"],
    ),
    "two automatic optimizers": (
        lambda own, parser: (
            parser.add_optimizer_args(own.torch.optim.Adam, "a"), parser.add_optimizer_args(own.torch.optim.SGD, "b"),
        ), [],
    ),
    "not a class of Lightning's": (lambda own, parser: parser.add_lightning_class_args(own.Net, "net"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", CUSTOM)
def test_added_arguments_and_links(tmp_path, name):
    add, words = CUSTOM[name]
    both(tmp_path, custom(add, words))


def test_without_automatic_optimizers(tmp_path):
    both(tmp_path, custom(lambda own, parser: None, ["--optimizer=SGD"], auto_configure_optimizers=False))
    both(tmp_path, custom(lambda own, parser: None, [], auto_configure_optimizers=False))


@pytest.mark.parametrize("words", [[], ["--trainer.callbacks=Noted"], ["--trainer.max_epochs=9"]])
def test_defaults_of_the_trainer(tmp_path, words):
    def build(own: Any) -> Any:
        defaults = {"max_epochs": 3, "callbacks": [own.Noted("default", 7)]}
        return own.LightningCLI(own.OwnOptimizer, own.Data, run=False, args=[*QUIET, *words], trainer_defaults=defaults)

    both(tmp_path, build)


@pytest.mark.parametrize("kind", ["trainer", "model", "data"])
def test_functions_and_subclasses_in_place_of_classes(tmp_path, kind):
    def build(own: Any) -> Any:
        if kind == "model":
            return own.LightningCLI(own.make_model, own.Data, run=False, args=[*QUIET, "--model.lr=0.3"])
        if kind == "data":
            return own.LightningCLI(own.Model, None, run=False, args=[*QUIET, "--data=OtherData", "--data.kind=z"])
        return own.LightningCLI(own.Model, own.Data, run=False, trainer_class=own.MyTrainer, args=QUIET)

    both(tmp_path, build)


def test_optimizers_configured_in_ones_own_way(tmp_path):
    def build(own: Any) -> Any:
        class Own(own.LightningCLI):
            @staticmethod
            def configure_optimizers(lightning_module, optimizer, lr_scheduler=None):
                own.calls.append(
                    (type(lightning_module).__name__, type(optimizer).__name__, type(lr_scheduler).__name__)
                )
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

        words = ["--optimizer=SGD", "--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.1"]
        return Own(own.Model, own.Data, run=False, args=[*QUIET, *words])

    both(tmp_path, build)


def test_several_trainers_of_one_command_line(tmp_path):
    def build(own: Any) -> Any:
        cli = own.LightningCLI(own.Model, own.Data, run=False, args=[*QUIET, "--trainer.max_epochs=3"])
        first, second = cli.trainer, cli.instantiate_trainer(max_epochs=8, callbacks=[own.Noted("mine")])
        own.calls.append(
            (
                first.max_epochs,
                second.max_epochs,
                first is second,
                sum(type(c).__name__ == "Noted" for c in second.callbacks),
            )
        )
        return cli

    assert both(tmp_path, build)["calls"] == [(3, 8, False, 1)]


# ---------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("mode", ["fixed", "subclass"])
def test_a_checkpoint_builds_nested_objects_and_gives_its_hyper_parameters_to_the_next_command(tmp_path, mode):
    def build(own: Any) -> Any:
        words = ["--model=Wide"] if mode == "subclass" else []
        kwargs = dict(subclass_mode_model=mode == "subclass", save_config_callback=None)
        trainer = [*QUIET, "--trainer.max_epochs=1"]
        words = [
            *trainer,
            *words,
            "--model.net=Deep",
            "--model.net.depth=8",
            "--model.lr=0.25",
            "--model.optimizer=Adam",
        ]
        cli = own.LightningCLI(own.OwnOptimizer, own.Data, args=["fit", *words], **kwargs)
        cli.trainer.save_checkpoint("saved.ckpt")
        loaded = own.OwnOptimizer.load_from_checkpoint("saved.ckpt", weights_only=False)
        own.calls.append((type(loaded).__name__, type(loaded.net).__name__, loaded.net.depth, loaded.hparams.lr))
        return own.LightningCLI(
            own.OwnOptimizer,
            own.Data,
            args=[
                "validate",
                *QUIET,
                "--ckpt_path=saved.ckpt",
                *(["--model=Wide"] if mode == "subclass" else []),
                "--data.batch_size=2",
            ],
            **kwargs,
        )

    theirs, ours = run("lightning", tmp_path, build), run("levin", tmp_path, build)
    # Lightning builds the class that was asked for, levin the subclass of it that was trained.
    assert ours.pop("calls") == [("Wide" if mode == "subclass" else "OwnOptimizer", "Deep", 8, 0.25)]
    assert theirs.pop("calls") and ours == theirs
    assert ours["config"]["validate"]["data"]["batch_size"] == 2


@pytest.mark.parametrize(("writer", "reader"), [("lightning", "levin"), ("levin", "lightning"), ("levin", "levin")])
def test_a_checkpoint_of_either_command_line_is_built_by_the_other(tmp_path, writer, reader):
    path = tmp_path / "saved.ckpt"

    def write(own: Any) -> None:
        words = [
            "fit",
            *QUIET,
            "--trainer.max_epochs=1",
            "--model.lr=0.25",
            "--model.num_classes=7",
            "--data.batch_size=2",
        ]
        own.LightningCLI(own.OwnOptimizer, own.Data, args=words, save_config_callback=None).trainer.save_checkpoint(
            path
        )

    def read(own: Any) -> None:
        model, data = (kind.load_from_checkpoint(path, weights_only=False) for kind in (own.OwnOptimizer, own.Data))
        own.calls.append((model.hparams.lr, model.num_classes, data.hparams.batch_size))

    assert "raised" not in run(writer, tmp_path, write)
    assert run(reader, tmp_path, read)["calls"] == [(0.25, 7, 2)]
