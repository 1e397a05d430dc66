"""save_hyperparameters in all its forms, on Lightning and on levin: what is kept, logged, saved and refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import warnings
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.base import Container

from tests.parity import both


def plain(value: Any) -> Any:
    """Values that can be compared; objects by their class."""
    if isinstance(value, Container):
        return ("omegaconf", OmegaConf.to_container(value))
    if isinstance(value, Namespace):
        return ("namespace", vars(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (int, float, str, bool, type(None), list, tuple)):
        return value
    return type(value).__name__


def bases(framework: SimpleNamespace) -> SimpleNamespace:
    """Classes of modules that keep their arguments in every way there is."""
    Module = framework.LightningModule

    class All(Module):
        def __init__(self, width, depth=2, *rest, flag=False, **options):
            super().__init__()
            self.save_hyperparameters()

    class Named(Module):
        def __init__(self, width, depth=2, name="n", **options):
            super().__init__()
            self.save_hyperparameters("width", "name")

    class OneName(Module):
        def __init__(self, conf, depth=2):
            super().__init__()
            self.save_hyperparameters("conf")

    class FromOptions(Module):
        def __init__(self, width, **options):
            super().__init__()
            self.save_hyperparameters("width", "colour")

    class Conf(Module):
        def __init__(self, conf, depth=2):
            super().__init__()
            self.save_hyperparameters(conf)

    class CopiedConf(Module):
        def __init__(self, depth, conf):
            super().__init__()
            self.save_hyperparameters(copy.copy(conf))

    class Ignore(Module):
        def __init__(self, width, depth=2, layer=None, **options):
            super().__init__()
            self.save_hyperparameters(ignore=options.pop("without", "layer"))

    class ConfIgnore(Module):
        def __init__(self, conf, depth=2):
            super().__init__()
            self.save_hyperparameters(conf, ignore="b")

    class Silent(Module):
        def __init__(self, width, depth=2):
            super().__init__()
            self.save_hyperparameters(logger=False)

    class Twice(Module):
        def __init__(self, width, depth=2):
            super().__init__()
            self.save_hyperparameters("width")
            self.save_hyperparameters({"extra": 1, "width": 9})

    class TwiceSilent(Module):
        def __init__(self, width, depth=2):
            super().__init__()
            self.save_hyperparameters("width")
            self.save_hyperparameters("depth", logger=False)

    class Late(Module):
        def __init__(self, width, depth=2):
            super().__init__()
            width = width * 10
            depth += 1
            local = 3  # noqa: F841
            self.save_hyperparameters()

    class Frame(Module):
        def __init__(self, width, depth=2):
            super().__init__()
            self.keep()

        def keep(self):
            self.save_hyperparameters(frame=inspect.currentframe().f_back)

    class OuterFrame(Frame):
        def __init__(self, colour):
            super().__init__(3)

        def keep(self):
            self.save_hyperparameters(frame=inspect.currentframe().f_back.f_back)

    class Helper(Module):
        def __init__(self, width, depth=2):
            super().__init__()
            self.keep(77)

        def keep(self, number):
            self.save_hyperparameters()

    class Before(Module):
        def __init__(self, width, depth=2):
            self.save_hyperparameters()
            super().__init__()

    class Base(Module):
        def __init__(self, width=1, common=5, **options):
            super().__init__()
            self.save_hyperparameters()

    class Child(Base):
        def __init__(self, depth, common=6, **options):
            super().__init__(width=depth * 2, common=common + 1, **options)

    class ChildSaves(Base):
        def __init__(self, depth, common=6, **options):
            super().__init__(width=depth * 2, common=common + 1, **options)
            self.save_hyperparameters()

    class GrandChild(ChildSaves):
        def __init__(self, top, depth=4, *more, **options):
            super().__init__(depth, colour="red", **options)
            self.save_hyperparameters(ignore="common")

    class ChildForgets(Base):
        def __init__(self, depth, secret=1):
            super().__init__(width=depth)
            self.save_hyperparameters(ignore=["width", "secret"])

    class NoSave(Module):
        def __init__(self, width):
            super().__init__()

    class ChildOfNoSave(NoSave):
        def __init__(self, depth, width=3):
            super().__init__(width)
            self.save_hyperparameters()

    class Mixin:
        def __init__(self, *args, mixed=1, **kwargs):
            super().__init__(*args, **kwargs)

    class Mixed(Mixin, Base):
        def __init__(self, own, **kwargs):
            super().__init__(**kwargs)
            self.save_hyperparameters()

    class Parent(Module):
        def __init__(self, size, **options):
            super().__init__()
            self.child = All(size + 1, flag=True)
            self.save_hyperparameters()

    class KeywordOnly(Module):
        def __init__(self, *, width, depth=2):
            super().__init__()
            self.save_hyperparameters()

    class OtherSelf(Module):
        def __init__(this, width, depth=2):  # noqa: N805
            super().__init__()
            this.save_hyperparameters()

    class Missing(Module):
        def __init__(self, width):
            super().__init__()
            self.save_hyperparameters("width", "missing")

    class TwoConfs(Module):
        def __init__(self, a, b):
            super().__init__()
            self.save_hyperparameters(a, b)

    class ConfAndName(Module):
        def __init__(self, a, b):
            super().__init__()
            self.save_hyperparameters(a, "b")

    class After(Module):
        def __init__(self, width):
            super().__init__()

    class Nothing(Module):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()

    class NoInit(Module):
        pass

    class Property(Module):
        def __init__(self, width, **options):
            super().__init__()
            self.save_hyperparameters()
            self.hparams.width += 1
            self.hparams["new"] = 3
            self.hparams.added = 4

    return SimpleNamespace(
        **{name: kind for name, kind in locals().items() if isinstance(kind, type) and name != "Module"}
    )


def with_all(kind: Any, *args: Any, **kwargs: Any) -> Any:
    return kind(*args, **kwargs)


MAKERS: dict[str, Any] = {
    "all": lambda c: c.All(3, 4, 5, 6, flag=True, colour="red"),
    "all, defaults": lambda c: c.All(3),
    "named": lambda c: c.Named(3, other=1),
    "one name": lambda c: c.OneName({"a": 1}),
    "name in kwargs": lambda c: c.FromOptions(3, colour="red", other=1),
    "name in kwargs, missing": lambda c: c.FromOptions(3),
    "dict": lambda c: c.Conf({"a": 1, "b": {"c": 2}}),
    "copy of a dict": lambda c: c.CopiedConf(2, {"a": 1}),
    "empty dict": lambda c: c.Conf({}),
    "namespace": lambda c: c.Conf(Namespace(a=1, b=[2])),
    "empty namespace": lambda c: c.Conf(Namespace()),
    "omegaconf": lambda c: c.Conf(OmegaConf.create({"a": 1, "b": {"c": 2}})),
    "omegaconf as argument": lambda c: c.All(OmegaConf.create({"a": 1}), depth=Namespace(x=1)),
    "None": lambda c: c.Conf(None),
    "int": lambda c: c.Conf(3),
    "float": lambda c: c.Conf(3.0),
    "list": lambda c: c.Conf([1]),
    "tuple": lambda c: c.Conf((1,)),
    "object": lambda c: c.Conf(object()),
    "dataclass as container": lambda c: c.Conf(Plain(1)),
    "ignore one": lambda c: c.Ignore(3, layer=torch.nn.Linear(1, 1)),
    "ignore list": lambda c: c.Ignore(3, without=["layer", "depth"]),
    "ignore tuple": lambda c: c.Ignore(3, without=("layer", "missing")),
    "ignore nothing": lambda c: c.Ignore(3, without=None),
    "ignore set": lambda c: c.Ignore(3, without={"layer"}),
    "ignore in a container": lambda c: c.ConfIgnore({"a": 1, "b": 2}),
    "ignore in a namespace": lambda c: c.ConfIgnore(Namespace(a=1, b=2)),
    "module as argument": lambda c: c.Ignore(3, layer=torch.nn.Linear(1, 1), without="depth"),
    "silent": lambda c: c.Silent(3),
    "twice": lambda c: c.Twice(3),
    "twice, silent at last": lambda c: c.TwiceSilent(3),
    "changed before": lambda c: c.Late(3),
    "frame": lambda c: c.Frame(3),
    "frame of the outer one": lambda c: c.OuterFrame("red"),
    "helper": lambda c: c.Helper(3),
    "before super": lambda c: c.Before(3),
    "base": lambda c: c.Base(colour="blue"),
    "child": lambda c: c.Child(3, colour="blue"),
    "child saves": lambda c: c.ChildSaves(3, colour="blue"),
    "grandchild": lambda c: c.GrandChild(9, 3, 1, 2),
    "child forgets": lambda c: c.ChildForgets(3),
    "child of one that does not save": lambda c: c.ChildOfNoSave(3),
    "mixin": lambda c: c.Mixed(3, width=4, mixed=5, colour="blue"),
    "parent with child": lambda c: c.Parent(3, colour="blue"),
    "child in parent": lambda c: c.Parent(3, colour="blue").child,
    "keyword only": lambda c: c.KeywordOnly(width=3),
    "another name of self": lambda c: c.OtherSelf(3),
    "missing name": lambda c: c.Missing(3),
    "two containers": lambda c: c.TwoConfs({"a": 1}, {"b": 2}),
    "container and name": lambda c: c.ConfAndName({"a": 1}, 2),
    "nothing": lambda c: c.Nothing(),
    "no init": lambda c: c.NoInit(),
    "not saved": lambda c: c.NoSave(3),
    "changed after": lambda c: c.Property(3, other=[1]),
    "lambda": lambda c: c.All(len, depth=lambda x: x),
    "made in a function": lambda c: with_all(c.All, 3, name="x"),
}  # fmt: skip


@dataclasses.dataclass
class Plain:
    a: int = 1


def made(framework: SimpleNamespace, make: Any) -> dict[str, Any]:
    """What a user sees of a module that was made, or of the failure."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            module = make(bases(framework))
        except Exception as error:
            both.caught(error)
            return {"error": type(error).__name__}
    module.hparams_initial["changed"] = 1
    return {
        "hparams": plain(module.hparams), "kind": type(module.hparams).__name__,
        "initial": plain(module.hparams_initial), "initial kind": type(module.hparams_initial).__name__,
        "warnings": sorted(warning.category.__name__ for warning in caught), "children": len(list(module.children())),
    }  # fmt: skip


def through_a_run(framework: SimpleNamespace, folder, module: Any, **flags: Any) -> dict[str, Any]:
    """What the loggers got and the checkpoint holds after a run of no epochs."""
    lines = both.Lines()
    trainer = both.quiet(framework, folder, max_epochs=0, logger=both.recording_logger(framework, lines), **flags)
    type(module).training_step = lambda self, batch, batch_idx: None
    type(module).configure_optimizers = lambda self: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    trainer.fit(module, both.loader(1))
    path = folder / f"{framework.name}.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)
    keys = ("hyper_parameters", "hparams_name", "hparams_type")
    found = {key: plain(saved[key]) for key in keys if key in saved}
    return {"logged": [plain(line[1]) for line in lines if line[0] == "hparams"], "saved": found}


ON_PURPOSE = {"child in parent", "two containers", "container and name"}


@pytest.mark.lightning_raises("KeyError", "ValueError")
@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ON_PURPOSE])
def test_the_same_is_kept(name):
    assert made(both.levin(), MAKERS[name]) == made(both.lightning(), MAKERS[name])


def test_a_child_keeps_its_own_arguments_only():
    """Differs on purpose: Lightning also takes those of the module that the child is made in."""
    theirs, ours = (
        made(framework, MAKERS["child in parent"])["hparams"] for framework in (both.lightning(), both.levin())
    )
    assert ours == {"width": 4, "depth": 2, "flag": True}
    assert theirs == {**ours, "size": 3, "colour": "blue"}


@pytest.mark.parametrize("name", ["two containers", "container and name"])
def test_what_cannot_be_kept_is_refused(name):
    """Differs on purpose: Lightning leaves out all or a part of it silently."""
    assert "error" not in made(both.lightning(), MAKERS[name])
    assert made(both.levin(), MAKERS[name]) == {"error": "ValueError"}


SAVED = [
    "all", "named", "one name", "dict", "copy of a dict", "empty dict", "namespace", "omegaconf", "ignore one", "ignore in a container",
    "silent", "twice", "twice, silent at last", "grandchild", "mixin", "parent with child", "not saved", "changed after",
]  # fmt: skip


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("flags", [{}, {"enable_autolog_hparams": False}], ids=str)
def test_the_same_is_logged_and_saved(tmp_path, name, flags):
    results = []
    for framework in (both.lightning(), both.levin()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(through_a_run(framework, tmp_path, MAKERS[name](bases(framework)), **flags))
    assert results[1] == results[0]


def dataclass_of(framework: SimpleNamespace) -> Any:
    @dataclasses.dataclass
    class Data(framework.DataModule):
        width: int
        options: dict = dataclasses.field(default_factory=dict)
        hidden: int = dataclasses.field(default=3, init=False)

        def __post_init__(self):
            super().__init__()
            self.save_hyperparameters(ignore="options")

    @dataclasses.dataclass(eq=False)
    class Net(framework.LightningModule):
        width: int
        depth: int = 2

        def __post_init__(self):
            super().__init__()
            self.save_hyperparameters()

    return Data(4, {"a": 1}), Net


def test_dataclasses():
    results = []
    for framework in (both.lightning(), both.levin()):
        data, Net = dataclass_of(framework)
        try:
            net = plain(Net(3).hparams)
        except Exception as error:
            both.caught(error)
            net = type(error).__name__
        results.append((plain(data.hparams), net))
    assert results[1] == results[0]


def values_of(framework: SimpleNamespace) -> Any:
    class Data(framework.DataModule):
        def __init__(self, width=1, own=2, tensor=None):
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return both.loader(1)

    class Net(framework.LightningModule):
        def __init__(self, width=1, depth=2, tensor=None):
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net, Data


@pytest.mark.lightning_raises("RuntimeError")
@pytest.mark.parametrize(
    ("of_net", "of_data"),
    [
        ({}, {}),
        ({"width": 2}, {}),
        ({"width": 2}, {"width": 2}),
        ({"tensor": torch.ones(2)}, {"tensor": torch.zeros(2)}),
        ({"tensor": torch.ones(2)}, {"tensor": 1}),
        ({"width": float("nan")}, {"width": float("nan")}),
        ({"width": 1}, {"width": 1.0}),
        ({"width": [1, {"a": 2}]}, {"width": [1, {"a": 2}]}),
        ({"width": None}, {"width": 0}),
    ],
)
@pytest.mark.parametrize("has_logger", [True, False])
def test_a_module_and_a_datamodule_with_equal_names(tmp_path, of_net, of_data, has_logger):
    results = []
    for framework in (both.lightning(), both.levin()):
        Net, Data = values_of(framework)
        lines = both.Lines()
        logger = both.recording_logger(framework, lines) if has_logger else False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = both.quiet(framework, tmp_path, max_epochs=1, logger=logger)
            try:
                trainer.fit(Net(**of_net), datamodule=Data(**of_data))
                error = None
            except Exception as caught:
                both.caught(caught)
                error = type(caught).__name__
        results.append((error, [repr(plain(line[1])) for line in lines if line[0] == "hparams"]))
    assert results[1] == results[0]


@pytest.mark.lightning_raises("RuntimeError")
def test_equal_tensors_are_the_same_value(tmp_path):
    """Differs on purpose: Lightning refuses two tensors that are not one object."""
    errors = []
    for framework in (both.lightning(), both.levin()):
        Net, Data = values_of(framework)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = both.quiet(
                framework, tmp_path, max_epochs=1, logger=both.recording_logger(framework, both.Lines())
            )
            try:
                trainer.fit(Net(tensor=torch.ones(2)), datamodule=Data(tensor=torch.ones(2)))
                errors.append(None)
            except Exception as caught:
                both.caught(caught)
                errors.append(type(caught).__name__)
    assert errors == ["RuntimeError", None]


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_hparams_and_graph_go_to_every_logger(tmp_path, method):
    results = []
    for framework in (both.lightning(), both.levin()):
        calls: list[Any] = []

        def logger(name, framework=framework, calls=calls):
            class Recorder(framework.Logger):
                version = 0
                name = ""

                def log_hyperparams(self, params, *args, **kwargs):
                    calls.append((name, "hparams", plain(dict(params)), args, kwargs))

                def log_metrics(self, metrics, step=None):
                    calls.append((name, "metrics"))

                def log_graph(self, model, input_array=None):
                    calls.append((name, "graph", type(model).__name__, input_array))

                def save(self):
                    calls.append((name, "save"))

                def finalize(self, status):
                    calls.append((name, "finalize", status))

            Recorder.name = name
            return Recorder()

        Net, Data = values_of(framework)
        Net.validation_step = Net.test_step = lambda self, batch, batch_idx: None
        Net.predict_step = lambda self, batch, batch_idx: 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = both.quiet(framework, tmp_path, max_epochs=1, logger=[logger("a"), logger("b")])
            getattr(trainer, method)(Net(depth=7), both.loader(1))
        results.append(calls)
    assert results[1] == results[0]


def test_entries_that_cannot_be_pickled_are_left_out(tmp_path):
    results = []
    for framework in (both.lightning(), both.levin()):
        Net, _ = values_of(framework)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module = Net(width=lambda: 3, depth=4)
            trainer = both.quiet(framework, tmp_path, max_epochs=1)
            trainer.fit(module, both.loader(1))
            path = tmp_path / f"{framework.name}.ckpt"
            trainer.save_checkpoint(path)
        about = [str(warning.message) for warning in caught if "width" in str(warning.message)]
        results.append(
            (plain(module.hparams), len(about) > 0, plain(torch.load(path, weights_only=False)["hyper_parameters"]))
        )
    assert results[1] == results[0]


def test_a_module_with_hparams_is_copied_and_pickled():
    for framework in (both.lightning(), both.levin()):
        module = MAKERS["all"](bases(framework))
        twin = copy.deepcopy(module)
        twin.hparams.width = 99
        assert module.hparams.width == 3
        assert pickle.loads(pickle.dumps(module.hparams)) == module.hparams


def test_attributes_of_hparams():
    for framework in (both.lightning(), both.levin()):
        hparams = MAKERS["all"](bases(framework)).hparams
        assert hparams.width == 3 and hparams["depth"] == 4
        with pytest.raises(AttributeError):
            hparams.missing  # noqa: B018
        del hparams["depth"]
        assert "depth" not in hparams
        assert '"width": 3' in repr(hparams) or "width" in repr(hparams)
