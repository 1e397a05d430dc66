"""What trainer.explain says is what a run calls: held against traces of real runs."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import levin
from levin.callbacks import Callback, EarlyStopping
from levin.demos.boring_classes import BoringDataModule, BoringModel, RandomDataset
from levin.explain import explained_run, rules
from levin.explain.node import Place, code_of
from levin.explain.text import explain, plan_of
from levin.loggers import CSVLogger
from levin.loops.hook_table import RUN_HOOKS
from levin.precision import MixedPrecision

MODULE_HOOKS = [
    *(name for name in RUN_HOOKS if hasattr(levin.LightningModule, name)),
    "setup", "teardown", "prepare_data", "configure_model", "on_before_batch_transfer", "transfer_batch_to_device",
    "on_after_batch_transfer", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "backward",
    "lr_scheduler_step", "on_validation_model_zero_grad",
    *(f"on_{stage}_model_{mode}" for stage in ("validation", "test") for mode in ("eval", "train")), "on_predict_model_eval",
]  # fmt: skip
CALLBACK_HOOKS = [name for name in MODULE_HOOKS if hasattr(Callback, name)]
DATA_HOOKS = ["setup", "teardown", "prepare_data", "on_before_batch_transfer", "on_after_batch_transfer"]
lines = itertools.count(1000)


def passes_on(base, name):
    """A method that does what the one of `base` does, with a code of its own."""
    inner = getattr(base, name)

    def method(self, *args, **kwargs):
        return inner(self, *args, **kwargs)

    code = method.__code__.replace(co_name=name, co_firstlineno=next(lines))
    return types.FunctionType(code, method.__globals__, name, None, method.__closure__)


def written(base, names, **more):
    """A user's class that overrides some methods."""
    return type(f"Users{base.__name__}", (base,), {**{name: passes_on(base, name) for name in names}, **more})


class Net(BoringModel):
    schedulers = ()

    def __init__(self, automatic=True):
        super().__init__()
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("loss", loss, on_step=True, on_epoch=True)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val", self.step(batch))

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("test", self.step(batch))

    def predict_step(self, batch, batch_idx):
        return self(batch)

    def on_predict_model_train(self):
        """Not a hook, though `validate` and `test` have one of such a name."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
        made = []
        for interval, frequency, is_plateau in self.schedulers:
            kind = torch.optim.lr_scheduler.ReduceLROnPlateau if is_plateau else torch.optim.lr_scheduler.StepLR
            scheduler = kind(optimizer) if is_plateau else kind(optimizer, 1)
            config = {"scheduler": scheduler, "interval": interval, "frequency": frequency, "strict": False}
            made.append(config | ({"monitor": "loss"} if is_plateau else {}))
        return [optimizer], made


class Log(CSVLogger):
    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)


class Data(levin.LightningDataModule):
    def __init__(self, num_train, num_val):
        super().__init__()
        self.num_train, self.num_val = num_train, num_val

    def train_dataloader(self):
        return DataLoader(RandomDataset(32, self.num_train), batch_size=1)

    def val_dataloader(self):
        return [DataLoader(RandomDataset(32, self.num_val), batch_size=1)]

    test_dataloader = predict_dataloader = val_dataloader


def unrolled(nodes, place=Place(0, 0)):
    """The functions that the lines say are called, one after the other."""
    for node in nodes:
        if node.due is not None and not node.due(place):
            continue
        if node.function is not None:
            yield code_of(node.function)
        if node.counts is None:
            yield from unrolled(node.body, place)
            continue
        axis, count = node.counts
        for index in range(count(place.epoch)):
            inner = place
            if axis == "epoch":
                batches = next(each for each in node.body if each.counts)
                inner = Place(index, max(0, batches.counts[1](index) - 1))
            elif axis == "batch":
                inner = place._replace(batch_idx=index)
            yield from unrolled(node.body, inner)


def traced(function, codes):
    """The functions of users that `function` calls, one after the other."""
    seen = []

    def profile(frame, event, _):
        if event == "call" and frame.f_code in codes:
            seen.append(frame.f_code)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen


def compare(trainer, model, datamodule=None, fn="fit", **arguments):
    """Hold the explanation of a call against a trace of it. Returns the explanation."""
    arguments |= {"datamodule": datamodule}
    said = []

    def keep(run):
        said.extend(unrolled(plan_of(run).lines()))
        return explain(run)

    with mock.patch.object(explained_run, "explain", keep):
        text = trainer.explain(model, fn=fn, **arguments)
    owners = [model, datamodule, *trainer.callbacks, *trainer.loggers]
    known = {"training_step", "validation_step", "test_step", "predict_step", "configure_optimizers", "log_metrics"}
    known |= {"on_predict_model_train"} | {f"{stage}_dataloader" for stage in ("train", "val", "test", "predict")}
    codes = {
        method.__code__: f"{type(owner).__name__}.{name}"
        for owner in owners if owner is not None
        for kind in type(owner).__mro__ if not kind.__module__.startswith(("levin", "torch"))
        for name, method in vars(kind).items() if inspect.isfunction(method) and (name in MODULE_HOOKS or name in known)
    }  # fmt: skip
    seen = [codes[code] for code in traced(lambda: getattr(trainer, fn)(model, **arguments), codes)]
    assert [codes[code] for code in said if code in codes] == seen
    for code, name in codes.items():
        if name in seen:
            assert re.search(rf"\S:{code.co_firstlineno}$", text, re.MULTILINE), f"{name} has no place in\n{text}"
    return text


def trainer_of(tmp_path, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return levin.Trainer(**{"logger": False, "default_root_dir": tmp_path} | quiet | options)


schedulers = st.lists(st.tuples(st.sampled_from(["step", "epoch"]), st.integers(1, 3), st.booleans()), max_size=2)


@settings(max_examples=25, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_lines_are_what_a_run_calls(data, tmp_path):
    draw = data.draw
    num_train, num_val = draw(st.integers(1, 6)), draw(st.integers(0, 2))
    automatic = draw(st.booleans())
    own = set(draw(st.lists(st.sampled_from(MODULE_HOOKS), max_size=12)))
    if not automatic:
        own -= {"backward", "optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping"}
    model = written(Net, own, schedulers=draw(schedulers))(automatic)
    datamodule = written(Data, set(draw(st.lists(st.sampled_from(DATA_HOOKS)))))(num_train, num_val)
    callbacks = [
        written(Callback, set(draw(st.lists(st.sampled_from(CALLBACK_HOOKS)))))()
        for _ in range(draw(st.integers(0, 1)))
    ]
    by_run = draw(st.booleans())
    options = {
        "max_epochs": draw(st.integers(1, 4)),
        "max_steps": draw(st.sampled_from([-1, -1, 1, 3, 7])) if automatic else -1,
        "accumulate_grad_batches": draw(st.integers(1, 3)) if automatic else 1,
        "gradient_clip_val": draw(st.sampled_from([None, 0.5])) if automatic else None,
        "num_sanity_val_steps": draw(st.integers(0, 1)),
        "log_every_n_steps": draw(st.integers(1, 5)),
        "check_val_every_n_epoch": None if by_run else draw(st.integers(1, 3)),
        "val_check_interval": draw(st.integers(1, num_train + 2)) if by_run else draw(st.sampled_from([1.0, 0.5, 1])),
        "reload_dataloaders_every_n_epochs": draw(st.sampled_from([0, 0, 1, 2])),
    }
    logger = [Log(tmp_path)] if draw(st.booleans()) else False
    trainer = trainer_of(tmp_path, callbacks=callbacks, logger=logger, enable_checkpointing=False, **options)
    with mock.patch("warnings.warn"):
        compare(trainer, model, datamodule)


@pytest.mark.parametrize("fn", ["validate", "test", "predict"])
@settings(max_examples=15, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_the_lines_are_what_an_evaluation_calls(fn, data, tmp_path):
    draw = data.draw
    model = written(Net, set(draw(st.lists(st.sampled_from(MODULE_HOOKS), max_size=16))))()
    callback = written(Callback, set(draw(st.lists(st.sampled_from(CALLBACK_HOOKS), max_size=16))))()
    datamodule = written(Data, set(draw(st.lists(st.sampled_from(DATA_HOOKS)))))(1, draw(st.integers(0, 3)))
    several = [DataLoader(RandomDataset(32, 2)), DataLoader(RandomDataset(32, draw(st.integers(0, 3))))]
    is_given = draw(st.booleans()) and fn != "predict"
    name = {"validate": "val"}.get(fn, fn)
    trainer = trainer_of(
        tmp_path, callbacks=[callback], logger=[Log(tmp_path)] if draw(st.booleans()) else False,
        inference_mode=draw(st.booleans()), **{f"limit_{name}_batches": draw(st.sampled_from([1.0, 1.0, 0, 1]))},
    )  # fmt: skip
    with mock.patch("warnings.warn"):
        compare(trainer, model, fn=fn, **({"dataloaders": several} if is_given else {"datamodule": datamodule}))


@pytest.mark.parametrize(
    ("fn", "options"),
    [
        ("fit", {"max_steps": 5, "val_check_interval": 2, "reload_dataloaders_every_n_epochs": 2}),
        ("fit", {"num_sanity_val_steps": 0}), ("fit", {"check_val_every_n_epoch": None, "val_check_interval": 4}),
        ("fit", {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}),
        ("validate", {}), ("test", {}), ("predict", {}),
    ],
)  # fmt: skip
def test_the_lines_where_everybody_has_all_hooks(fn, options, tmp_path):
    callbacks = [written(Callback, CALLBACK_HOOKS)(), written(Callback, CALLBACK_HOOKS)()]
    trainer = trainer_of(
        tmp_path, max_epochs=3, callbacks=callbacks, logger=Log(tmp_path), enable_checkpointing=False,
        accumulate_grad_batches=2, log_every_n_steps=2, **options,
    )  # fmt: skip
    schedulers = [(interval, 1, is_plateau) for interval in ("step", "epoch") for is_plateau in (False, True)]
    with mock.patch("warnings.warn"):
        compare(trainer, written(Net, MODULE_HOOKS, schedulers=schedulers)(), written(Data, DATA_HOOKS)(3, 2), fn)


def test_an_evaluation_in_words(tmp_path):
    trainer = trainer_of(tmp_path, limit_test_batches=2, logger=Log(tmp_path))
    model = written(Net, ["on_test_batch_end", "on_train_start"])()
    text = compare(trainer, model, fn="test", dataloaders=[DataLoader(RandomDataset(32, 5))] * 2)
    assert text.startswith("test of UsersNet") and "loggers: Log\n" in text
    assert "for batch in test_dataloaders:  # 4 batches, in torch.inference_mode()" in text
    assert "test_step(batch, batch_idx, dataloader_idx)" in text and "# logs 'test' over the epoch" in text
    assert "on_test_batch_end(outputs, batch, batch_idx, dataloader_idx)" in text and "log_metrics" in text
    assert "on_test_start" in text.split("not called")[1] and "on_train_start" not in text
    assert "a checkpoint holds" not in text and "configure_optimizers" not in text
    assert "'some.ckpt', which is not read" in trainer.explain(model, Data(1, 1), "some.ckpt", fn="validate")
    with pytest.warns(UserWarning, match="0 length"):
        text = trainer_of(tmp_path).explain(model, fn="validate", datamodule=Data(1, 0))
    assert "nothing: the loaders hold no batches" in text
    text = trainer_of(tmp_path, inference_mode=False).explain(model, Data(1, 1), fn="predict")
    assert "in torch.no_grad()" in text and "Data.predict_dataloader()" in text
    nothing = trainer_of(tmp_path, limit_test_batches=0).explain(model, Data(1, 1), fn="test")
    assert "nothing: limit_test_batches=0" in nothing


def test_the_words_say_when(tmp_path):
    trainer = trainer_of(
        tmp_path, max_epochs=4, accumulate_grad_batches=4, gradient_clip_val=0.5, check_val_every_n_epoch=2,
        val_check_interval=0.25, num_sanity_val_steps=0, callbacks=[EarlyStopping("val")], logger=CSVLogger(tmp_path),
        log_every_n_steps=5,
    )  # fmt: skip
    model = written(Net, ["on_train_epoch_end"])()
    text = compare(trainer, model, Data(10, 3))
    assert "for epoch in range(4):" in text and "for batch in train_dataloader:  # 10 batches" in text
    assert "after every 4th batch and the last. After the others the closure alone" in text
    assert "clip_grad_norm_(parameters, 0.5)  # after every 4th batch and the last" in text
    assert "validation:  # after every 2nd batch of every 2nd epoch" in text
    assert "log_metrics" in text.split("not called")[0] and re.search(
        r"values of the step\)  # after batches .* of the run", text
    )
    assert re.search(r"EarlyStopping\.on_validation_end\(\) +levin/callbacks/early_stopping\.py:\d+", text)
    assert "# logs 'loss' of the step and over the epoch" in text and "# logs 'val' over the epoch" in text
    left_out = text.split("not called")[1]
    assert "optimizer_step" in left_out and "on_train_epoch_end" not in left_out.replace("\n", " ").split(", ")


@pytest.mark.parametrize(
    ("num_asked", "limits", "words"),
    [
        (8, {"max_epochs": 2}, ""), (8, {"max_epochs": -1, "max_steps": 7}, ""), (8, {"max_epochs": -1, "max_steps": 8}, ""),
        (8, {"max_epochs": -1}, "not within the first 8 batches"), (8, {"max_epochs": 3}, "not within the first 8 batches"),
        (3, {"max_epochs": 1}, "not within the first 3 batches"), (3, {"max_epochs": -1}, "not within the first 6 batches"),
    ],
)  # fmt: skip
def test_what_no_batch_is_due_for_is_left_out_or_said_to_be_beyond_those_asked(
    num_asked, limits, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(rules, "NUM_ASKED", num_asked)
    trainer = trainer_of(
        tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=50, check_val_every_n_epoch=4, num_sanity_val_steps=0,
        enable_checkpointing=False, **limits,
    )  # fmt: skip
    with mock.patch("warnings.warn"):
        called, left_out = trainer.explain(Net(), datamodule=Data(4, 1)).split("not called")
    assert re.findall(r" validation:  # (.*)", called) == re.findall(r"values of the step\)  # (.*?) {2}", called)
    assert re.findall(r" validation:  # (.*)", called) == ([words] if words else [])
    assert ("log_metrics of a step (log_every_n_steps=50)" in " ".join(left_out.split())) == (not words)


def test_precision_accumulation_and_limits_are_said(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=3, precision="bf16-mixed", enable_checkpointing=False)
    text = trainer.explain(BoringModel(), DataLoader(RandomDataset(32, 8)))
    assert "max_steps=3" in text and "in the context of MixedPrecision (bf16-mixed)" in text
    assert "# SGD, through MixedPrecision\n" in text
    assert "written by nobody" in text and "a checkpoint holds" in text
    scaling = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    text = trainer_of(tmp_path, max_steps=3, plugins=scaling).explain(BoringModel())
    assert "# SGD, through MixedPrecision (unscales first, skips the update" in text


def test_batches_that_go_through_in_parts_are_said(tmp_path):
    def text(module, **settings):
        return trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False, **settings).explain(module)

    assert "where memory is full: in parts of half" in text(Net(), accumulate_grad_batches="auto")
    assert "where memory is full" not in text(Net())
    with pytest.raises(levin.utilities.exceptions.MisconfigurationException, match="not possible with a `backward`"):
        text(written(Net, ["backward"])(), accumulate_grad_batches="auto")


def test_nothing_is_left_of_it(tmp_path):
    def weights(explains):
        torch.manual_seed(1)
        trainer = trainer_of(tmp_path / str(explains), max_epochs=2)
        model, loader = BoringModel(), DataLoader(RandomDataset(32, 16), shuffle=True)
        if explains:
            before = {key: value.clone() for key, value in model.state_dict().items()}
            trainer.explain(model, loader)
            assert trainer.run is None and trainer.max_epochs == 2 and trainer.global_step == 0
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
            assert not list(tmp_path.joinpath("True").rglob("*"))
            with pytest.raises(levin.utilities.exceptions.MisconfigurationException, match="no loop that logs"):
                model.log("loss", 1.0)
        trainer.fit(model, loader)
        assert trainer.current_epoch == 2
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(False), weights(True)))


@pytest.mark.parametrize(("fn", "loaders"), [("fit", ["train", "val"]), ("validate", ["val"])])
def test_the_hooks_of_set_up_run_and_no_others(fn, loaders, tmp_path):
    owners = [written(Net, MODULE_HOOKS)(), written(Data, DATA_HOOKS)(3, 2), written(Callback, CALLBACK_HOOKS)()]
    codes = {
        method.__code__
        for owner in owners
        for kind in type(owner).__mro__ if not kind.__module__.startswith(("levin", "torch"))
        for name, method in vars(kind).items() if inspect.isfunction(method) and not name.startswith("__")
    }  # fmt: skip
    trainer = trainer_of(tmp_path, max_epochs=1, callbacks=owners[2:], enable_checkpointing=False)
    with mock.patch("warnings.warn"):
        seen = traced(lambda: trainer.explain(owners[0], owners[1], fn=fn), codes)
    assert [code.co_name for code in seen] == [
        "prepare_data", "prepare_data", "setup", "setup", "setup", "configure_model",
        *(["configure_optimizers"] if fn == "fit" else []), *(f"{name}_dataloader" for name in loaders),
        "teardown", "teardown",
    ]  # fmt: skip


def test_a_trainer_that_has_trained_keeps_its_run(tmp_path):
    trainer = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(BoringModel())
    run, step = trainer.run, trainer.global_step
    trainer.explain(BoringModel())
    assert trainer.run is run and trainer.global_step == step and trainer.state.finished


def test_a_hook_of_which_there_is_no_source_is_named(tmp_path):
    model = BoringModel()
    model.on_train_start = [].clear
    text = trainer_of(tmp_path, max_epochs=1, enable_checkpointing=False).explain(model)
    assert "on_train_start" in str(text)


def test_a_mistake_of_the_user_is_said_as_fit_says_it(tmp_path):
    with pytest.raises(TypeError, match="LightningModule"):
        trainer_of(tmp_path, max_epochs=1).explain(torch.nn.Linear(1, 1))
    with pytest.raises(levin.utilities.exceptions.MisconfigurationException, match="training_step"):
        trainer_of(tmp_path, max_epochs=1).explain(levin.LightningModule(), datamodule=BoringDataModule())
    with pytest.raises(levin.utilities.exceptions.MisconfigurationException, match="test_step"):
        trainer_of(tmp_path).explain(levin.LightningModule(), BoringDataModule(), fn="test")
    with pytest.raises(ValueError, match="'fit', 'validate', 'test', 'predict', received 'train'"):
        trainer_of(tmp_path).explain(BoringModel(), fn="train")
    with pytest.raises(TypeError, match="val_dataloaders"):
        trainer_of(tmp_path).explain(BoringModel(), val_dataloaders=[], fn="validate")


def test_what_a_checkpoint_holds_is_what_is_saved(tmp_path):
    trainer = trainer_of(tmp_path, max_epochs=1)
    model = Net()
    text = trainer.explain(model, datamodule=Data(2, 1))
    trainer.fit(model, datamodule=Data(2, 1))
    (path,) = tmp_path.rglob("*.ckpt")
    keys = set(torch.load(path, weights_only=False)) - {"pytorch-lightning_version"}
    said = {
        word
        for line in text.split("a checkpoint holds:")[1].splitlines()
        for word in re.split(r"[ ,]+", line.partition(":")[0])
    }
    assert keys <= said


class HalfOfData(Data):
    def train_dataloader(self):
        return DataLoader(RandomDataset(32, self.num_train // self.trainer.world_size), batch_size=1)


class NetOfSeveral(Net):
    def configure_optimizers(self):
        assert self.trainer.world_size == 2
        return super().configure_optimizers()


def test_several_processes(tmp_path):
    trainer = trainer_of(tmp_path, max_epochs=1, devices=2, strategy="ddp_spawn")
    text = trainer.explain(NetOfSeveral(), datamodule=HalfOfData(16, 2))
    assert "on 2 processes" in text and "inside of DistributedDataParallel" in text
    assert "# 4 batches" in text and "averaged over the processes" in text


SCRIPT = """
import sys
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

class Net(BoringModel):
    def on_train_start(self):
        raise RuntimeError("this must not run")

if __name__ == "__main__":
    print("before")
    trainer = Trainer(max_epochs=int(sys.argv[1]), logger=False, enable_progress_bar=False)
    trainer.fit(Net())
    print("after", trainer.state.finished)
    trainer.test(ckpt_path=trainer.checkpoint_callback.best_model_path or None)
    print(trainer.test()[0])
"""


def command(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(Path(levin.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-m", "levin", *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_the_command_stops_a_script_before_its_first_batch(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = command("explain", "train.py", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "before\n" in done.stdout and "after True\n" not in done.stdout
    assert "for epoch in range(3):" in done.stdout and re.search(r"Net.on_train_start\(\) +train.py:7", done.stdout)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["train.py"]


def test_the_command_explains_the_call_that_is_named(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    done = command("explain", "--call", "test", "train.py", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "after True\n" in done.stdout and "test of Net" in done.stdout and "Net.test_step(" in done.stdout
    done = command("explain", "--call=predict", "train.py", "3", cwd=tmp_path)
    assert done.returncode == 1 and "IndexError" in done.stderr
    assert "Trainer.fit, Trainer.test were passed over" in done.stderr
    done = command("explain", "predict", "--model", "train.Net", cwd=tmp_path)
    assert done.returncode == 0 and "predict of Net" in done.stdout, done.stderr
